"""Loops whose trip count is only known at run time, as a private recursive Relax function.

Relax has no loop, and its virtual machine recurses on the native stack. So the function runs `count` iterations as a
first half and a second half: the stack grows with the logarithm of the trip count.

    repeat(count, index, active, carried...) =
        (index, active, carried..., no rows)                                    if count <= 0 or not active
        step(index, active, carried...)                                         if count == 1
        repeat(count - count/2, repeat(count/2, ...)...), rows of both joined   otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tvm.ir
import tvm.sym
from tvm import relax, tirx

from optimizer.frontend.dimensions import Dimension, Shape, as_expression, provably_equal, simplified
from optimizer.frontend.node import Node
from optimizer.frontend.value import (
    AnyValue,
    ConstantValue,
    IntegerValue,
    SequenceValue,
    TensorValue,
    Value,
    integer_value,
)

MOST_TRIPS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Iteration:
    """What one iteration makes: whether to go on, the carried values, and one row for each collected output."""

    active: Value
    carried: Sequence[Value]
    rows: Sequence[Value]


# (index, active, carried values, captured values by name) -> what the iteration makes
Step = Callable[[Value, Value, Sequence[Value], Mapping[str, AnyValue]], Iteration]


@dataclass(frozen=True)
class _State:
    """Type of a value in the loop, in the symbols around it; a dimension that changes while it runs is None."""

    dtype: str
    shape: tuple[Dimension | None, ...]
    narrow_type: int | None = None


_INDEX, _ACTIVE = _State("int64", ()), _State("bool", ())


@dataclass(frozen=True)
class _Frame:
    """The function's view of the values around the loop: its own symbols for theirs, its own parameters."""

    inward: tvm.sym.Analyzer
    outward: tvm.sym.Analyzer
    symbols: tuple[tirx.Var, ...]
    captured: dict[str, AnyValue]
    parameters: list[relax.Var]

    def inside(self, dimension: Dimension) -> Dimension:
        """Return a dimension of the code around the loop in the function's symbols."""
        return dimension if isinstance(dimension, int) else simplified(self.inward.simplify(dimension))

    def outside(self, dimension: Dimension) -> Dimension | None:
        """Return the function's dimension in the symbols around the loop, or None if those do not determine it."""
        if isinstance(dimension, int):
            return dimension
        if not set(relax.analysis.free_symbolic_vars(relax.ShapeExpr([dimension]))) <= set(self.symbols):
            return None
        return simplified(self.outward.simplify(dimension))


def repeat(
    node: Node, count: Value, active: Value, initial: Sequence[Value], captured: Mapping[str, AnyValue], step: Step
) -> tuple[list[TensorValue], list[TensorValue]]:
    """Run `step` at most `count` times, while `active` holds; return the carried values and the stacked rows.

    `count` is an int64 scalar, `active` a boolean scalar. Carried values keep their type and rank; their shapes may
    change. The rows of an output have one shape, which must follow from the shapes around the loop.
    """
    loop = _Loop(node, initial, captured, step)
    loop.settle()
    return loop.call(loop.define(), count, active)


