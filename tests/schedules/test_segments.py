from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, te, tirx
from tvm.relax import op

from schedules.access import branches_on
from schedules.segments import MOST_SEGMENTS, phases, segments
from schedules.stage_parsing import parse
from schedules.stages import Stage
from tests.schedules.execution import normal, run


def _stage(value: te.Tensor, *inputs: te.Tensor) -> Stage:
    staged = parse(te.create_prim_func([*inputs, value]))
    assert staged is not None
    (stage,) = staged.stages
    assert isinstance(stage, Stage)
    return stage


@pytest.mark.parametrize(
    ("condition", "borders"),
    [
        (lambda i: i < 5, [0, 5, 20]),
        (lambda i: i <= 5, [0, 6, 20]),
        (lambda i: i > 5, [0, 6, 20]),
        (lambda i: i >= 5, [0, 5, 20]),
        (lambda i: tirx.And(i >= 3, i < 17), [0, 3, 17, 20]),
        (lambda i: i < 30, [0, 20]),
    ],
)
def test_a_row_is_cut_where_a_comparison_changes(condition, borders: list[int]) -> None:
    x, y = te.placeholder((4, 20), name="x"), te.placeholder((4, 20), name="y")
    stage = _stage(te.compute((4, 20), lambda r, i: tirx.if_then_else(condition(i), x[r, i], y[r, i])), x, y)
    parts = segments(stage, stage.spatial[-1])
    assert [part.begin for part in parts] + [parts[-1].end] == borders
    assert not any(part.conditional for part in parts)
    assert not any(branches_on(part.stage.value, stage.spatial[-1]) for part in parts)


def test_what_the_data_decide_is_left_a_condition() -> None:
    x, y = te.placeholder((4, 20), name="x"), te.placeholder((4, 20), dtype="int64", name="y")
    stage = _stage(te.compute((4, 20), lambda r, i: tirx.if_then_else(i < y[r, i], x[r, i], 0.0)), x, y)
    (part,) = segments(stage, stage.spatial[-1])
    assert part.conditional


def test_many_parts_are_left_in_one() -> None:
    x = te.placeholder((4, 40), name="x")

    def value(row: tirx.Var, column: tirx.Var) -> tirx.Expr:
        result = x[row, column]
        for bound in range(1, MOST_SEGMENTS + 2):
            result = tirx.if_then_else(column < bound, x[row, column] * float(bound), result)
        return result

    stage = _stage(te.compute((4, 40), value), x)
    assert [(part.begin, part.end) for part in segments(stage, stage.spatial[-1])] == [(0, 40)]


def _by_turns(width: int, period: int) -> Stage:
    x, y = te.placeholder((4, width), name="x"), te.placeholder((4, width), name="y")

    def value(row: tirx.Var, column: tirx.Var) -> tirx.Expr:
        is_first = tirx.EQ(tirx.floormod(column, period), 0)
        return tirx.if_then_else(is_first, x[row, column], y[row, column - 1])

    return _stage(te.compute((4, width), value), x, y)


@pytest.mark.parametrize(("width", "period", "places"), [(20, 2, 2), (21, 3, 3), (21, 2, 0), (20, 5, 0)])
def test_a_remainder_is_decided_for_each_place_of_a_short_period(width: int, period: int, places: int) -> None:
    stage = _by_turns(width, period)
    parts = phases(stage, stage.spatial[-1])
    assert len(parts) == places
    assert [[load.source.name for load in part.loads()] for part in parts] == [["x"], *[["y"]] * (places - 1)][:places]


@pytest.mark.parametrize("width", [2, 30, 64, 66])
def test_rotated_halves_are_right(width: int) -> None:
    def rotated(x: relax.Expr, c: relax.Expr) -> relax.Expr:
        low = op.strided_slice(x, [1], [0], [width // 2])
        high = op.strided_slice(x, [1], [width // 2], [width])
        return op.add(x, op.multiply(op.concat([op.negative(high), low], axis=1), c))

    x, c = normal(5, width), normal(5, width, seed=1)
    got, families = run(rotated, [x, c])
    half = width // 2
    expected = x + np.concatenate([-x[:, half:], x[:, :half]], axis=1) * c
    # Product and sum may be rounded once instead of twice.
    np.testing.assert_allclose(got, expected, rtol=0, atol=float(np.finfo("float32").eps * np.abs(x).max() * 4))
    assert families == {"elementwise"}
