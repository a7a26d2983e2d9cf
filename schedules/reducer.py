"""The operator of a reduction, and reductions along a contiguous axis in vector lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.loops import Extent, load, local, loop, quotient, remainder, store, vector, with_local
from schedules.stages import Stage, loads_of, replace_loads, sequence, substitute

NARROW_FLOATS = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Reducer:
    """`output = combine(output, term)`; `identity` leaves the other operand as it is."""

    combine: Callable[[Expr, Expr], Expr]
    term: Expr
    identity: Expr


def reducer_of(stage: Stage) -> Reducer | None:
    """Return the operator where it is associative and commutative and the term does not read the output."""
    value, initial = stage.value, stage.initial
    kinds = {tirx.Add: lambda a, b: a + b, tirx.Mul: lambda a, b: a * b, tirx.Max: tirx.max, tirx.Min: tirx.min}
    combine = next((function for kind, function in kinds.items() if isinstance(value, kind)), None)
    if combine is None or initial is None:
        return None
    for own, term in ((value.a, value.b), (value.b, value.a)):
        is_own = isinstance(own, TensorLoad) and own.source.same_as(stage.output)
        if is_own and not any(read.source.same_as(stage.output) for read in loads_of(term)):
            dtype = stage.output.dtype
            if isinstance(value, tirx.Add):
                identity = tirx.const(0, dtype)
            else:
                identity = tirx.const(1, dtype) if isinstance(value, tirx.Mul) else initial
            return Reducer(combine, term, identity)
    return None


def accumulator_dtype(stage: Stage) -> str:
    """Return the type to accumulate in: sums of 16-bit floats are kept in fp32."""
    narrow = str(stage.output.dtype) in NARROW_FLOATS and isinstance(stage.value, tirx.Add)
    return "float32" if narrow else str(stage.output.dtype)


def accumulate(stage: Stage, accumulator: Expr, point: Mapping[Var, Expr]) -> Expr:
    """Return the next value of `accumulator`, of `accumulator_dtype`, at `point` of the stage's axes."""
    value = substitute(stage.value, point)
    if accumulator_dtype(stage) != str(stage.output.dtype):
        reducer = reducer_of(stage)
        if reducer is not None:
            return accumulator + widen(substitute(reducer.term, point))
        accumulator = accumulator.astype(stage.output.dtype)
        return _with_own(stage, value, accumulator).astype("float32")
    return _with_own(stage, value, accumulator)


def _with_own(stage: Stage, value: Expr, accumulator: Expr) -> Expr:
    return replace_loads(value, lambda read: accumulator if read.source.same_as(stage.output) else None)


def widen(term: Expr) -> Expr:
    """Return a 16-bit float expression computed in fp32; products of 16-bit floats are exact there."""
    if isinstance(term, tirx.Mul | tirx.Add | tirx.Sub):
        left, right = widen(term.a), widen(term.b)
        if isinstance(term, tirx.Mul):
            return left * right
        return left + right if isinstance(term, tirx.Add) else left - right
    return term.astype("float32")


def term_at(stage: Stage, reducer: Reducer, point: Mapping[Var, Expr]) -> Expr:
    """Return the term at `point` of the stage's axes in the type that accumulates."""
    term = substitute(reducer.term, point)
    return widen(term) if accumulator_dtype(stage) != str(stage.output.dtype) else term


def lanes_for(extent: Extent, lanes: int, most: int = 4) -> int:
    """Return how many lanes accumulate side by side: whole registers, up to `most`, and no more than the axis has."""
    if not isinstance(extent, int):
        return lanes
    if extent < lanes:
        return 1 << (extent.bit_length() - 1)
    return min(most, extent // lanes) * lanes


def fold_lanes(reducer: Reducer, source: Var, base: int, width: int, dtype: str) -> tuple[list[Var], list[Stmt], Expr]:
    """Return buffers, statements and the value that combines `source[base : base + width]` pairwise into one."""
    buffers, statements = [], []
    while width > 1:
        half = width // 2
        odd = width % 2
        target = local([half + odd], dtype, "folded")

        def pair(i: Expr, source: Var = source, base: int = base, half: int = half, target: Var = target) -> Stmt:
            value = reducer.combine(load(source, [base + i]), load(source, [base + half + i]))
            return store(target, value, [i])

        statements.append(vector(half, pair))
        if odd:
            zero = tirx.const(half, "int64")
            statements.append(store(target, load(source, [zero + (base + half)]), [zero]))
        buffers.append(target)
        source, base, width = target, 0, half + odd
    return buffers, statements, load(source, [tirx.const(base, "int64")])


def reduce_contiguous(
    stage: Stage,
    reducer: Reducer,
    extent: Extent,
    lanes: int,
    outer: Callable[[Callable[[Mapping[Var, Expr]], Stmt]], Stmt],
    at: Callable[[Expr], Mapping[Var, Expr]],
    finish: Callable[[Expr], Stmt],
) -> Stmt:
    """Return code that reduces one element in lanes along a contiguous axis of `extent`.

    `outer(body)` wraps `body` in the loops of the other reduction axes and hands it their values; `at(i)` gives the
    contiguous axis's; `finish(total)` stores the result.
    """
    dtype = accumulator_dtype(stage)
    width = lanes_for(extent, lanes)
    lanes_buffer, total = local([width], dtype, "lanes"), local([1], dtype, "total")
    zero = tirx.const(0, "int64")
    identity = reducer.identity.astype(dtype)

    def step(buffer: Var, position: Expr, point: Mapping[Var, Expr]) -> Stmt:
        return store(buffer, reducer.combine(load(buffer, [position]), term_at(stage, reducer, point)), [position])

    def main(values: Mapping[Var, Expr]) -> Stmt:
        return loop(count, lambda i: vector(width, lambda v: step(lanes_buffer, v, {**values, **at(i * width + v)})))

    def tail(values: Mapping[Var, Expr]) -> Stmt:
        return loop(rest, lambda i: step(total, zero, {**values, **at(tirx.const(0, "int64") + count * width + i)}))

    count, rest = quotient(extent, width), remainder(extent, width)
    buffers, folding, folded = fold_lanes(reducer, lanes_buffer, 0, width, dtype)
    initial = stage.initial.astype(dtype) if stage.initial is not None else identity
    statements = [
        vector(width, lambda v: store(lanes_buffer, identity, [v])),
        store(total, initial, [zero]),
        outer(main),
        *([] if isinstance(rest, int) and rest == 0 else [outer(tail)]),
        *folding,
        finish(reducer.combine(load(total, [zero]), folded).astype(stage.output.dtype)),
    ]
    return with_local([lanes_buffer, total, *buffers], [sequence(statements)])
