"""The operator of a reduction, and reductions along a contiguous axis in vector lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_call import intrinsic
from schedules.loops import Extent, index, load, local, loop, quotient, remainder, store, vector, with_local
from schedules.stages import Stage, loads_of, replace_loads, sequence, substitute

NARROW_FLOATS = ("float16", "bfloat16")
# How many times as many lanes as a vector statement has are added up side by side: a sum waits for the one before it.
REGISTERS = 4
# Requests for lines that belong to a vector of a walk, from its first position and width.
Requests = Callable[[Expr, int], list[Stmt]]
# Elements of 32 bits within which every instruction set shuffles cheaply.
SEGMENT = 4


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
    """Return the type to accumulate in: fp32 for 16-bit floats, which is exact for extrema."""
    narrow = str(stage.output.dtype) in NARROW_FLOATS and reducer_of(stage) is not None
    return "float32" if narrow else str(stage.output.dtype)


def accumulate(stage: Stage, accumulator: Expr, point: Mapping[Var, Expr]) -> Expr:
    """Return the next value of `accumulator`, of `accumulator_dtype`, at `point` of the stage's axes."""
    wide = widened(stage)
    value = substitute(wide.value, point)
    return replace_loads(value, lambda read: accumulator if read.source.same_as(wide.output) else None)


def widened(stage: Stage) -> Stage:
    """Return a stage that reduces in the type that accumulates: 16-bit floats in fp32, others as they are."""
    reducer, dtype = reducer_of(stage), accumulator_dtype(stage)
    if reducer is None or stage.initial is None or dtype == str(stage.output.dtype):
        return stage
    output = tirx.decl_buffer(stage.output.shape, dtype, stage.output.name)
    value = reducer.combine(load(output, stage.indices), widen(reducer.term))
    return replace(stage, output=output, initial=stage.initial.astype(dtype), value=value)


def widen(term: Expr) -> Expr:
    """Return a 16-bit float expression computed in fp32; products of 16-bit floats are exact there."""
    if isinstance(term, tirx.Mul | tirx.Add | tirx.Sub):
        left, right = widen(term.a), widen(term.b)
        if isinstance(term, tirx.Mul):
            return left * right
        return left + right if isinstance(term, tirx.Add) else left - right
    return term.astype("float32")


def read_in_fp32(stage: Stage, read: TensorLoad) -> Expr:
    """Return what widens a read in a stage's value, or the read itself where nothing does."""
    return next((each for each in in_fp32(stage) if isinstance(each, tirx.Cast) and each.value.same_as(read)), read)


def in_fp32(stage: Stage) -> list[Expr]:
    """Return the reads of fp32 in a stage's value, and those of 16-bit floats with what widens them."""
    found: list[Expr] = [read for read in stage.loads() if str(read.source.dtype) == "float32"]

    def note(cast: tirx.Cast) -> None:
        narrow = isinstance(cast.value, TensorLoad) and str(cast.value.source.dtype) in NARROW_FLOATS
        if narrow and str(cast.ty.dtype) == "float32":
            found.append(cast)

    tvm_ffi.structural_walk(stage.value, (tirx.Cast, note))
    return found


def term_at(stage: Stage, reducer: Reducer, point: Mapping[Var, Expr]) -> Expr:
    """Return the term at `point` of the stage's axes in the type that accumulates."""
    term = substitute(reducer.term, point)
    return widen(term) if accumulator_dtype(stage) != str(stage.output.dtype) else term


