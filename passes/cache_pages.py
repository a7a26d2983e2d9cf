"""TIR functions of quantized caches: one that appends to pages in place, one that reads them as floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax, te, tirx
from tvm.ir import Expr, StringImm
from tvm.tirx.stmt import Stmt

from passes.cache_append import parameters, whole_function
from schedules.cache_pages import LARGEST_SCALE, PAGE, SCALE_DTYPE, CachePages
from schedules.loops import index, load, loop, store, with_local

FLOAT = "float32"
NAMES = ("codes", "scales", "recent", "new")


def append_to_pages(
    pages: CachePages,
    buffers: Sequence[relax.TensorType],
    new: relax.TensorType,
    counts: str | None,
    can_fail: bool = True,
) -> tirx.PrimFunc:
    """Return the function (codes, scales, recent, new, [counts], past, before, quantized, total) that appends in place.

    Of the `past` tokens, the first `before` are codes, the others recent. Those up to `quantized` are made codes, the
    rest moved to the front of `recent`, and `new` put behind: in each row behind its count of tokens if `counts` is the
    dtype of those, and zeros up to `total` behind that. A row that ends among the codes is an error; where the code
    cannot fail, the new tokens of that row, and so all that is computed of it, become NaN.
    """
    codes, scales, recent, source = parameters([*buffers, new], NAMES)
    past, before, quantized, total = (tirx.Var(name, "int64") for name in ("past", "before", "quantized", "total"))
    starts = None if counts is None else tirx.decl_buffer([source.shape[0]], counts, "counts")
    rows, heads, added, channels = source.shape
    quantize = _by_channel if pages.by_channel else _by_token

    def is_lost(first: Expr) -> Expr:
        return tirx.And(first < quantized, quantized > index(0))

    def head(row: Expr, head: Expr) -> Stmt:
        moved = quantized - before

        def move(token: Expr) -> Stmt:
            return loop(
                channels,
                lambda e: store(recent, load(recent, [row, head, token + moved, e]), [row, head, token, e]),
            )

        first = past if starts is None else tirx.Cast("int64", load(starts, [row]))
        place = first - quantized
        if starts is not None and not can_fail:
            place = tirx.Select(is_lost(first), index(0), place)
        after = tirx.max(place + added, index(0))

        def copy(token: Expr) -> Stmt:
            def cell(e: Expr) -> Stmt:
                value = load(source, [row, head, token, e]).astype(str(recent.dtype))
                if starts is not None and not can_fail:
                    value = tirx.Select(is_lost(first), tirx.const(float("nan"), str(recent.dtype)), value)
                return store(recent, value, [row, head, place + token, e])

            inside = tirx.And(place + token >= index(0), place + token < total - quantized)
            return loop(channels, cell) if starts is None else tirx.IfThenElse(inside, loop(channels, cell), None)

        def clear(token: Expr) -> Stmt:
            zero = tirx.const(0, str(recent.dtype))
            return loop(channels, lambda e: store(recent, zero, [row, head, after + token, e]))

        rest = [] if starts is None else [loop(tirx.max(total - quantized - after, index(0)), clear)]
        pages_made = tirx.floordiv(moved, index(PAGE))
        work = loop(pages_made, lambda page: quantize(pages, (codes, scales, recent), (row, head), page, before))
        shift = tirx.IfThenElse(moved > index(0), loop(past - quantized, move), None)
        return tirx.SeqStmt([work, shift, loop(added, copy), *rest])

    body = loop(rows, lambda r: loop(heads, lambda h: head(r, h)))
    if starts is not None and can_fail:
        message = StringImm(f"a row is more than {PAGE} tokens shorter than the longest one of a quantized cache")
        check = loop(
            rows,
            lambda r: tirx.AssertStmt(
                tirx.Not(is_lost(tirx.Cast("int64", load(starts, [r])))), StringImm("ValueError"), [message]
            ),
        )
        body = tirx.SeqStmt([check, body])
    inputs = [codes, scales, recent, source, *([] if starts is None else [starts])]
    return whole_function([*inputs, past, before, quantized, total], body)


def read_pages(pages: CachePages) -> Callable[[te.Tensor, te.Tensor, te.Tensor, Expr, Expr], te.Tensor]:
    """Return the tensor expression that makes fp32 [B, G, total, D] of codes, scales and recent tokens."""

    def compute(codes: te.Tensor, scales: te.Tensor, recent: te.Tensor, quantized: Expr, total: Expr) -> te.Tensor:
        shape = (recent.shape[0], recent.shape[1], total, recent.shape[3])
        return te.compute(shape, lambda *p: pages.element((codes, scales, recent), quantized, p), "read_cache")

    return compute


def _by_channel(
    pages: CachePages,
    buffers: tuple[tirx.Var, tirx.Var, tirx.Var],
    head: tuple[Expr, Expr],
    page: Expr,
    before: Expr,
) -> Stmt:
    """Return the quantization of a page with a scale for each channel."""
    codes, scales, recent = buffers
    channels = recent.shape[3]
    low, high = (tirx.decl_buffer([channels], FLOAT, name, scope="local") for name in ("low", "high"))
    first, start = page * PAGE, before + page * PAGE

    def value(token: Expr, e: Expr) -> Expr:
        return load(recent, [*head, first + token, e]).astype(FLOAT)

    def begin(e: Expr) -> Stmt:
        return tirx.SeqStmt([store(low, value(index(0), e), [e]), store(high, value(index(0), e), [e])])

    def widen(token: Expr, e: Expr) -> Stmt:
        return tirx.SeqStmt(
            [
                store(low, tirx.min(load(low, [e]), value(token, e)), [e]),
                store(high, tirx.max(load(high, [e]), value(token, e)), [e]),
            ]
        )

    def choose(e: Expr) -> Stmt:
        places = [pages.place_of_scale(*head, start, part, e) for part in (0, 1)]
        return _chosen(pages, scales, places, (load(low, [e]), load(high, [e])), (low, high), e)

    def code(token: Expr, e: Expr) -> Expr:
        return _code(pages, value(token, e), load(low, [e]), load(high, [e]))

    steps = [
        loop(channels, begin),
        loop(PAGE, lambda token: loop(channels, lambda e: widen(token, e))),
        loop(channels, choose),
        _packed(pages, codes, head, start, channels, code),
    ]
    return with_local([low, high], steps)


def _by_token(
    pages: CachePages,
    buffers: tuple[tirx.Var, tirx.Var, tirx.Var],
    head: tuple[Expr, Expr],
    page: Expr,
    before: Expr,
) -> Stmt:
    """Return the quantization of a page with a scale for each token."""
    codes, scales, recent = buffers
    channels = recent.shape[3]
    low, high = (tirx.decl_buffer([index(PAGE)], FLOAT, name, scope="local") for name in ("low", "high"))
    first, start = page * PAGE, before + page * PAGE

    def value(token: Expr, e: Expr) -> Expr:
        return load(recent, [*head, first + token, e]).astype(FLOAT)

    def choose(token: Expr) -> Stmt:
        def widen(e: Expr) -> Stmt:
            return tirx.SeqStmt(
                [
                    store(low, tirx.min(load(low, [token]), value(token, e)), [token]),
                    store(high, tirx.max(load(high, [token]), value(token, e)), [token]),
                ]
            )

        places = [pages.place_of_scale(*head, start + token, part, index(0)) for part in (0, 1)]
        return tirx.SeqStmt(
            [
                store(low, value(token, index(0)), [token]),
                store(high, value(token, index(0)), [token]),
                loop(channels, widen),
                _chosen(pages, scales, places, (load(low, [token]), load(high, [token])), (low, high), token),
            ]
        )

    def code(token: Expr, e: Expr) -> Expr:
        return _code(pages, value(token, e), load(low, [token]), load(high, [token]))

    return with_local([low, high], [loop(PAGE, choose), _packed(pages, codes, head, start, channels, code)])


def _chosen(
    pages: CachePages,
    scales: tirx.Var,
    places: Sequence[Sequence[Expr]],
    limits: tuple[Expr, Expr],
    kept: tuple[tirx.Var, tirx.Var],
    at: Expr,
) -> Stmt:
    """Return the choice of scale and minimum for numbers in `limits`.

    The rounded minimum, and the reciprocal of the rounded scale (0 for a scale of 0), are kept where the limits were.
    """
    largest = tirx.const(LARGEST_SCALE, FLOAT)
    low, high = (tirx.max(tirx.min(limit, largest), -largest) for limit in limits)
    lowest, reciprocal = kept
    minimum = load(scales, places[1]).astype(FLOAT)
    scale = load(scales, places[0]).astype(FLOAT)
    step = tirx.min((high - minimum) / tirx.const(pages.levels, FLOAT), largest)
    inverse = tirx.Select(scale > tirx.const(0, FLOAT), tirx.const(1, FLOAT) / scale, tirx.const(0, FLOAT))
    return tirx.SeqStmt(
        [
            store(scales, low.astype(SCALE_DTYPE), places[1]),
            store(scales, step.astype(SCALE_DTYPE), places[0]),
            store(lowest, minimum, [at]),
            store(reciprocal, inverse, [at]),
        ]
    )


def _code(pages: CachePages, value: Expr, minimum: Expr, reciprocal: Expr) -> Expr:
    nearest = tirx.floor((value - minimum) * reciprocal + tirx.const(0.5, FLOAT))
    within = tirx.max(tirx.min(nearest, tirx.const(pages.levels, FLOAT)), tirx.const(0, FLOAT))
    return within.astype("uint8")


def _packed(
    pages: CachePages,
    codes: tirx.Var,
    head: tuple[Expr, Expr],
    start: Expr,
    channels: Expr,
    code: Callable[[Expr, Expr], Expr],
) -> Stmt:
    """Return the stores of a page's codes, of which a byte may hold several."""
    together = pages.tokens_in_byte

    def byte(number: Expr, e: Expr) -> Stmt:
        value = code(number * together, e)
        if together == 2:
            value = tirx.bitwise_or(value, tirx.shift_left(code(number * 2 + 1, e), tirx.const(4, "uint8")))
        return store(codes, value, [*head, tirx.floordiv(start, index(together)) + number, e])

    return loop(PAGE // together, lambda number: loop(channels, lambda e: byte(number, e)))


__all__ = ["append_to_pages", "read_pages"]