class _Loop:
    def __init__(self, node: Node, initial: Sequence[Value], captured: Mapping[str, AnyValue], step: Step) -> None:
        self._node = node
        self._builder = node.graph.builder
        self._initial = initial
        self._captured = captured
        self._step = step
        values = [*initial, *captured.values()]
        self._symbols = list(dict.fromkeys(symbol for value in values for symbol in _symbols(value)))
        self._carried = [_State(value.dtype, value.shape, value.narrow_type) for value in initial]
        self._rows: list[_State] = []

    def settle(self) -> None:
        """Find the shapes of the carried values: whatever an iteration changes becomes unknown."""
        while True:
            frame, (_, index, active, *carried) = self._frame()
            with self._function_scope(frame):
                self._builder._begin_binding_block()
                try:
                    made = self._step(index, active, carried, frame.captured)
                finally:
                    self._builder._end_block()
            self._rows = [self._row(row, frame) for row in made.rows]
            settled = [
                self._widened(state, value, frame) for state, value in zip(self._carried, made.carried, strict=True)
            ]
            if settled == self._carried:
                return
            self._carried = settled

    def define(self) -> tvm.ir.GlobalVar:
        """Add the recursive function to the module."""
        frame, (count, index, active, *carried) = self._frame()
        results = relax.TupleType([_annotation(state, frame) for state in self._results])
        name = self._builder.get_unique_name(f"{self._node.output_hint}_loop")
        # The builder merges functions that are equal, which two empty ones could be.
        empty = relax.Function.create_empty(frame.parameters, results).with_attr("empty", name)
        function = self._builder.add_func(empty, name)
        context = frame.parameters[: -3 - len(carried)]

        def step() -> relax.Expr:
            made = self._step(index, active, carried, frame.captured)
            after = self._emit(relax.op.add(index.expr, relax.const(1, "int64")))
            rows = [relax.op.expand_dims(row.expr, 0) for row in made.rows]
            values = [value.expr for value in (made.active, *made.carried)]
            return relax.Tuple([after, *values, *map(self._emit, rows)])

        def halves() -> relax.Expr:
            half = self._emit(relax.op.floor_divide(count.expr, relax.const(2, "int64")))
            rest = self._emit(relax.op.subtract(count.expr, half))
            state = [index.expr, active.expr, *[value.expr for value in carried]]
            first = self._fields(tvm.ir.Call(function, [*context, half, *state]), frame)
            passed = first[: len(state)]
            second = self._fields(tvm.ir.Call(function, [*context, rest, *passed]), frame)
            pairs = zip(first[len(state) :], second[len(state) :], strict=True)
            rows = [self._emit(relax.op.concat([one, other], axis=0)) for one, other in pairs]
            return relax.Tuple([*second[: len(state)], *rows])

        def iterate() -> relax.Expr:
            is_last = self._emit(relax.op.equal(count.expr, relax.const(1, "int64")))
            return relax.If(is_last, self._node.graph.nested_block(step), self._node.graph.nested_block(halves))

        def stop() -> relax.Expr:
            state = [index.expr, active.expr, *[value.expr for value in carried]]
            return relax.Tuple([*state, *[self._emit(_no_rows(row, frame)) for row in self._rows]])

        with self._function_scope(frame):
            self._builder._begin_binding_block()
            try:
                pending = self._emit(relax.op.greater(count.expr, relax.const(0, "int64")))
                runs = self._emit(relax.op.logical_and(pending, active.expr))
                blocks = [self._node.graph.nested_block(branch) for branch in (iterate, stop)]
                result = self._emit(relax.If(runs, *blocks))
            finally:
                block = self._builder._end_block()
        body = relax.SeqExpr([block], result)
        self._builder.update_func(function, relax.Function(frame.parameters, body, results))
        return function

    def call(
        self, function: tvm.ir.GlobalVar, count: Value, active: Value
    ) -> tuple[list[TensorValue], list[TensorValue]]:
        """Call the function from the code around the loop."""
        context: list[relax.Expr] = [relax.ShapeExpr(self._symbols)] if self._symbols else []
        for value in self._captured.values():
            context.extend(_tensors(value))
        state = [count.expr, relax.const(0, "int64"), active.expr, *[value.expr for value in self._initial]]
        fields = self._fields(tvm.ir.Call(function, [*context, *state]), None)
        values = [TensorValue(field, result.narrow_type) for field, result in zip(fields, self._results, strict=True)]
        return values[2 : 2 + len(self._carried)], values[2 + len(self._carried) :]

    @property
    def _results(self) -> list[_State]:
        rows = [_State(row.dtype, (None, *row.shape), row.narrow_type) for row in self._rows]
        return [_INDEX, _ACTIVE, *self._carried, *rows]

    def _frame(self) -> tuple[_Frame, list[Value]]:
        """Return a new frame, and the parameters count, index, active and the carried values."""
        fresh = self._node.graph.symbols.fresh
        inner = tuple(fresh(str(symbol.name)) for symbol in self._symbols)
        inward, outward = tvm.sym.Analyzer(), tvm.sym.Analyzer()
        for symbol, own in zip(self._symbols, inner, strict=True):
            inward.bind(symbol, own)
            outward.bind(own, symbol)
        frame = _Frame(inward, outward, inner, {}, [])
        if inner:
            frame.parameters.append(relax.Var("sizes", relax.ShapeType(list(inner))))
        for name, value in self._captured.items():
            frame.captured[name] = self._parameter(value, self._node.graph.identifier(name), frame)
        states = [_INDEX, _INDEX, _ACTIVE, *self._carried]
        names = ["count", "index", "active", *[f"carried{number}" for number in range(len(self._carried))]]
        values: list[Value] = []
        for state, name in zip(states, names, strict=True):
            shape = [
                frame.inside(d) if d is not None else fresh(f"{name}_dim{axis}") for axis, d in enumerate(state.shape)
            ]
            values.append(_new_parameter(name, state.dtype, shape, state.narrow_type, frame))
        return frame, values

    def _parameter(self, value: AnyValue, name: str, frame: _Frame) -> AnyValue:
        """Return a captured value as the function sees it."""
        if isinstance(value, SequenceValue):
            items = [self._parameter(item, f"{name}_{index}", frame) for index, item in enumerate(value.items)]
            return SequenceValue([item for item in items if isinstance(item, Value)])
        if isinstance(value, IntegerValue):
            elements = np.empty(value.integers.shape, dtype=object)
            elements.ravel()[:] = [frame.inside(element) for element in value.integers.ravel()]
            return integer_value(elements, value.dtype, self._builder)
        if isinstance(value, ConstantValue):
            return value
        shape = [frame.inside(dimension) for dimension in value.shape]
        return _new_parameter(name, value.dtype, shape, value.narrow_type, frame)

    @contextmanager
    def _function_scope(self, frame: _Frame) -> Iterator[None]:
        self._builder.begin_scope(frame.parameters)
        try:
            yield
        finally:
            self._builder.end_scope()

    def _emit(self, expr: relax.Expr) -> relax.Var:
        return self._builder.emit(expr)

    def _fields(self, call: relax.Expr, frame: _Frame | None) -> list[relax.Var]:
        """Return the results of a call of the function, with a symbol for every dimension; `frame` is the caller's."""
        bound = self._emit(call)
        fields: list[relax.Var] = []
        for number, state in enumerate(self._results):
            field = self._emit(relax.TupleGetItem(bound, number))
            if None in state.shape:
                known = [d if d is None or frame is None else frame.inside(d) for d in state.shape]
                fresh = self._node.graph.symbols.fresh
                shape = [fresh(f"result{number}_dim{axis}") if d is None else d for axis, d in enumerate(known)]
                field = self._builder.match_cast(field, _tensor_type(shape, state.dtype))
            fields.append(field)
        return fields

    def _widened(self, state: _State, value: Value, frame: _Frame) -> _State:
        if value.dtype != state.dtype or value.rank != len(state.shape) or value.narrow_type != state.narrow_type:
            raise self._node.unsupported(
                f"a loop-carried value changes from {state.dtype} of rank {len(state.shape)} "
                f"to {value.dtype} of rank {value.rank}"
            )
        shape: list[Dimension | None] = []
        for before, own in zip(state.shape, value.shape, strict=True):
            after = frame.outside(own)
            keeps = before is not None and after is not None and provably_equal(before, after)
            shape.append(before if keeps else None)
        return _State(state.dtype, tuple(shape), state.narrow_type)

    def _row(self, value: Value, frame: _Frame) -> _State:
        shape = tuple(frame.outside(dimension) for dimension in value.shape)
        if None in shape:
            raise self._node.unsupported("the shape of a scan output is only known inside of the loop")
        return _State(value.dtype, shape, value.narrow_type)


