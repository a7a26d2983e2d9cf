"""Reductions over axes, known when the model is compiled or only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.precision import HALF_TYPES, is_float
from optimizer.frontend.converters.runtime_axes import shape_of_chosen, shape_with_ones, shape_without
from optimizer.frontend.dimensions import product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value, integer_value

Map = Callable[[relax.Expr], relax.Expr]
Reducer = Callable[..., te.Tensor]


def _identity(x: relax.Expr) -> relax.Expr:
    return x


def _square(x: relax.Expr) -> relax.Expr:
    return relax.op.multiply(x, x)


@dataclass(frozen=True)
class _Reduction:
    """`after(reduce(before(x)))`. `reducer` is the same reduction in the tensor expression language.

    `identity` is the result for no elements, by dtype.
    """

    reduce: Callable[..., relax.Expr]
    reducer: Reducer
    identity: Callable[[str], float | int]
    before: Map = _identity
    after: Map = _identity


def _least(dtype: str) -> float | int:
    return float("-inf") if is_float(dtype) else int(np.iinfo(dtype).min)


def _greatest(dtype: str) -> float | int:
    return float("inf") if is_float(dtype) else int(np.iinfo(dtype).max)


def _zero(_: str) -> int:
    return 0


def _one(_: str) -> int:
    return 1


# TVM's own max and min start from the largest finite number, which is wrong where all elements are infinite. The
# reducers are built from the argument names of a lambda, so tirx.max itself does not do.
_MAXIMUM = te.comm_reducer(lambda x, y: tirx.max(x, y), lambda dtype: tirx.const(_least(str(dtype)), dtype))  # noqa: PLW0108
_MINIMUM = te.comm_reducer(lambda x, y: tirx.min(x, y), lambda dtype: tirx.const(_greatest(str(dtype)), dtype))  # noqa: PLW0108
_PRODUCT = te.comm_reducer(lambda x, y: x * y, lambda dtype: tirx.const(1, dtype))
_REDUCTIONS = {
    "ReduceL1": _Reduction(relax.op.sum, te.sum, _zero, before=relax.op.abs),
    "ReduceL2": _Reduction(relax.op.sum, te.sum, _zero, before=_square, after=relax.op.sqrt),
    "ReduceLogSum": _Reduction(relax.op.sum, te.sum, _zero, after=relax.op.log),
    "ReduceMax": _Reduction(relax.op.max, _MAXIMUM, _least),
    "ReduceMin": _Reduction(relax.op.min, _MINIMUM, _greatest),
    "ReduceProd": _Reduction(relax.op.prod, _PRODUCT, _one),
    "ReduceSum": _Reduction(relax.op.sum, te.sum, _zero),
    "ReduceSumSquare": _Reduction(relax.op.sum, te.sum, _zero, before=_square),
}
_EXTREMA = ("ReduceMax", "ReduceMin")


@dataclass(frozen=True)
class _Axes:
    """What a node reduces over: `known` axes, or those in the tensor `computed`."""

    known: tuple[int, ...]
    computed: Value | None = None


def _register(operator: str) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        return _converted(node, operator)


def _converted(node: Node, operator: str) -> Result:
    value, axes, reduction = node.input(), _axes(node), _REDUCTIONS[operator]
    dtype = value.dtype
    if operator in _EXTREMA:
        wide = "uint8" if dtype == "bool" else dtype
    else:
        wide = "float32" if dtype in HALF_TYPES else dtype
    if reduction.after is not _identity and not is_float(dtype):
        wide = "float64"
    data = _as_type(node, value, wide)
    data = node.emit(reduction.before(data.expr))
    if axes is not None:
        data = _reduced(node, data, axes, reduction)
    return _as_type(node, node.emit(reduction.after(data.expr)), dtype)


@converter("ReduceMean")
def reduce_mean(node: Node) -> Result:
    """Convert ReduceMean: the sum over the number of elements, truncated for integers."""
    value, axes = node.input(), _axes(node)
    if axes is None:
        return value
    dtype = "float32" if value.dtype in HALF_TYPES else value.dtype
    data = _as_type(node, value, dtype)
    if axes.computed is None and is_float(dtype):
        mean = node.emit(relax.op.mean(data.expr, list(axes.known), bool(node.integer("keepdims", 1))))
        return _as_type(node, mean, value.dtype)
    total = _reduced(node, data, axes, _REDUCTIONS["ReduceSum"])
    count = _element_count(node, value, axes)
    return _as_type(node, node.emit(relax.op.divide(total.expr, _as_type(node, count, dtype).expr)), value.dtype)


def _element_count(node: Node, value: Value, axes: _Axes) -> Value:
    """Return how many elements each result is made of, as an int64 tensor of rank 0."""
    if axes.computed is None:
        count = product(value.shape[axis] for axis in axes.known)
        array = np.empty((), dtype=object)
        array[()] = count
        return integer_value(array, "int64", node.graph.builder)
    lengths = node.compute(shape_of_chosen, node.dimensions(value), axes.computed.expr)
    return node.emit(relax.op.prod(lengths.expr))


@converter("ReduceLogSumExp")
def reduce_log_sum_exp(node: Node) -> Result:
    """Convert ReduceLogSumExp, with the greatest element taken out of the sum so that nothing overflows."""
    value, axes = node.input(), _axes(node)
    if axes is None:
        return value
    wide = "float64" if value.dtype in ("float64", "int64", "uint64") else "float32"
    data = _as_type(node, value, wide)
    peak = _reduced(node, data, axes, _REDUCTIONS["ReduceMax"], keep_dimensions=True)
    # An infinite peak would give inf - inf.
    finite = relax.op.where(relax.op.isinf(peak.expr), node.scalar(0, wide), peak.expr)
    shift = node.emit(finite)
    exponentials = node.compute(_shifted_exponentials, data.expr, shift.expr)
    total = _reduced(node, exponentials, axes, _REDUCTIONS["ReduceSum"])
    if shift.rank != total.rank:
        shift = node.emit(relax.op.reshape(shift.expr, list(total.shape)))
    logarithm = node.emit(relax.op.log(total.expr))
    return _as_type(node, node.emit(relax.op.add(*node.broadcast_operands(logarithm, shift))), value.dtype)


def _shifted_exponentials(data: te.Tensor, shift: te.Tensor) -> te.Tensor:
    """Return exp(data - shift), where each dimension of `shift` is 1 or that of the data."""

    def element(*index: tirx.Var) -> tvm.ir.Expr:
        at = [tirx.min(i, extent - 1) for i, extent in zip(index, shift.shape, strict=True)]
        return tirx.exp(data[index] - shift(*at))

    return te.compute(data.shape, element, name="shifted_exponentials")


def _axes(node: Node) -> _Axes | None:
    """Return what to reduce over, or None if nothing is."""
    value = node.input()
    given = node.optional_input(1)
    every = tuple(range(value.rank))
    if not node.has_attribute("axes") and given is not None and given.constant is None and given.shape != (0,):
        node.vector_length(1)
        return _Axes((), given)
    known = None if given is not None and given.shape == (0,) else node.axes_argument()
    if not known:
        return None if node.integer("noop_with_empty_axes", 0) else _Axes(every)
    return _Axes(tuple(known))


def _reduced(
    node: Node, data: Value, axes: _Axes, reduction: _Reduction, keep_dimensions: bool | None = None
) -> TensorValue:
    keep = bool(node.integer("keepdims", 1)) if keep_dimensions is None else keep_dimensions
    if axes.computed is not None:
        return _reduced_at_run_time(node, data, axes.computed, reduction, keep)
    if not axes.known:
        return node.emit(data.expr)
    if any(isinstance(data.shape[axis], int) and data.shape[axis] == 0 for axis in axes.known):
        shape = [1 if axis in axes.known else extent for axis, extent in enumerate(data.shape)]
        if not keep:
            shape = [extent for axis, extent in enumerate(data.shape) if axis not in axes.known]
        return node.emit(relax.op.broadcast_to(node.scalar(reduction.identity(data.dtype), data.dtype), shape))
    if is_float(data.dtype) and reduction.reducer in (_MAXIMUM, _MINIMUM):
        return node.compute(lambda tensor: _reduced_over(tensor, reduction.reducer, axes.known, keep), data.expr)
    return node.emit(reduction.reduce(data.expr, list(axes.known), keep))


def _reduced_over(tensor: te.Tensor, reducer: Reducer, axes: tuple[int, ...], keep: bool) -> te.Tensor:
    loops = {axis: te.reduce_axis((0, tensor.shape[axis]), f"r{axis}") for axis in axes}
    kept = [axis for axis in range(len(tensor.shape)) if keep or axis not in loops]

    def element(*index: tirx.Var) -> tvm.ir.Expr:
        place = {**dict(zip(kept, index, strict=True)), **loops}
        return reducer(tensor(*(place[axis] for axis in range(len(tensor.shape)))), axis=list(loops.values()))

    shape = [1 if axis in loops else tensor.shape[axis] for axis in kept]
    return te.compute(shape, element, name="reduced")


def _reduced_at_run_time(node: Node, data: Value, axes: Value, reduction: _Reduction, keep: bool) -> TensorValue:
    """Reduce over axes that are chosen when the module runs: all axes are looped over, the others once."""
    shape = node.dimensions(data)
    kept = node.compute_shape(shape_with_ones, shape, axes.expr)
    lengths = node.compute_shape(shape_of_chosen, shape, axes.expr)

    def reduced(tensor: te.Tensor, *counts: tirx.Var) -> te.Tensor:
        loops = [te.reduce_axis((0, count), f"r{axis}") for axis, count in enumerate(counts)]

        def element(*index: tirx.Var) -> tvm.ir.Expr:
            # One of the two loops over an axis makes a single step, at 0.
            return reduction.reducer(tensor(*(i + r.var for i, r in zip(index, loops, strict=True))), axis=loops)

        return te.compute(kept, element, name="reduced")

    if 0 in data.shape:
        result = node.emit(relax.op.broadcast_to(node.scalar(reduction.identity(data.dtype), data.dtype), kept))
    else:
        result = node.compute(reduced, data.expr, *lengths)
    if keep:
        return result
    return node.emit(relax.op.reshape(result.expr, node.compute_shape(shape_without, shape, axes.expr)))


def _as_type(node: Node, value: Value, dtype: str) -> Value:
    return value if value.dtype == dtype else node.emit(relax.op.astype(value.expr, dtype))


for _operator in _REDUCTIONS:
    _register(_operator)
