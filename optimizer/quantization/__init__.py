"""Fitting quantized weights to a model: the inputs that its products see, and what rounding does to its outputs."""
