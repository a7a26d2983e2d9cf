"""A compiler for neural networks in ONNX: import, rewrite, schedule, certify, package."""
