from __future__ import annotations

import pytest
from tvm import relax
from tvm.relax import op

from passes.simplify_shapes import SimplifyShapes
from tests.passes.graph import assert_kept, assert_rewritten


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
        (lambda x: op.concat([op.concat([x, x], 0), op.concat([x, x], 0)], 1), (3, 4)),
        (lambda x: op.add(op.broadcast_to(x, (5, 4)), relax.const(1.0)), (1, 4)),
        (lambda x: op.tile(x, (2, 1)), (3, 4)),
    ],
)
def test_what_moves_or_repeats_elements_is_kept(body, shape) -> None:
    assert_kept(SimplifyShapes(), body, shape)
