"""Where an element of a view lies: indices carried through reshapes, transpositions, broadcasts and slices.

An index into one dimension is a number in mixed radix: a tuple of digits, the most significant first, each with the
number of values that it takes. So a reshape that splits and one that joins dimensions only regroup digits, with
symbolic sizes too, where quotients and remainders would have to be proven equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm.ir
from tvm import relax, sym, tirx

from passes.base import Dataflow
from passes.tensor_types import shape_of

Index = tuple["Digit", ...]
_VIEWS = (
    "relax.reshape",
    "relax.permute_dims",
    "relax.expand_dims",
    "relax.squeeze",
    "relax.broadcast_to",
    "relax.tile",
    "relax.strided_slice",
    "relax.take",
)


@dataclass(frozen=True, eq=False)
class Digit:
    """A number `value` from 0 to `extent` - 1."""

    value: tvm.ir.Expr
    extent: tvm.ir.Expr

    @property
    def constant_extent(self) -> int | None:
        """Return the extent where it is static."""
        return _integer(self.extent)


@dataclass(frozen=True, eq=False)
class Element:
    """The element of `tensor` at `indices`."""

    tensor: relax.Expr
    indices: tuple[Index, ...]

    def positions(self) -> list[tvm.ir.Expr]:
        """Return the indices as expressions."""
        analyzer = sym.Analyzer()
        return [analyzer.simplify(position(index)) for index in self.indices]


@dataclass(frozen=True, eq=False)
class _View:
    """A call that makes a view of a tensor of `shape`, and the indices of an element of its result."""

    call: tvm.ir.Call
    indices: tuple[Index, ...]
    shape: tuple[tvm.ir.Expr, ...]


def position(index: Index) -> tvm.ir.Expr:
    """Return an index as an expression."""
    result: tvm.ir.Expr = tirx.IntImm("int64", 0)
    for digit in index:
        result = result * digit.extent + digit.value
    return result


def whole(digit: Digit) -> Index:
    """Return the index of one digit; a dimension of 1 has none."""
    return () if digit.constant_extent == 1 else (digit,)


def behind_view(element: Element, dataflow: Dataflow) -> Element | None:
    """Return the element of which `element` is a view; None where its tensor is none, or the index cannot be taken."""
    producer = dataflow.producer(element.tensor)
    if isinstance(producer, relax.TupleGetItem):
        return _behind_split(producer, element.indices, dataflow)
    call = dataflow.call(element.tensor, *_VIEWS)
    if call is None or not isinstance(call.args[0].ty, relax.TensorType):
        return None
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    indices = _RULES[call.op.name](_View(call, element.indices, shape))
    return None if indices is None else Element(call.args[0], tuple(indices))


def _behind_split(item: relax.TupleGetItem, indices: tuple[Index, ...], dataflow: Dataflow) -> Element | None:
    call = dataflow.call(item.tuple_value, "relax.split")
    if call is None:
        return None
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    axis = int(call.attrs.axis) % len(shape)
    sections = call.attrs.indices_or_sections
    extent = _integer(shape[axis])
    if isinstance(sections, tirx.IntImm | int):
        if extent is None or extent % int(sections):
            return None
        offset = extent // int(sections) * int(item.index)
    else:
        offset = int(sections[item.index - 1]) if item.index else 0
    return Element(call.args[0], _shifted(indices, axis, offset, shape[axis]))


def _shifted(indices: tuple[Index, ...], axis: int, offset: int, extent: tvm.ir.Expr) -> tuple[Index, ...]:
    """Return `indices` with `offset` added on one axis: a multiple of the index's range becomes a digit of its own."""
    own = indices[axis]
    covered = _product([digit.extent for digit in own])
    size, total = _integer(covered), _integer(extent)
    if size is not None and total is not None and total % size == 0 and offset % size == 0:
        leading = (Digit(_int64(offset // size), _int64(total // size)),) if total > size else ()
        moved: Index = (*leading, *own)
    else:
        moved = (Digit(position(own) + offset, extent),)
    return (*indices[:axis], moved, *indices[axis + 1 :])


def _reshape(view: _View) -> list[Index] | None:
    return regrouped([digit for index in view.indices for digit in index], view.shape)


def regrouped(digits: Sequence[Digit], shape: Sequence[tvm.ir.Expr]) -> list[Index] | None:
    """Return row-major `digits` as indices into `shape`; None where a symbolic digit would have to be cut."""
    analyzer = sym.Analyzer()
    rest = list(digits)
    result: list[Index] = []
    for extent in shape:
        taken: list[Digit] = []
        while not analyzer.can_prove_equal(_product([digit.extent for digit in taken]), extent):
            if not rest:
                return None
            digit = rest.pop(0)
            covered, wanted = _integer(_product([other.extent for other in taken])), _integer(extent)
            size = digit.constant_extent
            if covered is not None and wanted is not None and size is not None and covered * size > wanted:
                upper, remainder = divmod(wanted, covered)
                if remainder or size % upper:
                    return None
                lower = _int64(size // upper)
                rest.insert(0, Digit(analyzer.simplify(tirx.floormod(digit.value, lower)), lower))
                digit = Digit(analyzer.simplify(tirx.floordiv(digit.value, lower)), _int64(upper))
            taken.append(digit)
        result.append(tuple(taken))
    return None if rest else result


def _permute(view: _View) -> list[Index] | None:
    axes = view.call.attrs.axes
    order = [int(axis) % len(view.shape) for axis in axes] if axes else list(reversed(range(len(view.shape))))
    result: list[Index] = [()] * len(view.shape)
    for axis, index in zip(order, view.indices, strict=True):
        result[axis] = index
    return result


def _expand(view: _View) -> list[Index] | None:
    added = {int(axis) % len(view.indices) for axis in view.call.attrs.axis}
    return [index for axis, index in enumerate(view.indices) if axis not in added]


def _squeeze(view: _View) -> list[Index] | None:
    axes = view.call.attrs.axis
    dropped = (
        {axis for axis, extent in enumerate(view.shape) if _integer(extent) == 1}
        if axes is None
        else {int(axis) % len(view.shape) for axis in axes}
    )
    remaining = iter(view.indices)
    return [() if axis in dropped else next(remaining) for axis in range(len(view.shape))]


def broadcast(indices: Sequence[Index], shape: Sequence[tvm.ir.Expr]) -> list[Index]:
    """Return the indices of an operand of `shape` that is broadcast to what `indices` index."""
    own = list(indices)[len(indices) - len(shape) :]
    return [() if _integer(extent) == 1 else index for index, extent in zip(own, shape, strict=True)]


def _broadcast(view: _View) -> list[Index] | None:
    return broadcast(view.indices, view.shape)


def _tile(view: _View) -> list[Index] | None:
    """The number of a copy is no part of the position in it."""
    repeats = [1] * len(view.indices)
    given = [int(count) for count in view.call.attrs.repeats]
    repeats[len(repeats) - len(given) :] = given
    inserted = len(view.indices) - len(view.shape)
    result: list[Index] = []
    for index, count, extent in zip(view.indices[inserted:], repeats[inserted:], view.shape, strict=True):
        parts = [(), index] if count == 1 else regrouped(index, (_int64(count), extent))
        if parts is None:
            return None
        result.append(parts[1])
    return result


def _slice(view: _View) -> list[Index] | None:
    axes, begin, *others = (_integers(argument) for argument in view.call.args[1:])
    strides = others[1] if len(others) > 1 else [1] * len(axes or ())
    if axes is None or begin is None or strides is None:
        return None
    result = view.indices
    for axis, start, stride in zip(axes, begin, strides, strict=True):
        extent = _integer(view.shape[axis])
        if extent is None and start < 0:
            return None
        first = start if start >= 0 else start + (extent or 0)
        first, place = min(max(first, 0), extent or first), axis % len(view.shape)
        if stride == 1:
            result = _shifted(result, place, first, view.shape[axis])
            continue
        every = _every(result[place], first, stride, view.shape[axis])
        if every is None:
            return None
        result = (*result[:place], every, *result[place + 1 :])
    return list(result)


def _every(index: Index, first: int, stride: int, extent: tvm.ir.Expr) -> Index | None:
    """Return the index of every `stride`-th position from `first`, where these divide the axis evenly."""
    count, total = _integer(_product([digit.extent for digit in index])), _integer(extent)
    if count is None or total is None or stride < 1 or first >= stride or count * stride != total:
        return None
    return (*index, Digit(_int64(first), _int64(stride)))


def _take(view: _View) -> list[Index] | None:
    """A constant scalar index picks one element of an axis, and removes the axis."""
    chosen = view.call.args[1]
    axis = view.call.attrs.axis
    if axis is None or not isinstance(chosen, tvm.ir.GenericConst) or chosen.value.numpy().ndim:
        return None
    axis = int(axis) % len(view.shape)
    extent = _integer(view.shape[axis])
    number = int(chosen.value.numpy())
    if extent is None or not 0 <= number < extent:
        return None
    return [*view.indices[:axis], whole(Digit(_int64(number), view.shape[axis])), *view.indices[axis:]]


_RULES = {
    "relax.reshape": _reshape,
    "relax.permute_dims": _permute,
    "relax.expand_dims": _expand,
    "relax.squeeze": _squeeze,
    "relax.broadcast_to": _broadcast,
    "relax.tile": _tile,
    "relax.strided_slice": _slice,
    "relax.take": _take,
}


def _product(extents: Sequence[tvm.ir.Expr]) -> tvm.ir.Expr:
    result: tvm.ir.Expr = _int64(1)
    for extent in extents:
        result = result * extent
    return result


def _integers(expr: relax.Expr) -> list[int] | None:
    if not isinstance(expr, relax.Tuple):
        return None
    values = [_integer(field) for field in expr.fields]
    return None if any(value is None for value in values) else [value for value in values if value is not None]


def _integer(expression: tvm.ir.Expr) -> int | None:
    return int(expression) if isinstance(expression, tirx.IntImm) else None


def _int64(value: int) -> tvm.ir.Expr:
    return tirx.IntImm("int64", value)
