"""Decoders of each family in each form that people have: `python -m benchmarks.families.make`, then `.table`."""
