"""Operators by how they treat channels, which says whether their operands may lie in blocks of them."""

from __future__ import annotations

from tvm import relax

CONVOLUTIONS = {"relax.nn.conv1d": 1, "relax.nn.conv2d": 2, "relax.nn.conv3d": 3}
TRANSPOSED = {"relax.nn.conv1d_transpose": 1, "relax.nn.conv2d_transpose": 2, "relax.nn.conv3d_transpose": 3}
ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in [
        *("nn.relu", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "sigmoid", "tanh", "erf", "exp", "log"),
        *("negative", "abs", "sqrt", "rsqrt", "square", "clip", "floor", "ceil", "round", "astype"),
        *("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "where"),
        *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"),
        *("logical_and", "logical_or", "logical_not"),
    ]
)
QUANTIZATIONS = ("relax.quantize", "relax.dequantize")
REDUCTIONS = {
    "relax.mean": relax.op.mean,
    "relax.sum": relax.op.sum,
    "relax.max": relax.op.max,
    "relax.min": relax.op.min,
}
POOLINGS = {"relax.nn.max_pool2d": relax.op.nn.max_pool2d, "relax.nn.avg_pool2d": relax.op.nn.avg_pool2d}
