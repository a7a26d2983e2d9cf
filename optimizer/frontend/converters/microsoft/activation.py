"""Activation functions of com.microsoft, and the activations that its fused operators end in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from optimizer.frontend.converters.microsoft.standard import as_standard, standard
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.value import Value, numpy_dtype

# The parameters that each activation of a fused operator takes, in the order of `activation_params`.
_PARAMETERS = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "Clip": ("min", "max"),
    "HardSigmoid": ("alpha", "beta"),
}


def activated(node: Node, value: Value, name: str, parameters: Sequence[float]) -> Value:
    """Return the activation called `name` of `value`, for operators with a fused activation; "" is none."""
    if not name:
        return value
    if name not in _PARAMETERS or len(parameters) < len(_PARAMETERS[name]):
        raise node.unsupported(f"the fused activation '{name}' with parameters {list(parameters)} is not supported")
    given = dict(zip(_PARAMETERS[name], parameters, strict=False))
    if name == "Clip":
        limits = [node.constant(np.array(given[bound], numpy_dtype(value.dtype))) for bound in ("min", "max")]
        return standard(node, name, value, *limits)
    return standard(node, name, value, **given)


@converter("Gelu", domain=MICROSOFT)
def gelu(node: Node) -> Result:
    """Convert Gelu: x times the normal distribution function of x."""
    return as_standard(node, "Gelu")


@converter("BiasGelu", domain=MICROSOFT)
def bias_gelu(node: Node) -> Result:
    """Convert BiasGelu: Gelu(x + bias)."""
    return standard(node, "Gelu", standard(node, "Add", node.input(0), node.input(1)))


@converter("FastGelu", domain=MICROSOFT)
def fast_gelu(node: Node) -> Result:
    """Convert FastGelu: the tanh approximation of Gelu(x + bias)."""
    data, bias = node.input(0), node.optional_input(1)
    biased = data if bias is None else standard(node, "Add", data, bias)
    return standard(node, "Gelu", biased, approximate="tanh")


@converter("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Node) -> Result:
    """Convert QuickGelu: x sigmoid(alpha x)."""
    return standard(node, "Swish", node.input(0), alpha=node.float("alpha", 1.702))


@converter("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(node: Node) -> Result:
    """Convert BiasSplitGelu: the first half of the last axis of x + bias, times Gelu of the second half."""
    biased = standard(node, "Add", node.input(0), node.input(1))
    halves = node.emit_tuple(relax.op.split(biased.expr, 2, axis=-1))
    return standard(node, "Mul", halves[0], standard(node, "Gelu", halves[1]))
