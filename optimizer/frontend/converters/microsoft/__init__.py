"""Converters of the domain com.microsoft: the operators that onnxruntime adds, as real exports use them.

Their meaning is that of onnxruntime's CPU kernels, against which the tests compare them.
"""
