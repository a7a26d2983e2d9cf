"""Operators that move or repeat nothing, or do in two steps what one can do.

No-ops: a reshape, transpose, slice, pad, expand or tile whose result is its operand. Chains: views (reshape,
expand_dims, squeeze, flatten) of views, expands of expands, transposes of transposes, concatenations of concatenations
along the same axis. A concatenation of a tensor with itself along an axis of length 1 is an expand. A view that only
inserts axes of length 1 is an expand_dims, one that only drops them a squeeze. An operand of an elementwise operator
needs no expand where the operator itself broadcasts it to the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import tvm.ir
from tvm import relax, tirx

from passes.base import Dataflow
from passes.rule_pass import RulePass
from passes.tensor_types import Dimension, dtype_of, equal, equal_shapes, is_one, same_type, shape_of

VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
BROADCASTING = (
    *(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "where")),
    *(f"relax.{name}" for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")),
    *(f"relax.{name}" for name in ("logical_and", "logical_or", "logical_xor", "floor_divide", "mod", "floor_mod")),
)


def view(data: relax.Expr, shape: Sequence[Dimension]) -> relax.Expr:
    """Return `data` with `shape`: itself, with axes of length 1 inserted or dropped, or reshaped.

    A 0 in the shape of a reshape stands for the operand's own dimension; where that is another, no elements are written
    anew.
    """
    own = shape_of(data)
    if own is None:
        return relax.op.reshape(data, list(shape))
    if equal_shapes(own, shape):
        return data
    inserted = _inserted_units(own, shape)
    if inserted is not None:
        return relax.op.expand_dims(data, inserted)
    dropped = _inserted_units(shape, own)
    if dropped is not None:
        return relax.op.squeeze(data, dropped)
    if any(equal(dimension, 0) and not equal(was, 0) for was, dimension in zip_longest([*own], shape, fillvalue=1)):
        return relax.op.zeros(list(shape), dtype_of(data) or "")
    return relax.op.reshape(data, list(shape))


def _inserted_units(short: Sequence[Dimension], long: Sequence[Dimension]) -> list[int] | None:
    """Return the axes of length 1 that make `long` of `short`, or None if more than that differs."""
    inserted: list[int] = []
    position = 0
    for axis, dimension in enumerate(long):
        if position < len(short) and equal(short[position], dimension):
            position += 1
        elif is_one(dimension):
            inserted.append(axis)
        else:
            return None
    return inserted if position == len(short) else None


def _no_op(call: tvm.ir.Call, _: Dataflow) -> relax.Expr | None:
    """op(x) -> x where the types are the same, for operators that are then the identity."""
    return call.args[0] if same_type(call, call.args[0]) else None


def _simplest_view(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """view(view(x)) -> view(x), and each view in its simplest form."""
    shape = shape_of(call)
    if shape is None:
        return None
    source = call.args[0]
    inner = dataflow.call(source, *VIEWS)
    if inner is not None and shape_of(inner.args[0]) is not None:
        return view(inner.args[0], shape)
    simplest = view(source, shape)
    if isinstance(simplest, tvm.ir.Call) and simplest.op.name in (call.op.name, "relax.reshape"):
        return None
    return simplest


def _expand_of_expand(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """broadcast_to(broadcast_to(x)) -> broadcast_to(x)."""
    inner = dataflow.call(call.args[0], "relax.broadcast_to")
    return None if inner is None else relax.op.broadcast_to(inner.args[0], call.args[1])


def permutation(call: tvm.ir.Call) -> list[int]:
    """Return the axes of a permute_dims, as non-negative numbers."""
    rank = call.args[0].ty.ndim
    if call.attrs.axes is None:
        return list(range(rank))[::-1]
    return [int(axis) % rank for axis in call.attrs.axes]


def merged_transposes(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """permute_dims(permute_dims(x)) -> permute_dims(x)."""
    inner = dataflow.call(call.args[0], "relax.permute_dims")
    if inner is None:
        return None
    first = permutation(inner)
    axes = [first[axis] for axis in permutation(call)]
    return inner.args[0] if axes == sorted(axes) else relax.op.permute_dims(inner.args[0], axes)


def _unmoving_transpose(call: tvm.ir.Call, _: Dataflow) -> relax.Expr | None:
    """permute_dims(x) -> a view of x where only axes of length 1 move."""
    shape, target = shape_of(call.args[0]), shape_of(call)
    if shape is None or target is None:
        return None
    moved = [axis for axis in permutation(call) if not is_one(shape[axis])]
    return view(call.args[0], target) if moved == sorted(moved) else None


def _whole_slice(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """strided_slice(x) -> x where every axis is taken forwards and whole."""
    strides = call.args[4] if len(call.args) > 4 else []
    forwards = all(isinstance(stride, tirx.IntImm) and int(stride) > 0 for stride in strides)
    return _no_op(call, dataflow) if forwards else None


def _empty_pad(call: tvm.ir.Call, _: Dataflow) -> relax.Expr | None:
    """pad(x) -> x where nothing is added or cut off."""
    return None if any(int(width) for width in call.attrs.pad_width) else call.args[0]


def _concat(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """concat((x,)) -> x; concat((concat((x, y)), z)) -> concat((x, y, z)) along the same axis."""
    operands = call.args[0]
    if not isinstance(operands, relax.Tuple) or call.attrs.axis is None:
        return None
    if len(operands.fields) == 1:
        return operands.fields[0]
    flat: list[relax.Expr] = []
    for operand in operands.fields:
        inner = dataflow.call(operand, "relax.concat")
        joined = inner is not None and _axis(inner) == _axis(call) and dataflow.read_once(operand)
        flat.extend(inner.args[0].fields if inner is not None and joined else [operand])
    return None if len(flat) == len(operands.fields) else relax.op.concat(flat, int(call.attrs.axis))


def _repetition(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """concat((x, x)) -> broadcast_to(x) along an axis of which x has one element: heads repeated for their queries."""
    axis, shape = _axis(call), shape_of(call)
    fields = [] if axis is None else [dataflow.producer(field) for field in call.args[0].fields]
    if axis is None or shape is None or len(fields) < 2 or not all(field.same_as(fields[0]) for field in fields):
        return None
    own = shape_of(call.args[0].fields[0])
    return relax.op.broadcast_to(call.args[0].fields[0], shape) if own is not None and is_one(own[axis]) else None


def _axis(call: tvm.ir.Call) -> int | None:
    if call.attrs.axis is None or not isinstance(call.args[0], relax.Tuple):
        return None
    return int(call.attrs.axis) % call.ty.ndim


def _implied_expand(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """f(broadcast_to(x), y) -> f(x, y) where f itself broadcasts x to the same shape."""
    result = shape_of(call)
    if result is None:
        return None
    for position, operand in enumerate(call.args):
        expand = dataflow.call(operand, "relax.broadcast_to")
        if expand is None:
            continue
        others = [other for index, other in enumerate(call.args) if index != position]
        if _covers([expand.args[0], *others], result):
            operands = list(call.args)
            operands[position] = expand.args[0]
            return tvm.ir.Call(call.op, operands, call.attrs)
    return None


def _covers(operands: Sequence[relax.Expr], result: Sequence[Dimension]) -> bool:
    """Return whether broadcasting the operands together gives `result`, provably."""
    covered = [False] * len(result)
    for operand in operands:
        shape = shape_of(operand)
        if shape is None:
            return False
        for axis, dimension in enumerate(shape, len(result) - len(shape)):
            if equal(dimension, result[axis]):
                covered[axis] = True
            elif not is_one(dimension):
                return False
    return all(covered)


@dataclass(frozen=True)
class SimplifyShapes(RulePass):
    """Remove operators that change neither values nor their order, and merge chains of those that change shapes."""

    name: ClassVar[str] = "simplify-shapes"
    rules: ClassVar = {
        **dict.fromkeys(VIEWS, (_no_op, _simplest_view)),
        **dict.fromkeys(BROADCASTING, (_implied_expand,)),
        "relax.broadcast_to": (_no_op, _expand_of_expand),
        "relax.tile": (_no_op,),
        "relax.permute_dims": (merged_transposes, _unmoving_transpose),
        "relax.strided_slice": (_whole_slice,),
        "relax.nn.pad": (_empty_pad,),
        "relax.concat": (_concat, _repetition),
    }
