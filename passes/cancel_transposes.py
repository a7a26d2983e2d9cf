"""Transposes moved towards each other, so that they cancel.

A transpose commutes with an elementwise operator: transpose(f(x, y)) = f(transpose(x), transpose(y)). It commutes with
a reshape that splits or merges axes, if it moves the merged or split axes together:
    transpose(reshape(x)) = reshape(transpose(x)).
Both rules fire only where the transpose thereby meets one that it merges with, so that there is one less at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import tvm.ir
from tvm import relax

from passes.base import Dataflow
from passes.rule_pass import RulePass
from passes.simplify_shapes import BROADCASTING, VIEWS, merged_transposes, permutation
from passes.tensor_types import Dimension, equal, is_one, shape_of

UNARY = (
    *(f"relax.{name}" for name in ("abs", "astype", "ceil", "cos", "erf", "exp", "floor", "log", "logical_not")),
    *(f"relax.{name}" for name in ("negative", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "tanh", "isnan")),
    *(f"relax.nn.{name}" for name in ("gelu", "gelu_tanh", "leakyrelu", "relu", "silu")),
)
# How many operators a transpose may move over: an exporter's GELU has eight.
MOST_STEPS = 16


def _towards_transpose(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """transpose(f(x, c)) -> f(transpose(x), transpose(c)) where a transpose is what x comes from."""
    inner = dataflow.call(call.args[0], *UNARY, *BROADCASTING)
    if inner is None or not _meets_transpose(call.args[0], dataflow, MOST_STEPS):
        return None
    axes = permutation(call)
    return tvm.ir.Call(inner.op, [transposed(operand, axes) for operand in inner.args], inner.attrs)


def _meets_transpose(expr: relax.Expr, dataflow: Dataflow, steps: int) -> bool:
    """Return whether what `expr` is computed from elementwise are transposes and constants, with no other readers."""
    if dataflow.call(expr, "relax.permute_dims") is not None:
        return dataflow.read_once(expr)
    call = dataflow.call(expr, *UNARY, *BROADCASTING)
    if call is None or not steps or not dataflow.read_once(expr):
        return False
    # Transposing a constant costs nothing: it is done at compile time.
    moving = [operand for operand in call.args if not isinstance(operand, tvm.ir.GenericConst)]
    full = all(operand.ty.ndim == call.ty.ndim for operand in moving)
    return bool(moving) and full and all(_meets_transpose(operand, dataflow, steps - 1) for operand in moving)


def transposed(operand: relax.Expr, axes: Sequence[int]) -> relax.Expr:
    """Return an operand of an elementwise operator whose result is transposed: its axes count from the last."""
    rank = operand.ty.ndim
    if rank == 0:
        return operand
    missing = len(axes) - rank
    if missing:
        operand = relax.op.expand_dims(operand, list(range(missing)))
    return relax.op.permute_dims(operand, list(axes))


def _over_reshape(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """transpose(reshape(transpose(x))) -> a reshape and one transpose."""
    reshape = dataflow.call(call.args[0], *VIEWS)
    if reshape is None or not dataflow.read_once(call.args[0]):
        return None
    inner = dataflow.call(reshape.args[0], "relax.permute_dims")
    before, after = shape_of(reshape.args[0]), shape_of(reshape)
    if inner is None or before is None or after is None or not dataflow.read_once(reshape.args[0]):
        return None
    groups = aligned_groups(before, after)
    if groups is None:
        return None
    moved = _outer_first(call, reshape, groups)
    return _inner_last(call, inner, groups) if moved is None else moved


Groups = list[tuple[list[int], list[int]]]


def _outer_first(call: tvm.ir.Call, reshape: tvm.ir.Call, groups: Groups) -> relax.Expr | None:
    """transpose(reshape(y)) -> reshape(transpose(y)) where the transpose keeps each group's results together."""
    order = _group_order(permutation(call), [after for _, after in groups])
    if order is None:
        return None
    axes = [axis for group in order for axis in groups[group][0]]
    return relax.op.reshape(relax.op.permute_dims(reshape.args[0], axes), list(call.ty.shape.values))


def _inner_last(call: tvm.ir.Call, inner: tvm.ir.Call, groups: Groups) -> relax.Expr | None:
    """transpose(reshape(transpose(x))) -> transpose(reshape(x)) where the inner one keeps each group together."""
    axes = permutation(inner)
    blocks = [[axes[axis] for axis in before] for before, _ in groups]
    order = _group_order(list(range(len(axes))), blocks)
    if order is None:
        return None
    shape = shape_of(call.args[0])
    assert shape is not None
    # The reshape of x: the groups in the order in which x has them; then each result axis comes from its place there.
    places: dict[int, int] = {}
    split: list[Dimension] = []
    for group in order:
        for axis in groups[group][1]:
            places[axis] = len(split)
            split.append(shape[axis])
    return relax.op.permute_dims(relax.op.reshape(inner.args[0], split), [places[axis] for axis in permutation(call)])


def _group_order(axes: Sequence[int], groups: Sequence[Sequence[int]]) -> list[int] | None:
    """Return the order of groups that `axes` lists one after the other, or None where it mixes them."""
    order: list[int] = []
    position = 0
    while position < len(axes):
        group = next(
            (number for number, members in enumerate(groups) if members and members[0] == axes[position]), None
        )
        if group is None or list(axes[position : position + len(groups[group])]) != list(groups[group]):
            return None
        order.append(group)
        position += len(groups[group])
    return order if len(order) == len(groups) else None


def aligned_groups(before: Sequence[Dimension], after: Sequence[Dimension]) -> Groups | None:
    """Return the axes of two shapes of the same number of elements in groups of provably equal products, or None."""
    left, right = _products(before), _products(after)
    groups: Groups = []
    start, other = 0, 0
    for end in range(1, len(before) + 1):
        meets = next((stop for stop in range(other + 1, len(after) + 1) if equal(left[end - 1], right[stop - 1])), None)
        if meets is not None:
            groups.append((list(range(start, end)), list(range(other, meets))))
            start, other = end, meets
    if not groups or not all(map(is_one, [*before[start:], *after[other:]])):
        return None
    last, others = groups[-1]
    groups[-1] = ([*last, *range(start, len(before))], [*others, *range(other, len(after))])
    return groups


def _products(shape: Sequence[Dimension]) -> list[Dimension]:
    """Return the products of leading dimensions."""
    return list(accumulate(shape, lambda product, dimension: product * dimension))


@dataclass(frozen=True)
class CancelTransposes(RulePass):
    """Move transposes over elementwise operators and reshapes to the transposes before them."""

    name: ClassVar[str] = "cancel-transposes"
    rules: ClassVar = {"relax.permute_dims": (merged_transposes, _towards_transpose, _over_reshape)}
