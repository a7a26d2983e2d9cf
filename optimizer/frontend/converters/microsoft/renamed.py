"""Operators of com.microsoft that mean the same as a standard operator."""

from __future__ import annotations

from optimizer.frontend.converters.microsoft.standard import as_standard, standard
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter


@converter("Trilu", domain=MICROSOFT)
def trilu(node: Node) -> Result:
    """Convert Trilu: the upper or lower triangle, zeros elsewhere."""
    return as_standard(node, "Trilu", upper=node.integer("upper", 1))


@converter("ExpandDims", domain=MICROSOFT)
def expand_dims(node: Node) -> Result:
    """Convert ExpandDims: a dimension of 1 at the axis that a constant scalar gives."""
    axis = node.constant(node.constant_input(1).reshape(1).astype("int64"))
    return standard(node, "Unsqueeze", node.input(0), axis)


@converter("NhwcMaxPool", domain=MICROSOFT)
def nhwc_max_pool(node: Node) -> Result:
    """Convert NhwcMaxPool: MaxPool of data whose channels stand on the last axis."""
    data = node.input(0)
    names = ("dilations", "kernel_shape", "pads", "strides")
    attributes = {name: node.integers(name) for name in names if node.has_attribute(name)}
    channels_first = standard(node, "Transpose", data, perm=[0, data.rank - 1, *range(1, data.rank - 1)])
    pooled = standard(
        node,
        "MaxPool",
        channels_first,
        auto_pad=node.string("auto_pad", "NOTSET"),
        ceil_mode=node.integer("ceil_mode", 0),
        **attributes,
    )
    return standard(node, "Transpose", pooled, perm=[0, *range(2, data.rank), 1])
