"""How attention looks as stages: product, what is done to a score, maximum, exponential, sum, quotient, product."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import occurs
from schedules.family import Kernel
from schedules.reducer import reducer_of
from schedules.stages import Axis, Stage, StagedFunction, bind, loads_of, replace_loads, substitute

FLOAT = "float32"


@dataclass(frozen=True, eq=False)
class AttentionAnalysis:
    """The parts of an attention over the axes of its output and the two reduced ones, `key` and `depth`.

    `lane` is the longest axis that keys and values do not have, that of the queries; None where there is one query.
    `query`, `keys` and `values` are elements at `outer`, `lane` and the axes that they depend on. `logit` is what the
    softmax is taken of, in terms of the variable `score`, `outer`, `lane` and `key`. `zero_if_empty` says that a query
    whose sum of exponentials is not positive gives zeros. `sink` is one more logit of a query, or None. `rounded` says
    that the operands of both products are rounded to bfloat16; the elements here are not.
    """

    outer: tuple[Axis, ...]
    lane: Axis | None
    key: Axis
    depth: Axis
    column: Axis
    query: Expr
    keys: Expr
    values: Expr
    score: Var
    logit: Expr
    zero_if_empty: bool
    output: Var
    indices: tuple[Expr, ...]
    sink: Expr | None = None
    rounded: bool = False


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> Kernel | None:
    """Return the function as one kernel if it is one attention."""
    stages = tuple(stage for stage in staged.stages if isinstance(stage, Stage))
    if len(stages) != len(staged.stages) or analyse(stages) is None:
        return None
    return Kernel(stages, staged.intermediate)


def analyse(stages: Sequence[Stage]) -> AttentionAnalysis | None:
    """Return the analysis of stages that end in softmax(f(query x keys)) x values; None for anything else."""
    if len(stages) < 5:
        return None
    return _Matcher(stages).match()


def scale_of_score(analysis: AttentionAnalysis, logit: Expr) -> float | None:
    """Return the positive constant that makes a score a logit; None where more is done to it, or there is a sink."""
    if analysis.sink is not None:
        return None
    if logit.same_as(analysis.score):
        return 1.0
    if not isinstance(logit, tirx.Mul):
        return None
    for factor, score in ((logit.a, logit.b), (logit.b, logit.a)):
        if score.same_as(analysis.score) and isinstance(factor, tirx.FloatImm) and factor.value > 0:
            return float(factor.value)
    return None


class _Mismatch(Exception):
    pass


class _Matcher:
    """Follows the stages from the last one up."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.output = stages[-1].output
        rounded = _rounded(stages[-1], stages[-2])
        self.last = stages[-2] if rounded else stages[-1]
        self.producers = list(stages[:-2] if rounded else stages[:-1])

    def match(self) -> AttentionAnalysis | None:
        try:
            return self._match()
        except _Mismatch:
            return None

    def _match(self) -> AttentionAnalysis:
        key = _only_reduction(self.last)
        weight, values = self._factors(self.last)
        (weight, values), rounded = _unrounded((weight, values))
        exponential, total, zero_if_empty = self._normalized(weight)
        exponent = self._producer(exponential.source)
        _require(not exponent.is_reduction)
        logit, largest = _difference_in_exponential(_value_at(exponent, exponential.indices))
        total, largest, sink = self._without_sink(total, largest)
        self._check_reduction(total, tirx.Add, exponential, key)
        self._check_reduction(largest, tirx.Max, logit, key)
        logit = self._expanded(logit)
        scores = [load for load in loads_of(logit) if self._is_made(load)]
        _require(bool(scores) and all(tvm_ffi.structural_equal(load, scores[0]) for load in scores))
        product_stage = self._producer(scores[0].source)
        score = Var("score", str(product_stage.output.dtype))
        logit = replace_loads(logit, lambda load: score if self._is_made(load) else None)
        depth = _only_reduction(product_stage)
        point = bind(product_stage.indices, scores[0].indices)
        factors, also_rounded = _unrounded(_terms(product_stage))
        _require(rounded == also_rounded)
        left, right = (substitute(self._expanded(factor), point) for factor in factors)
        parts = (left, right), self._expanded(values)
        sink = None if sink is None else self._expanded(sink)
        return replace(self._roles(key, depth, parts, score, logit, zero_if_empty, sink), rounded=rounded)

    def _roles(
        self,
        key: Axis,
        depth: Axis,
        parts: tuple[tuple[Expr, Expr], Expr],
        score: Var,
        logit: Expr,
        zero_if_empty: bool,
        sink: Expr | None,
    ) -> AttentionAnalysis:
        factors, values = parts
        queries = [factor for factor in factors if not _depends(factor, key)]
        _require(len(queries) == 1)
        query = queries[0]
        keys = factors[1] if factors[0] is query else factors[0]
        columns = [axis for axis in self.last.spatial if not any(_depends(e, axis) for e in (query, keys, logit))]
        _require(len(columns) == 1 and _depends(values, columns[0]))
        lanes = [
            axis
            for axis in self.last.spatial
            if axis is not columns[0] and not _depends(keys, axis) and not _depends(values, axis)
        ]
        symbolic = [axis for axis in lanes if not axis.static]
        lane = symbolic[-1] if symbolic else max(lanes, key=lambda axis: int(axis.extent), default=None)
        outer = tuple(axis for axis in self.last.spatial if axis is not columns[0] and axis is not lane)
        return AttentionAnalysis(
            outer, lane, key, depth, columns[0], query, keys, values, score, logit, zero_if_empty,
            self.output, self.last.indices, sink,
        )  # fmt: skip

    def _producer(self, buffer: Var) -> Stage:
        found = [stage for stage in self.producers if stage.output.same_as(buffer)]
        _require(len(found) == 1)
        return found[0]

    def _is_made(self, load: TensorLoad) -> bool:
        return any(stage.output.same_as(load.source) for stage in self.producers)

    def _factors(self, stage: Stage) -> tuple[Expr, Expr]:
        """Return the probabilities' element and the values'."""
        left, right = _terms(stage)
        return (left, right) if any(self._is_made(load) for load in loads_of(left)) else (right, left)

    def _expanded(self, expression: Expr) -> Expr:
        """Return `expression` with elementwise stages replaced by their values."""

        def expand(load: TensorLoad) -> Expr | None:
            if not self._is_made(load):
                return None
            stage = self._producer(load.source)
            return None if stage.is_reduction else self._expanded(_value_at(stage, load.indices))

        return replace_loads(expression, expand)

    def _normalized(self, weight: Expr) -> tuple[TensorLoad, TensorLoad, bool]:
        """Return the exponential and the sum that it is divided by; the probability may be 0 for an empty sum."""
        _require(isinstance(weight, TensorLoad))
        value = _value_at(self._producer(weight.source), weight.indices)
        zero_if_empty = False
        if isinstance(value, tirx.Select):
            _require(_is_positive(value.condition) and _is_zero(value.false_value))
            value, zero_if_empty = value.true_value, True
        _require(isinstance(value, tirx.Div))
        _require(isinstance(value.a, TensorLoad) and isinstance(value.b, TensorLoad))
        return value.a, value.b, zero_if_empty

    def _without_sink(self, total: TensorLoad, largest: TensorLoad) -> tuple[TensorLoad, TensorLoad, Expr | None]:
        """Return the sum and the maximum over the keys alone, and the sink that is added to both."""
        stage = self._producer(total.source)
        if stage.is_reduction:
            return total, largest, None
        value = _value_at(stage, total.indices)
        most = _value_at(self._producer(largest.source), largest.indices)
        _require(isinstance(value, tirx.Add) and isinstance(most, tirx.Max))
        _require(isinstance(value.a, TensorLoad) and isinstance(most.a, TensorLoad))
        exponential = value.b
        _require(isinstance(exponential, ir.Call) and exponential.op.name == "tirx.exp")
        difference = exponential.args[0]
        _require(isinstance(difference, tirx.Sub) and bool(tvm_ffi.structural_equal(difference.b, largest)))
        _require(bool(tvm_ffi.structural_equal(difference.a, most.b)))
        return value.a, most.a, most.b

    def _check_reduction(self, result: TensorLoad, kind: type, term: Expr, key: Axis) -> None:
        """Require that `result` is the reduction of `term` over the keys."""
        stage = self._producer(result.source)
        axis = _only_reduction(stage)
        reducer = reducer_of(stage)
        _require(reducer is not None and isinstance(stage.value, kind))
        assert reducer is not None
        point = {**bind(stage.indices, result.indices), axis.variable: key.variable}
        _require(bool(tvm_ffi.structural_equal(substitute(reducer.term, point), term)))


