from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from passes.cancel_transposes import CancelTransposes, aligned_groups
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run


def _transposes(module) -> int:
    return operators(module).count("relax.permute_dims")


def _dims(x: relax.Expr) -> list:
    return list(x.ty.shape.values)


_CANCELLING = {
    "over one elementwise operator": (
        lambda x: op.permute_dims(op.nn.gelu(op.permute_dims(x, [0, 2, 3, 1])), [0, 3, 1, 2]),
        (2, 3, 4, 5),
        0,
    ),
    "over a chain with constants": (
        lambda x: op.permute_dims(
            op.multiply(
                op.add(op.permute_dims(x, [0, 2, 1]), relax.const(np.arange(3, dtype="float32"))), relax.const(2.0)
            ),
            [0, 2, 1],
        ),
        ("n", 3, 4),
        1,  # of the constant, which is folded
    ),
    "over a merge of axes": (
        lambda x: op.permute_dims(op.reshape(op.permute_dims(x, [0, 2, 3, 1]), (_dims(x)[0], 20, 3)), [0, 2, 1]),
        ("n", 3, 4, 5),
        0,
    ),
    "over a split of axes": (
        lambda x: op.permute_dims(op.reshape(op.permute_dims(x, [0, 2, 1]), (2, 4, 5, 3)), [0, 3, 1, 2]),
        (2, 3, 20),
        0,
    ),
    "to one where the outer mixes what was split": (
        lambda x: op.permute_dims(op.reshape(op.permute_dims(x), (3, 2, 4)), [1, 0, 2]),
        (8, 3),
        1,
    ),
    "to one instead of two": (
        lambda x: op.permute_dims(op.reshape(op.permute_dims(x, [0, 2, 1]), (2, 4, 5, 3)), [3, 0, 1, 2]),
        (2, 3, 20),
        1,
    ),
}


def test_transposes_around_an_operator_or_a_merge_of_axes_fall_away() -> None:
    around, merge = _CANCELLING["over one elementwise operator"][0], _CANCELLING["over a merge of axes"][0]
    assert_rewritten(CancelTransposes(), around, op.nn.gelu, ("n", 3, 4, 5))
    assert_rewritten(CancelTransposes(), merge, lambda x: op.reshape(x, (_dims(x)[0], 3, 20)), ("n", 3, 4, 5))


@pytest.mark.parametrize(("body", "shape", "left"), _CANCELLING.values(), ids=_CANCELLING)
def test_transposes_meet(body, shape, left: int) -> None:
    module = graph(body, shape)
    outcome = CancelTransposes().run(module)
    assert _transposes(outcome.module) == left < _transposes(module)
    assert CancelTransposes().run(outcome.module).rewritten == 0
    x = np.random.default_rng(1).standard_normal([2 if d == "n" else d for d in shape]).astype("float32")
    np.testing.assert_array_equal(run(outcome.module, x), run(module, x))


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: op.permute_dims(op.nn.gelu(x), [1, 0]), (3, 4)),  # nothing to meet
        (lambda x: op.permute_dims(op.nn.softmax(op.permute_dims(x), 0)), (3, 4)),  # not elementwise
        (lambda x: op.permute_dims(op.reshape(op.permute_dims(x), (2, 6))), (3, 4)),  # the reshape mixes the axes
        (lambda x: op.permute_dims(op.reshape(op.permute_dims(x), (2, 3, 2)), [2, 1, 0]), (3, 4)),
        (lambda x: op.permute_dims(op.add(op.permute_dims(x), op.exp(op.reshape(x, (4, 3))))), (3, 4)),
        (lambda x: op.permute_dims(op.exp(op.reshape(x, (4, 3)))), (3, 4)),
    ],
)
def test_transposes_that_would_not_meet_stay(body, shape) -> None:
    assert_kept(CancelTransposes(), body, shape)


def test_transposed_value_with_another_reader_is_not_computed_twice() -> None:
    def body(x):
        y = relax.BlockBuilder.current().emit(op.permute_dims(x))
        return [y, op.permute_dims(op.exp(y))]

    assert_kept(CancelTransposes(), body, (3, 4))


def test_transposed_reshape_with_another_reader_is_not_computed_twice() -> None:
    def of_the_reshape(x):
        y = relax.BlockBuilder.current().emit(op.reshape(op.permute_dims(x, [0, 2, 1]), (2, 2, 2, 3)))
        return [y, op.permute_dims(y, [0, 3, 1, 2])]

    def of_the_transpose(x):
        y = relax.BlockBuilder.current().emit(op.permute_dims(x, [0, 2, 1]))
        return [y, op.permute_dims(op.reshape(y, (2, 2, 2, 3)), [0, 3, 1, 2])]

    assert_kept(CancelTransposes(), of_the_reshape, (2, 3, 4))
    assert_kept(CancelTransposes(), of_the_transpose, (2, 3, 4))


def test_a_transpose_moves_over_sixteen_operators_and_no_more() -> None:
    def chain(count: int):
        def body(x):
            y = op.permute_dims(x)
            for _ in range(count):
                y = op.exp(y)
            return op.permute_dims(y)

        return body

    assert _transposes(CancelTransposes().run(graph(chain(16), (3, 4))).module) == 0
    assert_kept(CancelTransposes(), chain(17), (3, 4))


def test_shapes_that_do_not_align_have_no_groups() -> None:
    assert aligned_groups([2, 3], [3, 3]) is None
    assert aligned_groups([4, 3], [2, 2, 4]) is None
    assert aligned_groups([2, 3, 1], [2, 3]) == [([0], [0]), ([1, 2], [1])]
    assert aligned_groups([2, 3], [1, 2, 3, 1]) == [([0], [0, 1]), ([1], [2, 3])]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_groups_have_equal_products(before: list[int], data) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(before)))))
    after = [int(np.prod(before[a:b])) for a, b in zip([0, *cuts], [*cuts, len(before)], strict=True) if a < b]
    groups = aligned_groups(before, after)
    assert groups is not None
    assert [axis for group, _ in groups for axis in group] == list(range(len(before)))
    assert [axis for _, group in groups for axis in group] == list(range(len(after)))
    for left, right in groups:
        assert np.prod([before[axis] for axis in left]) == np.prod([after[axis] for axis in right])