def _symbols(value: AnyValue) -> list[tirx.Var]:
    """Return the symbols in the shapes and the symbolic elements of a value."""
    if isinstance(value, SequenceValue):
        return [symbol for item in value.items for symbol in _symbols(item)]
    dimensions: list[Dimension] = list(value.shape)
    if isinstance(value, IntegerValue):
        dimensions.extend(value.integers.ravel())
    return list(relax.analysis.free_symbolic_vars(relax.ShapeExpr([as_expression(d) for d in dimensions])))


def _tensors(value: AnyValue) -> list[relax.Expr]:
    """Return the tensors that a captured value becomes as arguments, in the order of the parameters."""
    if isinstance(value, SequenceValue):
        return [expr for item in value.items for expr in _tensors(item)]
    return [] if isinstance(value, (IntegerValue, ConstantValue)) else [value.expr]


def _new_parameter(
    name: str, dtype: str, shape: Sequence[Dimension], narrow_type: int | None, frame: _Frame
) -> TensorValue:
    parameter = relax.Var(name, _tensor_type(shape, dtype))
    frame.parameters.append(parameter)
    return TensorValue(parameter, narrow_type)


def _tensor_type(shape: Sequence[Dimension], dtype: str) -> relax.TensorType:
    return relax.TensorType([as_expression(dimension) for dimension in shape], dtype)


def _annotation(state: _State, frame: _Frame) -> relax.TensorType:
    if None in state.shape:
        return relax.TensorType(dtype=state.dtype, ndim=len(state.shape))
    return _tensor_type(_inside(state, frame), state.dtype)


def _inside(state: _State, frame: _Frame) -> Shape:
    return tuple(frame.inside(dimension) for dimension in state.shape if dimension is not None)


def _no_rows(row: _State, frame: _Frame) -> relax.Expr:
    return relax.op.zeros([as_expression(dimension) for dimension in (0, *_inside(row, frame))], row.dtype)