def _rounded(last: Stage, before: Stage) -> bool:
    """Return whether the last stage only casts each result of the one before."""
    value = last.value
    if last.is_reduction or not isinstance(value, tirx.Cast) or not isinstance(value.value, TensorLoad):
        return False
    load = value.value
    return load.source.same_as(before.output) and bool(tvm_ffi.structural_equal(list(load.indices), list(last.indices)))


def _require(condition: bool) -> None:
    if not condition:
        raise _Mismatch


def _is_positive(condition: Expr) -> bool:
    """Return whether a condition says that a number is greater than 0, which TVM may have turned around."""
    if isinstance(condition, tirx.LT):
        return _is_zero(condition.a) and isinstance(condition.b, TensorLoad)
    return isinstance(condition, tirx.GT) and _is_zero(condition.b) and isinstance(condition.a, TensorLoad)


def _is_zero(expression: Expr) -> bool:
    return isinstance(expression, tirx.FloatImm) and expression.value == 0


def _only_reduction(stage: Stage) -> Axis:
    _require(stage.is_reduction and len(stage.reduction) == 1)
    return stage.reduction[0]


def _terms(stage: Stage) -> tuple[Expr, Expr]:
    """Return the factors of the products that a stage adds up."""
    reducer = reducer_of(stage)
    _require(reducer is not None and isinstance(stage.value, tirx.Add))
    assert reducer is not None
    _require(isinstance(reducer.term, tirx.Mul))
    return reducer.term.a, reducer.term.b


