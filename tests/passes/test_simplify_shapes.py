from __future__ import annotations

import pytest
import tvm.ir
from tvm import relax
from tvm.relax import op

from passes.simplify_shapes import SimplifyShapes
from tests.passes.graph import assert_kept, assert_rewritten, graph


def _dimension(x: relax.Expr, axis: int) -> relax.Expr:
    return x.ty.shape.values[axis]


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        (lambda x: op.reshape(x, (2, 3, 4)), lambda x: x, (2, 3, 4)),
        (lambda x: op.squeeze(op.expand_dims(x, 1), 1), lambda x: x, ("n", 4)),
        (lambda x: op.expand_dims(op.expand_dims(x, 0), 2), lambda x: op.expand_dims(x, [0, 2]), ("n", 4)),
        (lambda x: op.reshape(op.reshape(x, (6, 4)), (4, 6)), lambda x: op.reshape(x, (4, 6)), (2, 3, 4)),
        (lambda x: op.reshape(x, (2, 1, 12)), lambda x: op.expand_dims(x, [1]), (2, 12)),
        (lambda x: op.reshape(x, (2, 12)), lambda x: op.squeeze(x, [1]), (2, 1, 12)),
        (
            lambda x: op.reshape(op.reshape(x, (_dimension(x, 0) * 6, 4)), (_dimension(x, 0), 2, 3, 4)),
            lambda x: op.reshape(x, (_dimension(x, 0), 2, 3, 4)),
            ("n", 6, 4),
        ),
        (lambda x: op.permute_dims(x, [0, 1]), lambda x: x, ("n", 4)),
        (
            lambda x: op.permute_dims(op.permute_dims(x, [1, 2, 0]), [1, 2, 0]),
            lambda x: op.permute_dims(x, [2, 0, 1]),
            ("n", 3, 4),
        ),
        (lambda x: op.permute_dims(op.permute_dims(x)), lambda x: x, ("n", "m", 3)),
        (lambda x: op.permute_dims(x, [1, 0, 2]), lambda x: op.reshape(x, (3, 1, 4)), (1, 3, 4)),
        # A 0 in the shape of a reshape would stand for the operand's own dimension.
        (lambda x: op.permute_dims(x, [0, 2, 1]), lambda x: op.zeros((1, 0, 1), "float32"), (1, 1, 0)),
        (lambda x: op.expand_dims(op.squeeze(x, 0), 2), lambda x: op.zeros((1, 0, 1), "float32"), (1, 1, 0)),
        (lambda x: op.permute_dims(x, [1, 0, 2]), lambda x: op.reshape(x, (3, 1, 0)), (1, 3, 0)),
        (lambda x: op.broadcast_to(x, (2, 4)), lambda x: x, (2, 4)),
        (
            lambda x: op.broadcast_to(op.broadcast_to(x, (3, 4)), (2, 3, 4)),
            lambda x: op.broadcast_to(x, (2, 3, 4)),
            (3, 1),
        ),
        (lambda x: op.tile(x, (1, 1)), lambda x: x, ("n", 4)),
        (lambda x: op.nn.pad(x, [0, 0, 0, 0]), lambda x: x, ("n", 4)),
        (lambda x: op.strided_slice(x, [1], [0], [100], [1]), lambda x: x, (3, 4)),
        (lambda x: op.concat([x], 0), lambda x: x, ("n", 4)),
        (lambda x: op.concat([x, x, x], -1), lambda x: op.broadcast_to(x, (2, 3)), (2, 1)),
        (
            lambda x: op.concat([op.concat([x, op.exp(x)], -1), x], 1),
            lambda x: op.concat([x, op.exp(x), x], 1),
            (3, 4),
        ),
    ],
)
def test_chains_and_no_ops_fall_away(before, after, shape) -> None:
    assert_rewritten(SimplifyShapes(), before, after, shape)


def test_expand_that_the_operator_does_itself_falls_away() -> None:
    assert_rewritten(
        SimplifyShapes(),
        lambda x, y: op.add(op.broadcast_to(x, y.ty.shape), y),
        op.add,
        *[(1, 4), ("n", 4)],
    )


