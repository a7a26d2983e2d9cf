"""The mathematics of quantizing weights: schemes, and methods of choosing scales and zero points. NumPy alone."""
