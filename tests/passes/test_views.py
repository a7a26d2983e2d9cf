from __future__ import annotations

import itertools

import numpy as np
import pytest
from tvm import relax, sym, tirx
from tvm.relax import op

from passes.base import Dataflow
from passes.tensor_types import shape_of
from passes.views import Digit, Element, Index, behind_view, broadcast, position, regrouped, whole
from schedules.stages import substitute
from tests.passes.graph import Body, graph

_EXTENT = 3  # of every symbol


def _followed(body: Body, *shapes) -> tuple[tuple[int, ...], list[list[int]] | None]:
    """Return the shape of a view, and where in `x0` each of its elements lies; None if that cannot be followed."""
    function = graph(body, *shapes)["main"]
    dataflow = Dataflow(function)
    result = function.body.body
    axes = [Digit(tirx.Var(f"i{n}", "int64"), extent) for n, extent in enumerate(shape_of(result) or ())]
    element: Element | None = Element(result, tuple(whole(axis) for axis in axes))
    while element is not None and not element.tensor.same_as(function.params[0]):
        element = behind_view(element, dataflow)
    symbols = {v: tirx.IntImm("int64", _EXTENT) for v in _symbols(function.params[0])}
    simplify = sym.Analyzer().simplify
    shape = tuple(int(simplify(substitute(axis.extent, symbols))) for axis in axes)
    if element is None:
        return shape, None
    places = element.positions()
    found = []
    for index in itertools.product(*map(range, shape)):
        values = {axis.value: tirx.IntImm("int64", number) for axis, number in zip(axes, index, strict=True)}
        found.append([int(simplify(substitute(place, {**symbols, **values}))) for place in places])
    return shape, found


def _symbols(parameter: relax.Var) -> list[tirx.Var]:
    return [dimension for dimension in shape_of(parameter) or () if isinstance(dimension, tirx.Var)]


def _dims(x: relax.Expr) -> list:
    return list(x.ty.shape.values)


def _part(index: int, sections: int | list[int], axis: int) -> Body:
    return lambda x: relax.TupleGetItem(relax.BlockBuilder.current().emit(op.split(x, sections, axis)), index)


_VIEWS = {
    "a split": (lambda x: op.reshape(x, (4, 2, 3)), lambda x: x.reshape(4, 2, 3), (8, 3)),
    "a merge": (lambda x: op.reshape(x, (24,)), lambda x: x.reshape(24), (2, 3, 4)),
    "digits cut": (lambda x: op.reshape(x, (4, 6)), lambda x: x.reshape(4, 6), (8, 3)),
    "digits cut twice": (lambda x: op.reshape(x, (2, 2, 2, 3)), lambda x: x.reshape(2, 2, 2, 3), (8, 3)),
    "merged and split": (
        lambda x: op.reshape(op.reshape(x, (8, 3)), (2, 4, 3)),
        lambda x: x.reshape(2, 4, 3),
        (4, 2, 3),
    ),
    "ones": (lambda x: op.reshape(x, (1, 6, 1)), lambda x: x.reshape(1, 6, 1), (2, 1, 3)),
    "symbols apart": (
        lambda x: op.reshape(op.reshape(x, (_dims(x)[0] * 4,)), (_dims(x)[0], 2, 2)),
        lambda x: x.reshape(-1, 2, 2),
        ("n", 4),
    ),
    "a transposition": (lambda x: op.permute_dims(x, [1, 2, 0]), lambda x: x.transpose(1, 2, 0), (2, 3, 4)),
    "a reversal": (op.permute_dims, lambda x: x.T, (2, 3, 4)),
    "counted from the last": (lambda x: op.permute_dims(x, [-1, 0, -2]), lambda x: x.transpose(2, 0, 1), (2, 3, 4)),
    "axes inserted": (lambda x: op.expand_dims(x, [0, -1]), lambda x: x[None, ..., None], (2, 3)),
    "an axis dropped": (lambda x: op.squeeze(x, [-2]), lambda x: x[:, 0], (2, 1, 3)),
    "ones dropped": (op.squeeze, lambda x: x[0, :, 0], (1, 3, 1, 2)),
    "a broadcast": (lambda x: op.broadcast_to(x, (2, 3, 4)), lambda x: np.broadcast_to(x, (2, 3, 4)), (3, 1)),
    "copies of one": (
        lambda x: op.tile(op.expand_dims(x, [1]), (1, 2, 1)),
        lambda x: np.stack([x, x], 1),
        ("n", 4),
    ),
    "copies of several": (lambda x: op.tile(x, (2, 3)), lambda x: np.tile(x, (2, 3)), (2, 4)),
    "copies of the last axes": (lambda x: op.tile(x, (2,)), lambda x: np.tile(x, (2,)), ("n", 4)),
    "copies along a new axis": (lambda x: op.tile(x, (3, 1)), lambda x: np.tile(x, (3, 1)), (4,)),
    "a slice": (lambda x: op.strided_slice(x, [1], [1], [3]), lambda x: x[:, 1:3], (2, 4)),
    "a slice of blocks": (
        lambda x: op.reshape(op.strided_slice(x, [1], [4], [8]), (2, 2, 2)),
        lambda x: x[:, 4:8].reshape(2, 2, 2),
        (2, 8),
    ),
    "a slice from the last": (lambda x: op.strided_slice(x, [-1], [-3], [4]), lambda x: x[:, -3:], (2, 4)),
    "a slice from before the first": (lambda x: op.strided_slice(x, [0], [-9], [2]), lambda x: x[-9:2], (4, 2)),
    "slices": (
        lambda x: op.strided_slice(x, [0, 1], [1, 2], [3, 4], [1, 1]),
        lambda x: x[1:3, 2:4],
        (4, 4),
    ),
    "a slice beside a symbol": (lambda x: op.strided_slice(x, [1], [1], [3]), lambda x: x[:, 1:3], ("n", 4)),
    "every other": (lambda x: op.strided_slice(x, [1], [0], [6], [2]), lambda x: x[:, ::2], (2, 6)),
    "every third from the second": (
        lambda x: op.strided_slice(x, [1], [1], [6], [3]),
        lambda x: x[:, 1::3],
        ("n", 6),
    ),
    "one of an axis": (lambda x: op.take(x, relax.const(2, "int64"), axis=1), lambda x: x[:, 2], (2, 3, 4)),
    "the last of an axis": (lambda x: op.take(x, relax.const(2, "int64"), axis=-2), lambda x: x[:, 2], (2, 3, 4)),
    "a third": (_part(1, 3, -1), lambda x: np.split(x, 3, -1)[1], (2, 6)),
    "the first part": (_part(0, [2, 3], 0), lambda x: x[:2], (6, 2)),
    "a later part": (_part(2, [2, 3], 0), lambda x: x[3:], (6, 2)),
}