def _unrounded(factors: tuple[Expr, Expr]) -> tuple[tuple[Expr, Expr], bool]:
    """Return factors before they are rounded to bfloat16, and whether both are."""
    found = [without_rounding(factor) for factor in factors]
    if None in found:
        return factors, False
    left, right = found
    assert left is not None
    assert right is not None
    return (left, right), True


def without_rounding(factor: Expr) -> Expr | None:
    """Return x of an fp32 number x that is rounded to bfloat16 and widened again; None for anything else."""
    for dtype in (FLOAT, "bfloat16"):
        if not isinstance(factor, tirx.Cast) or str(factor.ty.dtype) != dtype:
            return None
        factor = factor.value
    return factor if str(factor.ty.dtype) == FLOAT else None


def _value_at(stage: Stage, indices: Sequence[Expr]) -> Expr:
    return substitute(stage.value, bind(stage.indices, indices))


def _difference_in_exponential(value: Expr) -> tuple[TensorLoad, TensorLoad]:
    _require(isinstance(value, ir.Call) and value.op.name == "tirx.exp")
    difference = value.args[0]
    _require(isinstance(difference, tirx.Sub))
    _require(isinstance(difference.a, TensorLoad) and isinstance(difference.b, TensorLoad))
    return difference.a, difference.b


def _depends(expression: Expr, axis: Axis) -> bool:
    return occurs(expression, axis.variable)
