"""TIR functions that store new keys or values in a buffer, in place."""

from __future__ import annotations

from collections.abc import Sequence

import tvm.ir
from tvm import relax, s_tir, te, tirx

from schedules.loops import index, load, loop, store

APPENDS_BY_ROW = "appends_by_row"
"""The attribute of a function (past, new, counts) whose result has in each row the first `counts[row]` tokens of the
past, then the new ones, then zeros, along the axis of tokens; the importer marks those that it makes of
GroupQueryAttention. Axes are those of `ROW`."""
WINDOW = "window"
"""The attribute of such a function, and of one (cache, first) that reads elements of its result from each row's `first`
token on, where no query sees further back than this number of tokens, itself included."""
NEWEST_TOKENS = "newest_tokens"
"""The attribute of functions (cache, counts) that give each token of a cache that holds the newest ones the place that
it has in one of all tokens, and of functions (tokens, last) that return such a cache: the window that it keeps."""
SCATTERS = "scatters_tokens"
"""The attribute of a function (cache, new, starts) whose result is the cache with the new tokens in each row from
`starts[row]` on, along the axis that the attribute says; the importer marks those that it makes of TensorScatter."""
CIRCULAR = "circular"
"""The attribute of such a function that says whether tokens beyond the end are written at the beginning."""
ROW, TOKENS = 0, 2


def append_function(buffer: relax.TensorType, new: relax.TensorType, axis: int) -> tirx.PrimFunc:
    """Return the function (buffer, new, length) that stores `new` in `buffer` from `length` on along `axis`.

    The new elements are rounded to the type of the buffer.
    """
    target, source = parameters([buffer, new], ("buffer", "new"))
    length = tirx.Var("length", "int64")
    loops = [tirx.Var(f"i{n}", "int64") for n in range(new.ndim)]
    axes = [
        tirx.IterVar(tvm.ir.Range(tirx.IntImm("int64", 0), extent), tirx.Var(f"v{n}", "int64"), tirx.IterVar.DataPar)
        for n, extent in enumerate(source.shape)
    ]
    point = [each.var for each in axes]
    place = [length + value if n == axis else value for n, value in enumerate(point)]
    body: tirx.Stmt = store(target, load(source, point).astype(str(target.dtype)), place)
    reads, writes = (
        [tirx.BufferRegion(each, [tvm.ir.Range.from_min_extent(i, 1) for i in indices])]
        for each, indices in ((source, point), (target, place))
    )
    body = s_tir.SBlockRealize(loops, True, s_tir.SBlock(axes, reads, writes, "append", body))
    for variable, each in zip(reversed(loops), reversed(axes), strict=True):
        body = tirx.For(variable, tirx.IntImm("int64", 0), each.dom.extent, tirx.ForKind.SERIAL, body)
    return whole_function([target, source, length], body)


def append_by_row_function(
    buffer: relax.TensorType, new: relax.TensorType, counts: str, *, is_ring: bool = False
) -> tirx.PrimFunc:
    """Return the function (buffer, new, counts, total) that stores `new` in each row from its count on.

    What follows up to `total` becomes zeros. `counts` is the dtype of the counts; nothing is stored beyond `total`. In
    a ring, tokens that do not fit lie at the beginning again; zeros are stored only where all tokens fit.
    """
    target, source = parameters([buffer, new], ("buffer", "new"))
    starts = tirx.decl_buffer([target.shape[ROW]], counts, "counts")
    total = tirx.Var("total", "int64")
    rows, heads, added, channels = source.shape

    def row(row: tvm.ir.Expr, head: tvm.ir.Expr) -> tirx.Stmt:
        slots = target.shape[TOKENS]
        first = tirx.Cast("int64", load(starts, [row]))
        after = tirx.max(first + added, index(0))

        def copy(token: tvm.ir.Expr) -> tirx.Stmt:
            place = first + token
            dtype, slot = str(target.dtype), tirx.floormod(place, slots) if is_ring else place
            cells = loop(
                channels,
                lambda e: store(target, load(source, [row, head, token, e]).astype(dtype), [row, head, slot, e]),
            )
            return tirx.IfThenElse(tirx.And(place >= index(0), place < total), cells, None)

        def clear(token: tvm.ir.Expr) -> tirx.Stmt:
            zero = tirx.const(0, str(target.dtype))
            return loop(channels, lambda e: store(target, zero, [row, head, after + token, e]))

        rest = loop(tirx.max(total - after, index(0)), clear)
        return tirx.SeqStmt([loop(added, copy), tirx.IfThenElse(total <= slots, rest, None) if is_ring else rest])

    body = loop(rows, lambda r: loop(heads, lambda h: row(r, h)))
    return whole_function([target, source, starts, total], body)