def test_expands_of_all_operands_keep_the_one_that_makes_the_shape() -> None:
    assert_rewritten(
        SimplifyShapes(),
        lambda x, y: op.add(op.broadcast_to(x, (3, 4)), op.broadcast_to(y, (3, 4))),
        op.add,
        *[(3, 1), (1, 4)],
    )
    assert_rewritten(
        SimplifyShapes(),
        lambda x, y: op.add(op.broadcast_to(x, (3, 4)), op.broadcast_to(y, (3, 4))),
        lambda x, y: op.add(x, op.broadcast_to(y, (3, 4))),
        *[(1, 4), (1, 4)],
    )


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: op.strided_slice(x, [0], [-1], [-100], [-1]), (3, 4)),  # the rows in reverse
        (lambda x: op.nn.pad(x, [1, -1, 0, 0]), (3, 4)),  # shifted by one row
        (lambda x: op.reshape(x, (4, 3)), (3, 4)),
        (lambda x: op.permute_dims(x, [1, 0]), (3, 3)),
        (lambda x: op.concat([x, x], 0), (3, 4)),
        (lambda x: op.concat([x, x], 0), ("n", 4)),
        (lambda x: op.concat([x, op.exp(x)], 0), (1, 4)),
        (lambda x: op.concat([op.concat([x, x], 0), op.concat([x, x], 0)], 1), (3, 4)),
        (lambda x: op.add(op.broadcast_to(x, (5, 4)), relax.const(1.0)), (1, 4)),
        (lambda x: op.tile(x, (2, 1)), (3, 4)),
    ],
)
def test_what_moves_or_repeats_elements_is_kept(body, shape) -> None:
    assert_kept(SimplifyShapes(), body, shape)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, y: op.reshape(x, (6,)),
        lambda x, y: op.expand_dims(x, 0),
        lambda x, y: op.permute_dims(x),
        lambda x, y: op.add(op.broadcast_to(y, (2, 3)), x),
        lambda x, y: op.broadcast_to(x, (2, 3)),
        lambda x, y: op.strided_slice(x, [0], [0], [2]),
    ],
)
def test_what_is_of_unknown_shape_is_kept(body) -> None:
    assert_kept(SimplifyShapes(), body, 2, (1, 3))


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        (lambda x: op.flatten(op.flatten(x)), op.flatten, (2, 3, 4)),
        (lambda x: op.reshape(x, (1, 2, 1, 12, 1)), lambda x: op.expand_dims(x, [0, 2, 4]), (2, 12)),
        (lambda x: op.reshape(x, (2, 12)), lambda x: op.squeeze(x, [0, 2, 4]), (1, 2, 1, 12, 1)),
        (lambda x: op.permute_dims(x, [2, 1, 0, 3]), lambda x: op.reshape(x, (1, 3, 1, 4)), (1, 3, 1, 4)),
        (lambda x: op.permute_dims(x, [1, 0, 2]), lambda x: op.squeeze(op.expand_dims(x, 0), 0), (1, 1, 4)),
        (lambda x: op.strided_slice(x, [0], [0], [3]), lambda x: x, (3, 4)),
        (
            lambda x: op.concat([op.concat([x, x], 0), x, op.concat([x, x], 0)], -2),
            lambda x: op.concat([x] * 5, -2),
            (3, 4),
        ),
    ],
)
def test_other_forms_of_chains_and_no_ops(before, after, shape) -> None:
    expected = SimplifyShapes().run(graph(after, shape)).module
    tvm.ir.assert_structural_equal(SimplifyShapes().run(graph(before, shape)).module, expected)


def test_a_concatenation_with_another_reader_stays() -> None:
    def body(x):
        y = relax.BlockBuilder.current().emit(op.concat([x, x], 0))
        return [y, op.concat([y, x], 0)]

    assert_kept(SimplifyShapes(), body, (3, 4))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x, y: op.subtract(y, op.broadcast_to(x, (3, 4))), lambda x, y: op.subtract(y, x)),
        (
            lambda x, y: op.where(op.isnan(y), y, op.broadcast_to(x, (3, 4))),
            lambda x, y: op.where(op.isnan(y), y, x),
        ),
        (lambda x, y: op.less(op.broadcast_to(x, (3, 4)), y), op.less),
    ],
)
def test_an_implied_expand_falls_away_at_any_position(before, after) -> None:
    assert_rewritten(SimplifyShapes(), before, after, (1, 4), (3, 4))