def lanes_for(extent: Extent, lanes: int, most: int = REGISTERS) -> int:
    """Return how many lanes accumulate side by side: 1, 2 or 4 registers up to `most`, no more than the axis has."""
    if not isinstance(extent, int):
        return lanes
    if extent < lanes:
        return 1 << (extent.bit_length() - 1)
    return lanes * min(most, 1 << ((extent // lanes).bit_length() - 1))


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def fold(reducer: Reducer, vector_value: Expr, lanes: int) -> Expr:
    """Return all lanes of a vector, a power of two of them, combined pairwise into one."""
    return folds(reducer, [vector_value], lanes) if lanes > 1 else vector_value


def folds(reducer: Reducer, vectors: Sequence[Expr], lanes: int) -> Expr:
    """Return one vector of the folds of some vectors, in their order; their number is a power of two, at most `lanes`.

    Each step makes one vector of two, so that a fold costs about one step instead of log2(lanes). The lanes of one fold
    lie side by side until they fit the 128 bits within which shuffles are cheapest; from there on folds are paired.
    """
    if len(vectors) == 1 and lanes > 1 and _sums_integers(reducer, vectors[0]):
        # LLVM 22 finds sums of products of bytes by their shuffles, takes vpdpbusd for them, and forgets to add that
        # instruction's own four sums where each shuffle is of half as many lanes as the one before it.
        return intrinsic(reducer.identity.ty.dtype, "llvm.vector.reduce.add", vectors[0])
    bound: list[tuple[Var, Expr]] = []

    def combined(sources: Sequence[Expr], low: Sequence[int], apart: int) -> Expr:
        parts = [tirx.Shuffle(list(sources), [lane + offset for lane in low]) for offset in (0, apart)]
        return bind(reducer.combine(*parts))

    def bind(value: Expr) -> Expr:
        bound.append((Var("lanes", value.ty), value))
        return bound[-1][0]

    rest = [bind(vector_value) for vector_value in vectors]
    width = lanes
    while width > len(rest):
        width //= 2
        rest = [combined([each], range(width), width) for each in rest]
    segment = min(SEGMENT, width)
    terms = width
    while len(rest) > segment:
        starts = range(0, 2 * width, terms)
        low = [start + lane for start in starts for lane in range(terms // 2)]
        distance = segment
        pairs = [(first, first + distance) for first in range(len(rest)) if first // distance % 2 == 0]
        rest = [combined([rest[first], rest[second]], low, terms // 2) for first, second in pairs]
        terms //= 2
    while len(rest) > 1:
        low = [
            source * width + start + lane
            for start in range(0, width, segment)
            for source in range(2)
            for lane in range(0, segment, 2)
        ]
        rest = [combined(pair, low, 1) for pair in zip(rest[::2], rest[1::2], strict=True)]
    result = rest[0]
    for variable, value in reversed(bound):
        result = tirx.Let(variable, value, result)
    return result


def _sums_integers(reducer: Reducer, value: Expr) -> bool:
    """Return whether a reducer of vectors like `value` adds integers."""
    dtype = str(reducer.identity.ty.dtype)
    return "int" in dtype and isinstance(reducer.combine(Var("a", value.ty), Var("b", value.ty)), tirx.Add)


def load_lanes(buffer: Var, base: Expr, lanes: int) -> Expr:
    """Return `lanes` neighbouring elements of `buffer` as one vector."""
    return load(buffer, [base if lanes == 1 else tirx.Ramp(base, index(1), lanes)])


@dataclass(frozen=True, eq=False)
class _Walk:
    """Part of an axis: `count` vectors of `width` lanes from `start`, of which the first `known` lanes do not count."""

    width: int
    start: Expr
    count: Extent
    known: int = 0


def _walks(extent: Extent, lanes: int, most: int) -> list[_Walk]:
    """Return the parts in which an axis is walked: `most` times `lanes` at once, `lanes`, and what is left.

    What is left of a static axis is one vector that ends where the axis ends, of a symbolic one single elements.
    """
    walks: list[_Walk] = []
    start, rest = index(0), extent
    for width in dict.fromkeys((lanes_for(extent, lanes, most), lanes_for(extent, lanes, most=1))):
        count = quotient(rest, width)
        if isinstance(count, int) and count == 0:
            continue
        walks.append(_Walk(width, start, count))
        start = start + count * width
        rest = remainder(rest, width)
    if not isinstance(rest, int):
        walks.append(_Walk(1, start, rest))
    elif rest and isinstance(extent, int):
        width = power_of_two(rest)
        walks.append(_Walk(width, index(extent - width), 1, width - rest))
    return walks


@dataclass(frozen=True, eq=False)
class Beside:
    """A reduction that shares the walk of another one: `at` gives its axes' values at a position of the walk.

    `before` is done at each point before its term is read.
    """

    stage: Stage
    reducer: Reducer
    at: Callable[[Expr], Mapping[Var, Expr]]
    finish: Callable[[Expr], Stmt]
    before: Callable[[Mapping[Var, Expr]], Stmt] | None = None

    @property
    def identity(self) -> Expr:
        """What leaves a total as it is, of the type that accumulates."""
        return self.reducer.identity.astype(accumulator_dtype(self.stage))

    def ahead(self, width: int, point: Callable[[Expr], Mapping[Var, Expr]]) -> Stmt:
        """Return what is done before the terms at `point` of each lane."""
        before = self.before
        assert before is not None
        return vector(width, lambda lane: before(point(lane)))

    def step(self, walk: _Walk, buffer: Var, point: Callable[[Expr], Mapping[Var, Expr]]) -> Stmt:
        """Return the step that combines the terms at `point` of each lane with a buffer of totals."""

        def combine(lane: Expr) -> Stmt:
            term = term_at(self.stage, self.reducer, point(lane))
            if walk.known:
                term = tirx.Select(lane >= walk.known, term, self.identity)
            return store(buffer, self.reducer.combine(load(buffer, [lane]), term), [lane])

        return vector(walk.width, combine)


def reduce_contiguous(
    stage: Stage,
    reducer: Reducer,
    extent: Extent,
    lanes: int,
    outer: Callable[[Callable[[Mapping[Var, Expr]], Stmt]], Stmt],
    at: Callable[[Expr], Mapping[Var, Expr]],
    finish: Callable[[Expr], Stmt],
    before: Callable[[Mapping[Var, Expr]], Stmt] | None = None,
    beside: Beside | None = None,
    ahead: Requests | None = None,
    registers: int = REGISTERS,
) -> Stmt:
    """Return code that reduces one element in lanes along a contiguous axis of `extent`.

    `outer(body)` wraps `body` in the loops of the other reduction axes and hands it their values; `at(i)` gives the
    contiguous axis's; `finish(total)` stores the result; `before` is done at each point before its term is read. The
    axis is walked by so many `registers` of `lanes` at once (by one where there is `before`, which needs its own ones).
    `beside` is another reduction of the same extent, where there are no other axes; `ahead` has requests for lines that
    are done on the way.
    """
    own = [Beside(stage, reducer, at, finish, before), *([beside] if beside is not None else [])]
    buffers: list[Var] = []
    initialize, accumulate_all = [], []
    totals: list[Expr] = []
    for each in own:
        assert each.stage.initial is not None
        totals.append(each.stage.initial.astype(accumulator_dtype(each.stage)))

    def steps(walk: _Walk, sums: Sequence[Var], values: Mapping[Var, Expr], position: Expr) -> Stmt:
        def point(each: Beside) -> Callable[[Expr], Mapping[Var, Expr]]:
            return lambda lane: {**values, **each.at(position + lane)}

        first = [] if ahead is None else ahead(position, walk.width)
        first += [each.ahead(walk.width, point(each)) for each in own if each.before is not None]
        return sequence([*first, *(each.step(walk, total, point(each)) for each, total in zip(own, sums, strict=True))])

    most = 1 if any(each.before is not None for each in own) else registers
    for number, walk in enumerate(_walks(extent, lanes, most)):
        sums = [local([walk.width], accumulator_dtype(each.stage), f"lanes{number}") for each in own]
        for each, buffer in zip(own, sums, strict=True):
            initialize.append(vector(walk.width, lambda lane, b=buffer, i=each.identity: store(b, i, [lane])))

        def walked(values: Mapping[Var, Expr], w: _Walk = walk, b: Sequence[Var] = tuple(sums)) -> Stmt:
            return loop(w.count, lambda i: steps(w, b, values, w.start + i * w.width))

        accumulate_all.append(outer(walked))
        for place, (each, buffer) in enumerate(zip(own, sums, strict=True)):
            folded = fold(each.reducer, load_lanes(buffer, index(0), walk.width), walk.width)
            totals[place] = each.reducer.combine(totals[place], folded)
        buffers += sums
    finished = [each.finish(total.astype(each.stage.output.dtype)) for each, total in zip(own, totals, strict=True)]
    return with_local(buffers, [*initialize, *accumulate_all, *finished])