def scatter_function(
    buffer: relax.TensorType, new: relax.TensorType, starts: str, axis: int, *, is_circular: bool
) -> tirx.PrimFunc:
    """Return the function (buffer, new, starts, total) that stores `new` in each row from its start on along `axis`.

    `starts` is the dtype of the starts. What lies outside the first `total` tokens is not stored, or stored at the
    beginning again if `is_circular`. The new elements are rounded to the type of the buffer.
    """
    target, source = parameters([buffer, new], ("buffer", "new"))
    firsts = tirx.decl_buffer([target.shape[ROW]], starts, "starts")
    total = tirx.Var("total", "int64")

    def cell(point: list[tvm.ir.Expr]) -> tirx.Stmt:
        place = tirx.Cast("int64", load(firsts, [point[ROW]])) + point[axis]
        slot = tirx.floormod(place, total) if is_circular else place
        value = load(source, point).astype(str(target.dtype))
        stored = store(target, value, [*point[:axis], slot, *point[axis + 1 :]])
        return stored if is_circular else tirx.IfThenElse(tirx.And(place >= index(0), place < total), stored, None)

    def nest(point: list[tvm.ir.Expr]) -> tirx.Stmt:
        if len(point) == len(source.shape):
            return cell(point)
        return loop(source.shape[len(point)], lambda value: nest([*point, value]))

    return whole_function([target, source, firsts, total], nest([]))


def read_ring(ring: te.Tensor, first: te.Tensor, seen: tvm.ir.Expr) -> te.Tensor:
    """Return each row's tokens from its `first` one on, `seen` of them, of a ring of tokens."""

    def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tvm.ir.Expr:
        slots = ring.shape[TOKENS]
        start = tirx.floormod(first[row], slots)
        straight, around = (ring[row, head, place + shift, channel] for shift in (start, start - slots))
        return tirx.if_then_else(place < slots - start, straight, around)

    return te.compute((ring.shape[0], ring.shape[1], seen, ring.shape[3]), element, "read_ring")


def parameters(types: Sequence[relax.TensorType], names: Sequence[str]) -> list[tirx.Var]:
    """Return the buffers of a function: equal symbols in the types are equal symbols of its own."""
    symbols: dict[tirx.Var, tirx.Var] = {}

    def own(extent: tvm.ir.Expr) -> tvm.ir.Expr:
        if isinstance(extent, tirx.IntImm):
            return extent
        if isinstance(extent, tirx.Var):
            return symbols.setdefault(extent, tirx.Var(extent.name, "int64"))
        return tirx.Var("extent", "int64")

    return [
        tirx.decl_buffer([own(extent) for extent in kind.shape.values], str(kind.dtype.dtype), name)
        for kind, name in zip(types, names, strict=True)
    ]


def whole_function(parameters: Sequence[tirx.Var], body: tirx.Stmt) -> tirx.PrimFunc:
    """Return the function of some parameters with a body that is not to be scheduled."""
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    return tirx.PrimFunc(list(parameters), root).with_attrs({"tirx.noalias": True, "s_tir": True})


__all__ = [
    "APPENDS_BY_ROW",
    "CIRCULAR",
    "NEWEST_TOKENS",
    "SCATTERS",
    "WINDOW",
    "append_by_row_function",
    "append_function",
    "parameters",
    "read_ring",
    "scatter_function",
    "whole_function",
]
