"""Exponentials of a block of logits, less the largest so far: what weighs values, and their sum.

Where a logit is a score times a constant, scores are kept as they are: one multiply-add makes of each what two is
raised to, s c log2(e) - m c log2(e). Where weights are rounded to pairs of bfloat16, they are so in registers.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_products import FLOAT, ZERO, Task
from schedules.intrin.bf16_pairs import PAIR
from schedules.intrin.power_of_two import EXP2, EXP2_TO_ROUND
from schedules.intrin.vector_math import LN2, LOG2_E, exp_of_nonpositive
from schedules.loops import Extent, index, load, local, loop, store, unrolled, vector, with_local
from schedules.stages import sequence


def subtrahend(task: Task) -> Var:
    """Return the buffer of what is subtracted from each exponent of a query."""
    return task.bound if _fuses_scale(task) else task.largest


def updated(task: Task) -> list[Stmt]:
    """Return the steps that make the subtrahend of the largest logits."""
    if not _fuses_scale(task):
        return []
    return [vector(task.queries, lambda v: store(task.bound, load(task.largest, [v]) * _exponent_of_score(task), [v]))]


def factor(task: Task, before: Expr, after: Expr) -> Expr:
    """Return the exponential of what the subtrahend was before, less what it is now."""
    difference = before - after
    if _fuses_scale(task):
        difference = difference * tirx.const(LN2, FLOAT)
    elif task.scale is not None:
        difference = difference * tirx.const(task.scale, FLOAT)
    return exp_of_nonpositive(difference)


def exponentials(task: Task, extent: Extent) -> Stmt:
    """Return the exponentials of `extent` keys, and their sum: in their place, or with `pairs` in `rounded`."""
    if task.pairs is None:
        return loop(
            extent, lambda key: _over_lanes(task, lambda first: _row(task, key, first, (task.weights, [key], first)))
        )
    whole = loop(_half(extent), lambda number: _over_lanes(task, lambda first: _pair(task, number, first, PAIR)))
    if isinstance(extent, int) and extent % PAIR == 0:
        return whole
    last = _over_lanes(task, lambda first: _pair(task, index(_half(extent)), first, 1))
    if isinstance(extent, int):
        return sequence([whole, last]) if extent > 1 else last
    return sequence([whole, tirx.IfThenElse(tirx.floormod(extent, index(PAIR)).equal(1), last, None)])


def _over_lanes(task: Task, part: Callable[[Expr], Stmt]) -> Stmt:
    """Return `part` for each vector of queries: LLVM takes vectors of two registers apart where one is read again."""
    return unrolled(task.queries // task.lanes, lambda number: part(number * task.lanes))


def _half(extent: Extent) -> Extent:
    return extent // PAIR if isinstance(extent, int) else tirx.floordiv(extent, index(PAIR))


def _pair(task: Task, number: Expr, first: Expr, keys: int) -> Stmt:
    """Return the rounded weights of two keys, of which the second weighs nothing where `keys` is 1."""
    assert task.pairs is not None
    assert task.rounded is not None
    held = local([PAIR, task.lanes], FLOAT, "held")
    rows = [_row(task, number * PAIR + key, first, (held, [index(key)], index(0))) for key in range(keys)]
    nothing = [vector(task.lanes, lambda v: store(held, ZERO, [index(1), v]))] if keys < PAIR else []
    whole = tirx.Ramp(index(0), index(1), task.lanes)
    both = task.pairs.dot.alternating(*(load(held, [index(key), whole]) for key in range(PAIR)))
    return with_local([held], [*rows, *nothing, store(task.rounded, both, [number, _lanes(task, first)])])


def _row(task: Task, key: Expr, first: Expr, place: tuple[Var, list[Expr], Expr]) -> Stmt:
    """Return the exponentials of a key for a vector of queries, stored from a place on, and added to their sums."""
    buffer, row, start = place

    def add(v: Expr) -> Stmt:
        return store(task.total, load(task.total, [first + v]) + load(buffer, [*row, start + v]), [first + v])

    def portable(v: Expr) -> Stmt:
        difference = load(task.weights, [key, first + v]) - load(task.largest, [first + v])
        if task.scale is not None:
            difference = difference * tirx.const(task.scale, FLOAT)
        return store(buffer, exp_of_nonpositive(difference, to_round=task.pairs is not None), [*row, start + v])

    if task.powers is None or task.powers.lanes != task.lanes:
        return sequence([vector(task.lanes, portable), vector(task.lanes, add)])
    value = task.powers.of(_exponents(task, key, first), EXP2 if task.pairs is None else EXP2_TO_ROUND)
    return sequence([store(buffer, value, [*row, _lanes(task, start)]), vector(task.lanes, add)])


def _exponents(task: Task, key: Expr, first: Expr) -> Expr:
    """Return what 2 is raised to for a vector of queries."""
    logits, less = load(task.weights, [key, _lanes(task, first)]), load(subtrahend(task), [_lanes(task, first)])
    if _fuses_scale(task):
        return logits * _exponent_of_score(task) - less
    return (logits - less) * tirx.const(LOG2_E, FLOAT)


def _lanes(task: Task, first: Expr) -> Expr:
    return tirx.Ramp(first, index(1), task.lanes)


def _fuses_scale(task: Task) -> bool:
    return task.scale is not None and task.powers is not None and task.powers.lanes == task.lanes


def _exponent_of_score(task: Task) -> Expr:
    assert task.scale is not None
    return tirx.const(task.scale * LOG2_E, FLOAT)
