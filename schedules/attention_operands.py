"""Keys and values as attention reads them: in place, from two stores, or through a copy of a block of them in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_mask import choice_of
from schedules.loops import INDEX, Extent, index, load, local, loop, store, tiles, vector
from schedules.stages import Axis, sequence, substitute

FLOAT = "float32"


def is_plain(element: Expr) -> bool:
    """Return whether an element of keys or values is one number in fp32, as it lies in memory."""
    return isinstance(element, TensorLoad) and str(element.source.dtype) == FLOAT


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


class Operand:
    """Keys or values in the tiles of a task: `element` at the task's point, or a block of copies of it in fp32."""

    def __init__(self, element: Expr, key: Axis, axis: Axis, keys: int) -> None:
        """Make room for `keys` keys by all of `axis`, where the element is not read in place."""
        self._element = element
        self._key, self._axis = key, axis
        self.copy: Var | None = None
        if not is_plain(element) and isinstance(axis.extent, int):
            self.copy = local([keys, axis.extent], FLOAT, "widened")

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

    def at(self, point: Mapping[Var, Expr], base: Expr, number: Expr, column: Expr) -> Expr:
        """Return the element of key `base + number` and a place on the axis."""
        if self.copy is not None:
            return load(self.copy, [number, column])
        values = {**point, self._key.variable: base + number, self._axis.variable: column}
        return substitute(self._element, values).astype(FLOAT)


__all__ = ["Operand", "in_stores", "is_plain"]
