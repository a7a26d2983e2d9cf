"""How far outputs may differ from a reference, derived from the model's arithmetic.

An output's error is measured relative to the largest magnitude of the reference output, or to the dtype's smallest
normal number where that is larger. For a value that passes through D operators in a row, each rounding to unit roundoff
u and summing K terms in float32 (u32), errors that behave like random walks grow as sqrt(D) * (u + sqrt(K) * u32)
(Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019). The
tolerance is sixteen times that, which leaves room for polynomial approximations of exp, tanh and erf and for modest
amplification, but never more than sqrt(u): at least half of the significant digits must agree. An output that has only
numbers below the smallest normal one may be off by that number, since machines may give zero for them (not in fp16).
Integers and booleans must be equal. Only a model that quantizes, and so rounds numbers that may lie on a tie, may be
one step off in its 8-bit outputs, and has the unit roundoff of an 8-bit grid in its floating-point outputs. So has a
model compiled to products of int8 activations with quantized weights. Where a quantized model of many layers amplifies
changes of codes, onnxruntime with its graph optimizations differs from itself without them, and from itself with the
next numbers for all scales; outputs may then be as far off as that, up to four tolerances. Where a run reads keys and
values from codes of b bits, its outputs have the unit roundoff of a b-bit grid. Operators that read images at computed
positions (GridSample, Resize, RoiAlign) round these to u32 times the image's size L: a position takes about two
roundings, and neighbours differ by twice the largest value at most, so that outputs may be off by 4 L u32 more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from optimizer.certificate.inferred_shapes import Shape, inferred_shapes

_UNIT_ROUNDOFF: dict[int, float] = {
    onnx.TensorProto.DOUBLE: 2.0**-53,
    onnx.TensorProto.FLOAT: 2.0**-24,
    onnx.TensorProto.FLOAT16: 2.0**-11,
    onnx.TensorProto.BFLOAT16: 2.0**-8,
}
_BY_NAME = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SUMMING_ROUNDOFF = 2.0**-24
_GRID_ROUNDOFF = 2.0**-8
_ALLOWANCE = 16.0
_QUANTIZING = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QAttention", "QGemm")
_INTERPOLATING = frozenset({"GridSample", "Resize", "RoiAlign", "Upsample"})
_POSITION_ALLOWANCE = 4.0
_EXACT = frozenset({
    "Abs", "And", "Cast", "Concat", "Constant", "ConstantOfShape", "Equal", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Greater", "Identity", "Less", "Max", "MaxPool", "Min", "Neg", "Not", "Or", "Pad",
    "Relu", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """What decides a model's rounding errors: operators in a row, terms of a sum, unit roundoff, quantization.

    `positions` is the size of the largest image that is read at computed positions, 0 if none is.
    """

    depth: int
    terms: int
    unit_roundoff: float
    quantizes: bool
    positions: int = 0

    def tolerance(self, dtype: str) -> float:
        """Return the largest acceptable error of an output: relative for floats, in steps for integers."""
        if dtype not in _BY_NAME:
            return 1.0 if self.quantizes and dtype in ("int8", "uint8") else 0.0
        roundoff = max(self.unit_roundoff, _BY_NAME[dtype], _GRID_ROUNDOFF if self.quantizes else 0.0)
        summing = min(_SUMMING_ROUNDOFF, roundoff)
        growth = math.sqrt(self.depth) * (roundoff + math.sqrt(self.terms) * summing)
        return min(_ALLOWANCE * growth + _POSITION_ALLOWANCE * self.positions * summing, math.sqrt(roundoff))


def with_codes(arithmetic: Arithmetic, bits: int) -> Arithmetic:
    """Return the arithmetic of a run that reads some numbers from codes of `bits`."""
    return replace(arithmetic, unit_roundoff=max(arithmetic.unit_roundoff, 2.0**-bits))


def arithmetic(
    model: onnx.ModelProto,
    precision: str | None = None,
    activations: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Arithmetic:
    """Return the arithmetic of a model.

    `precision` names the dtype that it was compiled to compute in, if coarser, and `activations` is "int8" where its
    products round theirs. `shapes` are those of the inputs, where the model leaves them open.
    """
    stored = _only_stored(model.graph)
    used = {tensor.data_type for tensor in model.graph.initializer if tensor.name not in stored}
    used |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    known = [_UNIT_ROUNDOFF[kind] for kind in used if kind in _UNIT_ROUNDOFF]
    roundoff = max([*known, _BY_NAME.get(precision or "", 0.0)], default=_SUMMING_ROUNDOFF)
    operators = {node.op_type for node in model.graph.node}
    quantizes = activations == "int8" or any(name in _QUANTIZING or name.startswith("QLinear") for name in operators)
    positions = _positions(model, shapes) if operators & _INTERPOLATING else 0
    return Arithmetic(_depth(model.graph), _terms(model.graph), roundoff or _SUMMING_ROUNDOFF, quantizes, positions)


def _positions(model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None) -> int:
    """Return the largest size of an axis of an image that is read at computed positions."""
    shapes = inferred_shapes(model, given)
    sizes = [size for node in model.graph.node for size in _sizes_read(node, shapes) if size is not None]
    return max(sizes, default=0)


def _sizes_read(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> Shape:
    if node.op_type not in _INTERPOLATING:
        return ()
    image, result = (shapes.get(name, ()) for name in (node.input[0], node.output[0]))
    if node.op_type in ("GridSample", "RoiAlign"):
        return image[2:]
    return tuple(size for size, new in itertools.zip_longest(image, result[: len(image)]) if size != new)


def _only_stored(graph: onnx.GraphProto) -> set[str]:
    """Return the initializers that are read by Cast alone: their type is one of storage, not of arithmetic."""
    computed = {name for node in graph.node if node.op_type != "Cast" for name in node.input}
    return {tensor.name for tensor in graph.initializer} - computed


def _depth(graph: onnx.GraphProto) -> int:
    """Return how many rounding operators lie in a row on the longest path."""
    depths: dict[str, int] = {}
    for node in graph.node:
        depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type not in _EXACT)
        depths.update(dict.fromkeys(node.output, depth))
    return max(1, *depths.values()) if depths else 1


def _terms(graph: onnx.GraphProto) -> int:
    """Return the most terms that a product with a constant matrix or filter sums."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return max((count for node in graph.node for count in _summed(node, shapes)), default=1)


def _summed(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> Iterator[int]:
    for name in node.input:
        shape = shapes.get(name, ())
        if len(shape) < 2:
            continue
        if node.op_type.startswith(("Conv", "QLinearConv", "FusedConv")):
            yield math.prod(shape) // max(1, min(shape[:2]))
        elif "MatMul" in node.op_type or "Gemm" in node.op_type or node.op_type in ("LSTM", "GRU", "RNN"):
            yield max(shape[-2:])