@pytest.mark.parametrize(("body", "expected", "shape"), _VIEWS.values(), ids=_VIEWS)
def test_an_element_of_a_view_is_found_where_it_lies(body, expected, shape) -> None:
    extents = [_EXTENT if isinstance(extent, str) else extent for extent in shape]
    x = np.arange(np.prod(extents)).reshape(extents)
    view, places = _followed(body, shape)
    assert places is not None
    assert view == expected(x).shape
    assert [x[tuple(place)] for place in places] == expected(x).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: op.reshape(x, (4, 6)), (6, 4)),  # 6 is no multiple of 4
        (lambda x: op.reshape(x, (6, 4)), (4, 6)),
        (lambda x: op.reshape(x, (2, _dims(x)[0] * 2)), ("n", 4)),  # the symbol would have to be cut
        (lambda x: op.reshape(x, (_dims(x)[0] * 4, 2)), ("n", 4, 2)),
        (lambda x: op.strided_slice(x, [0], [0], [5], [2]), (5, 2)),  # 3 of 5
        (lambda x: op.strided_slice(x, [0], [2], [4], [2]), (4, 2)),
        (lambda x: op.strided_slice(x, [0], [-1], [-5], [-1]), (4, 2)),
        (lambda x: op.strided_slice(x, [0], [-1], [100]), ("n", 2)),
        (lambda x: op.take(x, relax.const([0, 1], "int64"), axis=0), (4, 2)),
        (lambda x: op.take(x, relax.const(4, "int64"), axis=0), (4, 2)),
        (lambda x: op.take(x, relax.const(-1, "int64"), axis=0), (4, 2)),
        (lambda x: op.take(x, relax.const(0, "int64"), axis=0), ("n", 2)),
        (lambda x: op.take(x, relax.const(1, "int64")), (4,)),
        (_part(1, 2, 0), (5, 2)),
        (_part(1, 2, 0), ("n", 2)),
        (op.exp, (4, 2)),
        (lambda x: op.tile(x, (2, 1)), ("n", 2)),
    ],
)
def test_what_is_no_such_view_is_not_followed(body, shape) -> None:
    assert _followed(body, shape)[1] is None


def test_an_index_is_a_number_in_mixed_radix() -> None:
    digits: Index = tuple(
        Digit(tirx.IntImm("int64", value), tirx.IntImm("int64", extent)) for value, extent in ((1, 2), (2, 3), (3, 5))
    )
    assert int(sym.Analyzer().simplify(position(digits))) == (1 * 3 + 2) * 5 + 3
    assert int(position(())) == 0


def test_a_dimension_of_one_has_no_digits() -> None:
    one, two = (Digit(tirx.Var("i", "int64"), tirx.IntImm("int64", extent)) for extent in (1, 2))
    assert whole(one) == ()
    assert whole(two) == (two,)
    assert two.constant_extent == 2
    assert Digit(tirx.Var("i", "int64"), tirx.Var("n", "int64")).constant_extent is None
    indices = ((two,), (one,), (two,))
    shape = [tirx.IntImm("int64", extent) for extent in (1, 2)]
    assert broadcast(indices, shape) == [(), (two,)]


def test_digits_that_are_left_over_are_no_index() -> None:
    digit = Digit(tirx.Var("i", "int64"), tirx.IntImm("int64", 4))
    assert regrouped([digit, digit], [tirx.IntImm("int64", 4)]) is None
    assert regrouped([digit], [tirx.IntImm("int64", 8)]) is None
