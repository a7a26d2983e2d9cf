"""Keys and values as attention reads them: in place, from two stores, or through a copy of a block of them in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step
from schedules.attention_mask import choice_of
from schedules.intrin.bf16_conversion import widens_bf16
from schedules.loops import INDEX, LINE_BITS, Extent, index, load, local, loop, prefetch, store, tiles, vector
from schedules.stages import Axis, loads_of, sequence, substitute

FLOAT = "float32"


def is_plain(element: Expr) -> bool:
    """Return whether an element of keys or values is one number in fp32, as it lies in memory."""
    return isinstance(element, TensorLoad) and str(element.source.dtype) == FLOAT


def narrow_read(element: Expr, along: Axis) -> TensorLoad | None:
    """Return the read of bfloat16 that an fp32 element is widened from, neighbours along an axis; None without one."""
    if not widens_bf16(element):
        return None
    read = element.value
    return read if Access(read.source, tuple(read.indices)).step(along) == Step.UNIT else None


@dataclass(frozen=True)
class Codes:
    """An element that is a small integer `code`, as a float, times a `scale`, plus a `minimum`."""

    code: Expr
    scale: Expr
    minimum: Expr


def codes_of(element: Expr) -> Codes | None:
    """Return the parts of an element of a quantized cache; None for anything else."""
    if not isinstance(element, tirx.Add) or not isinstance(element.a, tirx.Mul):
        return None
    parts = Codes(element.a.a, element.a.b, element.b)
    of_bytes = [
        any(str(read.source.dtype) == "uint8" for read in loads_of(part))
        for part in (parts.code, parts.scale, parts.minimum)
    ]
    return parts if of_bytes == [True, False, False] else None


def in_stores(
    element: Expr,
    key: Axis,
    point: Mapping[Var, Expr],
    base: Expr,
    extent: Extent,
    body: Callable[[Expr, Expr, Extent], Stmt],
) -> Stmt:
    """Return `body` for the keys [base, base + extent), given an element, the first key after `base`, and their count.

    Where the element is one expression below some key and another one from there on, the keys are divided there. That
    key may depend on the axes at `point`.
    """
    parts = choice_of(element)
    if parts is None or not isinstance(parts[0], tirx.LT) or not parts[0].a.same_as(key.variable):
        return body(element, index(0), extent)
    condition, below, above = parts
    split = Var("split", INDEX)
    inside = tirx.max(index(0), tirx.min(index(extent), substitute(condition.b, point) - base))
    return sequence([tirx.Bind(split, inside), body(below, index(0), split), body(above, split, index(extent) - split)])


def alike(element: Expr, whole: Expr, other: Expr) -> Expr:
    """Return what `other` is for the keys for which `whole` is `element`, as `in_stores` gives it."""
    parts, others = choice_of(whole), choice_of(other)
    if parts is None or others is None or element.same_as(whole):
        return other
    return others[1] if element.same_as(parts[1]) else others[2]


def requests(element: Expr, axis: Axis, at: Callable[[Expr, Expr], Expr], cache: int) -> list[Stmt]:
    """Return requests to bring one key's or value's memory to a cache; `at` puts a place on the axis into a read.

    What an element is computed of beside its first read, the scales of codes, takes a fraction of the memory. There are
    none where neighbours on the axis are no neighbours in memory.
    """
    return [line_request(element, at, index(line), cache) for line in range(lines_of(element, axis))]


def lines_of(element: Expr, axis: Axis) -> int:
    """Return how many lines of memory a key or value takes; 0 where neighbours on the axis are none in memory."""
    reads = loads_of(element)
    if not isinstance(axis.extent, int) or not reads:
        return 0
    if Access(reads[0].source, tuple(reads[0].indices)).step(axis) != Step.UNIT:
        return 0
    return -(-axis.extent // _elements_of_line(element))


def line_request(element: Expr, at: Callable[[Expr, Expr], Expr], line: Expr, cache: int) -> Stmt:
    """Return the request for one of the lines of a key or value, counted."""
    return prefetch(at(loads_of(element)[0], line * _elements_of_line(element)), cache)


def _elements_of_line(element: Expr) -> int:
    return LINE_BITS // int(loads_of(element)[0].source.dtype.bits)


class Operand:
    """Keys or values in the tiles of a task: `element` at the task's point, or a block of copies of it in fp32."""

    def __init__(self, element: Expr, key: Axis, axis: Axis, keys: int, *, between: int = 0) -> None:
        """Make room for `keys` keys by all of `axis`, where the element is not read in place.

        `between` numbers are left free behind each key.
        """
        self._element = element
        self._key, self._axis = key, axis
        self.copy: Var | None = None
        if not is_plain(element) and isinstance(axis.extent, int):
            self.copy = local([keys, axis.extent + between], FLOAT, "widened")

    @property
    def is_contiguous(self) -> bool:
        """Return whether neighbours on the axis are neighbours in memory."""
        element = self._element
        return self.copy is not None or (
            isinstance(element, TensorLoad)
            and Access(element.source, tuple(element.indices)).step(self._axis) == Step.UNIT
        )

    @property
    def buffers(self) -> list[Var]:
        """Return the buffers to allocate."""
        return [] if self.copy is None else [self.copy]

    def fill(self, point: Mapping[Var, Expr], base: Expr, extent: Extent, lanes: int) -> list[Stmt]:
        """Return the copying of the keys [base, base + extent), if they are copied."""
        copy = self.copy
        if copy is None:
            return []

        def part(element: Expr, start: Expr, count: Extent) -> Stmt:
            def row(number: Expr) -> Stmt:
                place = start + number

                def cell(column: Expr) -> Stmt:
                    values = {**point, self._key.variable: base + place, self._axis.variable: column}
                    return store(copy, substitute(element, values).astype(FLOAT), [place, column])

                return tiles(self._axis.extent, [lanes], lambda first, width: vector(width, lambda v: cell(first + v)))

            return loop(count, row)

        return [in_stores(self._element, self._key, point, base, extent, part)]

    def requests(self, point: Mapping[Var, Expr], key: Expr, cache: int) -> list[Stmt]:
        """Return requests to bring a key's or value's memory to a cache, where it is read in place."""
        if self.copy is not None:
            return []
        return requests(self._element, self._axis, self._at(point, key), cache)

    @property
    def lines(self) -> int:
        """Return how many lines of memory a key or value takes, 0 where it is not read in place or not known."""
        return 0 if self.copy is not None else lines_of(self._element, self._axis)

    def request(self, point: Mapping[Var, Expr], key: Expr, line: Expr, cache: int) -> Stmt:
        """Return the request for one of the `lines` of a key or value, counted."""
        return line_request(self._element, self._at(point, key), line, cache)

    def _at(self, point: Mapping[Var, Expr], key: Expr) -> Callable[[Expr, Expr], Expr]:
        values = {**point, self._key.variable: key}
        return lambda read, place: substitute(read, {**values, self._axis.variable: place})

    def at(self, point: Mapping[Var, Expr], base: Expr, number: Expr, column: Expr) -> Expr:
        """Return the element of key `base + number` and a place on the axis."""
        if self.copy is not None:
            return load(self.copy, [number, column])
        values = {**point, self._key.variable: base + number, self._axis.variable: column}
        return substitute(self._element, values).astype(FLOAT)


__all__ = [
    "Codes",
    "Operand",
    "alike",
    "codes_of",
    "in_stores",
    "is_plain",
    "line_request",
    "lines_of",
    "narrow_read",
    "requests",
]
