"""Decoders with weights of 4 bits, beside llama.cpp and onnxruntime-genai: `python -m benchmarks llm`."""
