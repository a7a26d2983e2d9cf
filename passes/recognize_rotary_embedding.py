"""Rotary position embedding that exporters write out, as the one operator `nn.rotary_embedding`.

With x = [a b] in halves, or a and b the even and the odd channels, put together again by join:
    x * cos + join(-b, a) * sin                          cosines and sines of each channel
    join(a * cos - b * sin, b * cos + a * sin)           cosines and sines of each pair
However the parts are taken (slices, a split, elements of pairs), they are known by where their elements lie.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import tvm.ir
from tvm import relax, sym, tirx

from passes.base import Dataflow, PatternPass, Refusal, require
from passes.rotary_embedding import rotary_embedding
from passes.simplify_shapes import VIEWS
from passes.tensor_types import dtype_of, equal, equal_shapes, is_float, is_one, shape_of
from passes.views import Digit, Element, behind_view, whole

_Pair = tuple[relax.Expr, relax.Expr]


@dataclass(frozen=True)
class WrittenOutRotation:
    """Parts `first` and `second` turned and joined to `expr`; `data` is what they are parts of, where that is known.

    `between` are the bindings that are to go, `mismatch` says what tells the expression from a rotation.
    """

    expr: relax.Expr
    first: relax.Expr
    second: relax.Expr
    cosines: relax.Expr
    sines: relax.Expr
    interleaved: bool
    data: relax.Expr | None
    between: tuple[relax.Expr, ...]
    mismatch: str = ""


@dataclass(frozen=True)
class RecognizeRotaryEmbedding(PatternPass[WrittenOutRotation]):
    """Put the operator in the place of rotary embeddings written out, of channels in halves or interleaved."""

    name: ClassVar[str] = "recognize-rotary-embedding"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> WrittenOutRotation | None:
        """Match x * cos + join(-b, a) * sin, and joined sums of products."""
        if not isinstance(expr, tvm.ir.Call) or not is_float(dtype_of(expr)):
            return None
        return _Finder(dataflow).rotation(expr)

    def check(self, match: WrittenOutRotation, dataflow: Dataflow) -> None:
        """Refuse what is no rotation of pairs of one tensor, or is read in between."""
        require(not match.mismatch, match.mismatch)
        assert match.data is not None
        shape = shape_of(match.data)
        require(equal_shapes(shape, shape_of(match.expr)), "the angles have other axes than the tensor that they turn")
        for angles in (match.cosines, match.sines):
            _check_angles(angles, shape or ())
        inner = Counter(
            variable for value in (match.expr, *match.between) for variable in _operands(dataflow.producer(value))
        )
        read = all(dataflow.uses(value) <= inner[value] for value in match.between)
        require(read, "something else reads what is computed on the way")

    def rewrite(self, match: WrittenOutRotation) -> relax.Expr:
        """Return the call of the operator."""
        assert match.data is not None
        return rotary_embedding(match.data, match.cosines, match.sines, interleaved=match.interleaved)


def _check_angles(angles: relax.Expr, data: tuple[tvm.ir.Expr, ...]) -> None:
    shape = shape_of(angles)
    if shape is None or len(shape) > len(data) or not shape:
        raise Refusal("the shape of the angles is not known, or has more axes than the tensor that they turn")
    channels = data[-1]
    require(
        equal(shape[-1], channels) or equal(shape[-1] * 2, channels), "there is not one angle for each channel or pair"
    )
    for own, other in zip(shape[:-1], data[len(data) - len(shape) : -1], strict=True):
        require(is_one(own) or equal(own, other), "the angles have other axes than the tensor that they turn")


def _operands(value: relax.Expr) -> Iterator[relax.Expr]:
    """Yield the variables that a call reads, once for each place, those in a tuple among them."""
    for argument in value.args if isinstance(value, tvm.ir.Call) else ():
        yield from argument.fields if isinstance(argument, relax.Tuple) else (argument,)


@dataclass
class _Finder:
    """Follows one expression up; `between` are the variables that it passed."""

    dataflow: Dataflow
    between: list[relax.Expr] = field(default_factory=list)

    def rotation(self, expr: tvm.ir.Call) -> WrittenOutRotation | None:
        """Return the rotation that `expr` is, or nearly is."""
        return self._turned_sum(expr) or self._joined_sums(expr)

    def _passed(self, expr: relax.Expr, *operators: str) -> tvm.ir.Call | None:
        """Return the call that `expr` is bound to if it is one of these operators."""
        call = self.dataflow.call(expr, *operators)
        if call is not None and isinstance(expr, relax.Var) and not any(expr.same_as(var) for var in self.between):
            self.between.append(expr)
        return call

    def _turned_sum(self, expr: tvm.ir.Call) -> WrittenOutRotation | None:
        """Match x * cos + join(-b, a) * sin."""
        terms = self._products(expr, "relax.add")
        if terms is None:
            return None
        for kept, (joined, sines) in ((terms[a], terms[b][::step]) for a, b in ((0, 1), (1, 0)) for step in (1, -1)):
            mark = len(self.between)
            parts = self._joined(joined)
            signs = [] if parts is None else [self._passed(part, "relax.negative") for part in parts[0]]
            if parts is None or (signs[0] is None) == (signs[1] is None):
                del self.between[mark:]
                continue
            second, first = (part if sign is None else sign.args[0] for part, sign in zip(parts[0], signs, strict=True))
            data = self._tensor_of((first, second), parts[1])
            own = [data is not None and self._same(factor, data) for factor in kept]
            cosines = kept[0] if own[1] else kept[1]
            found = self._rotation(expr, (first, second), (cosines, sines), parts[1], data)
            if signs[0] is None:
                return replace(found, mismatch="the second part is negated in the place of the first")
            if data is not None and not any(own):
                return replace(found, mismatch="the cosines multiply another tensor than that whose parts are turned")
            return found
        return None

    def _joined_sums(self, expr: tvm.ir.Call) -> WrittenOutRotation | None:
        """Match join(a * cos - b * sin, b * cos + a * sin)."""
        parts = self._joined(expr)
        if parts is None:
            return None
        real, imaginary = self._products(parts[0][0], "relax.subtract"), self._products(parts[0][1], "relax.add")
        if real is None or imaginary is None:
            return None
        nearly: WrittenOutRotation | None = None
        for steps in itertools.product((1, -1), (1, -1)):
            (first, cosines), (second, sines) = (pair[::step] for pair, step in zip(real, steps, strict=True))
            data = self._tensor_of((first, second), parts[1])
            found = self._rotation(expr, (first, second), (cosines, sines), parts[1], data)
            if found.mismatch:
                continue
            if self._same_products(imaginary, ((second, cosines), (first, sines))):
                return found
            reason = "the second part is not turned by the angles of the first"
            nearly = replace(found, mismatch=reason)
        return nearly

    def _products(self, expr: relax.Expr, operator: str) -> tuple[_Pair, _Pair] | None:
        """Return the factors of the two products that `expr` adds or subtracts."""
        total = self._passed(expr, operator)
        products = [] if total is None else [self._passed(term, "relax.multiply") for term in total.args]
        if len(products) != 2 or products[0] is None or products[1] is None:
            return None
        return tuple(products[0].args), tuple(products[1].args)

    def _same_products(self, left: tuple[_Pair, _Pair], right: tuple[_Pair, _Pair]) -> bool:
        def equal_pairs(a: _Pair, b: _Pair) -> bool:
            return any(self._same(a[0], first) and self._same(a[1], second) for first, second in (b, b[::-1]))

        return any(equal_pairs(left[0], a) and equal_pairs(left[1], b) for a, b in (right, right[::-1]))

    def _same(self, left: relax.Expr, right: relax.Expr) -> bool:
        return self.dataflow.producer(left).same_as(self.dataflow.producer(right))

    def _joined(self, expr: relax.Expr) -> tuple[_Pair, bool] | None:
        """Return the two tensors that `expr` has the channels of, and whether by turns."""
        apart = self._passed(expr, "relax.concat")
        if apart is not None:
            fields = _two_of_last_axis(apart)
            return None if fields is None else (fields, False)
        reshape = self._passed(expr, *VIEWS)
        stacked = None if reshape is None else self._passed(reshape.args[0], "relax.concat")
        fields = None if stacked is None else _two_of_last_axis(stacked)
        if reshape is None or fields is None:
            return None
        views = [self._passed(part, *VIEWS) for part in fields]
        if views[0] is None or views[1] is None:
            return None
        first, second = (view.args[0] for view in views if view is not None)
        wide, shape = shape_of(reshape), shape_of(first)
        if wide is None or shape is None or not equal_shapes(shape, shape_of(second)):
            return None
        narrow = all(equal_shapes((*shape, tirx.IntImm("int64", 1)), shape_of(part)) for part in fields)
        if not narrow or not equal_shapes((*shape[:-1], shape[-1] * 2), wide):
            return None
        return (first, second), True

    def _rotation(
        self, expr: tvm.ir.Call, parts: _Pair, angles: _Pair, interleaved: bool, data: relax.Expr | None
    ) -> WrittenOutRotation:
        mismatch = "what is turned are not the two halves of one tensor" if data is None else ""
        return WrittenOutRotation(expr, *parts, *angles, interleaved, data, tuple(self.between), mismatch)

    def _tensor_of(self, parts: _Pair, interleaved: bool) -> relax.Expr | None:
        """Return the tensor of which the parts are the halves of the channels, or the even and odd ones."""
        shape = shape_of(parts[0])
        if shape is None or not shape or not equal_shapes(shape, shape_of(parts[1])):
            return None
        digits = [Digit(tirx.Var(f"axis{axis}", "int64"), extent) for axis, extent in enumerate(shape)]
        seen = [list(self._behind(part, digits)) for part in parts]
        number, half = (digits[-1].value if not is_one(shape[-1]) else tirx.IntImm("int64", 0)), shape[-1]
        places = (number * 2, number * 2 + 1) if interleaved else (number, number + half)
        for first, second in itertools.product(*seen):
            if self._same(first.tensor, second.tensor):
                own = shape_of(first.tensor)
                if equal_shapes(own, (*shape[:-1], half * 2)) and all(
                    _lies_at(element, digits, place) for element, place in zip((first, second), places, strict=True)
                ):
                    return first.tensor
        return None

    def _behind(self, part: relax.Expr, digits: list[Digit]) -> Iterator[Element]:
        """Yield where an element of `part` lies in each tensor that it is a view of."""
        element: Element | None = Element(part, tuple(whole(digit) for digit in digits))
        while element is not None:
            yield element
            element = behind_view(element, self.dataflow)


def _two_of_last_axis(concat: tvm.ir.Call) -> _Pair | None:
    """Return the two tensors that are put side by side on the last axis."""
    fields = concat.args[0].fields if isinstance(concat.args[0], relax.Tuple) else ()
    axis = concat.attrs.axis
    if len(fields) != 2 or axis is None or int(axis) % concat.ty.ndim != concat.ty.ndim - 1:
        return None
    return fields[0], fields[1]


def _lies_at(element: Element, digits: list[Digit], place: tvm.ir.Expr) -> bool:
    """Return whether an element lies at its own digits, but for the last axis, on which it lies at `place`."""
    *outer, last = element.positions()
    analyzer = sym.Analyzer()
    same = all(
        is_one(digit.extent) or analyzer.can_prove_equal(own, digit.value)
        for own, digit in zip(outer, digits[:-1], strict=True)
    )
    return same and analyzer.can_prove_equal(last, place)
