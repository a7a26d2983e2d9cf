"""Rows whose elements are computed by turns, whole groups of which are read as they lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import ir, te, tirx

from optimizer import code_generation
from schedules import schedule_function
from tests.schedules.execution import TARGET, normal

Element = Callable[[te.Tensor, tirx.Var, tirx.Var], ir.Expr]


def _by_turns(period: int, *elements: Element) -> Element:
    """Return the element of a row that is `elements[k]` where the remainder of its position is k."""

    def element(x: te.Tensor, row: tirx.Var, column: tirx.Var) -> ir.Expr:
        value = elements[-1](x, row, column)
        for place in range(period - 1):
            value = tirx.if_then_else(
                tirx.EQ(tirx.floormod(column, period), place), elements[place](x, row, column), value
            )
        return value

    return element


_SWAPPED = _by_turns(2, lambda x, r, c: x[r, c + 1] * x[r, c], lambda x, r, c: x[r, c - 1] - x[r, c])
_ODD = _by_turns(2, lambda x, r, c: x[r, c + 1], lambda x, r, c: x[r, c] * 2.0)
_THREE = _by_turns(
    3, lambda x, r, c: x[r, c + 2], lambda x, r, c: x[r, c - 1] + x[r, c], lambda x, r, c: x[r, c] + x[r, c - 2]
)


def _shuffles(function: tirx.PrimFunc) -> int:
    found: list[tirx.Shuffle] = []
    tvm_ffi.structural_walk(function.body, (tirx.Shuffle, found.append))
    return len(found)


def _scheduled(element: Element, width: int, dtype: str) -> tirx.PrimFunc:
    x = te.placeholder((5, width), dtype, name="x")
    function = te.create_prim_func([x, te.compute((5, width), lambda r, c: element(x, r, c).astype(dtype))])
    return schedule_function(function.with_attr("tirx.noalias", True), TARGET)[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pairs", [1, 16, 37])
def test_pairs_are_right(pairs: int, dtype: str) -> None:
    function = _scheduled(_SWAPPED, 2 * pairs, dtype)
    assert (_shuffles(function) > 0) == (pairs > 1)
    with TARGET.tvm_target() as target, code_generation.options(TARGET):
        run = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
    x = normal(5, 2 * pairs, dtype=dtype)
    result = tvm.runtime.tensor(np.zeros_like(x))
    run["main"](tvm.runtime.tensor(x), result)
    first, second = x[:, 0::2].astype(np.float32), x[:, 1::2].astype(np.float32)
    expected = np.stack([second * first, first - second], -1).reshape(x.shape).astype(dtype)
    np.testing.assert_allclose(result.numpy(), expected, rtol=float(np.finfo(dtype).eps))


@pytest.mark.parametrize(("element", "width", "takes_groups"), [(_THREE, 48, True), (_ODD, 32, False)])
def test_groups_are_read_whole_where_all_of_them_is_read(element: Element, width: int, takes_groups: bool) -> None:
    assert (_shuffles(_scheduled(element, width, "float32")) > 0) == takes_groups
