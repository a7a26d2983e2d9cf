"""Converters from ONNX operators to Relax, one module per kind of operator; each registers itself on import."""
