"""Control flow: If, Loop, Scan. What is decided at compile time leaves no trace in the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from tvm import relax

from optimizer.frontend.dimensions import static_shape
from optimizer.frontend.loops import MOST_TRIPS, Iteration, repeat
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import AnyValue, SequenceValue, TensorValue, Value

_MOST_UNROLLED = 16  # iterations; beyond, code size costs more than the calls of the recursive function


@converter("If")
def if_(node: Node) -> Result:
    """Convert If: a known condition imports one branch in place, another becomes relax.If."""
    condition = node.input(0)
    branches = [node.subgraph(name) for name in ("then_branch", "else_branch")]
    if condition.constant is not None:
        taken = branches[0] if condition.constant.all() else branches[1]
        return node.graph.import_subgraph(taken, [])
    results: list[list[AnyValue]] = []

    def branch(graph: onnx.GraphProto) -> Callable[[], relax.Expr]:
        def body() -> relax.Expr:
            values = node.graph.import_subgraph(graph, [])
            results.append(values)
            return relax.Tuple([tensor.expr for value in values for tensor in _tensors(value)])

        return body

    with node.graph.names_restored():
        blocks = [node.graph.nested_block(branch(graph)) for graph in branches]
    fields = _merged(node, *results)
    bound = node.graph.builder.emit(relax.If(_scalar(node, condition), *blocks))
    tensors = iter(node.emit(relax.TupleGetItem(bound, index), narrow) for index, narrow in enumerate(fields))
    return [_like(value, tensors) for value in results[0]]


def _tensors(value: AnyValue) -> list[Value]:
    return list(value.items) if isinstance(value, SequenceValue) else [value]


def _like(value: AnyValue, tensors: Iterator[Value]) -> AnyValue:
    """Return the next of `tensors`, or a sequence of as many of them as `value` holds."""
    if isinstance(value, SequenceValue):
        return SequenceValue([next(tensors) for _ in value.items])
    return next(tensors)


def _merged(node: Node, then: Sequence[AnyValue], otherwise: Sequence[AnyValue]) -> list[int | None]:
    """Return the narrow types of the results; refuses branches whose results cannot be one Relax type."""
    narrow: list[int | None] = []
    for index, (one, other) in enumerate(zip(then, otherwise, strict=True)):
        kinds = [len(value.items) if isinstance(value, SequenceValue) else -1 for value in (one, other)]
        if kinds[0] != kinds[1]:
            raise node.unsupported(f"output {index} is a sequence whose length depends on the branch")
        for left, right in zip(_tensors(one), _tensors(other), strict=True):
            if (left.dtype, left.rank, left.narrow_type) != (right.dtype, right.rank, right.narrow_type):
                raise node.unsupported(
                    f"output {index} is {left.dtype} of rank {left.rank} in one branch, "
                    f"{right.dtype} of rank {right.rank} in the other"
                )
            narrow.append(left.narrow_type)
    return narrow


def _scalar(node: Node, value: Value) -> relax.Expr:
    return value.expr if value.rank == 0 else node.reshape(value, ()).expr


@converter("Loop")
def loop(node: Node) -> Result:
    """Convert Loop: few iterations of a known number are unrolled, others become a recursive function."""
    body = node.subgraph("body")
    count, condition = node.optional_input(0), node.optional_input(1)
    initial = [value for value in node.inputs[2:] if value is not None]
    trips = _known_trips(count, condition)
    if trips is not None and 0 < trips <= _MOST_UNROLLED and _runs_on(node, body, initial):
        return _unrolled(node, body, trips, initial)
    carried = _only_tensors(node, initial)

    def step(index: Value, active: Value, values: Sequence[Value], captured: Mapping[str, AnyValue]) -> Iteration:
        with node.graph.only_names(captured):
            results = _only_tensors(node, node.graph.import_subgraph(body, [index, active, *values]))
        goes_on, after, rows = results[0], results[1 : 1 + len(carried)], results[1 + len(carried) :]
        rows = _as_declared(node, rows, body.output[1 + len(carried) :])
        return Iteration(node.reshape(goes_on, ()) if goes_on.rank else goes_on, after, rows)

    most = count if count is not None else node.constant(np.array(MOST_TRIPS, np.int64))
    active = condition if condition is not None else node.constant(np.array(True))
    operands = [node.reshape(value, ()) if value.rank else value for value in (most, active)]
    final, rows = repeat(node, operands[0], operands[1], carried, node.graph.captured(body), step)
    return [*final, *rows]


def _known_trips(count: Value | None, condition: Value | None) -> int | None:
    """Return the trip count if it is known, as far as the condition at the start says."""
    if condition is not None:
        known = condition.constant
        if known is None:
            return None
        if not known.all():
            return 0
    return None if count is None or count.constant is None else int(count.constant.item())


def _runs_on(node: Node, body: onnx.GraphProto, initial: Sequence[AnyValue]) -> bool:
    """Return whether the condition that the body makes is always true."""
    true = node.constant(np.array(True))
    going_on: list[AnyValue] = []

    def attempt() -> relax.Expr:
        going_on.append(node.graph.import_subgraph(body, [node.constant(np.array(0, np.int64)), true, *initial])[0])
        return relax.Tuple([])

    node.graph.nested_block(attempt)
    value = going_on[0]
    return isinstance(value, Value) and value.constant is not None and bool(value.constant.all())


def _unrolled(node: Node, body: onnx.GraphProto, trips: int, initial: Sequence[AnyValue]) -> Result:
    carried, true = list(initial), node.constant(np.array(True))
    rows: list[list[Value]] = [[] for _ in body.output[1 + len(carried) :]]
    for index in range(trips):
        results = node.graph.import_subgraph(body, [node.constant(np.array(index, np.int64)), true, *carried])
        carried, made = results[1 : 1 + len(carried)], results[1 + len(carried) :]
        for collected, row in zip(rows, _only_tensors(node, made), strict=True):
            collected.append(row)
    return [*carried, *[_stacked(node, collected) for collected in rows]]


def _stacked(node: Node, rows: Sequence[Value]) -> TensorValue:
    """Return rows of one shape stacked along a new first axis."""
    expanded = [node.emit(relax.op.expand_dims(row.expr, 0)).expr for row in rows]
    return node.emit(relax.op.concat(expanded, axis=0) if len(rows) > 1 else expanded[0], rows[0].narrow_type)


def _only_tensors(node: Node, values: Sequence[AnyValue]) -> list[Value]:
    tensors = [value for value in values if isinstance(value, Value)]
    if len(tensors) != len(values):
        raise node.unsupported("a sequence carried or collected by a loop whose trip count is not a small constant")
    return tensors


def _as_declared(node: Node, rows: Sequence[Value], declared: Sequence[onnx.ValueInfoProto]) -> list[Value]:
    """Return scan outputs with the dimensions that the subgraph declares where the import could not find any out.

    The module checks them when it runs.
    """
    result: list[Value] = []
    for row, output in zip(rows, declared, strict=True):
        dimensions = output.type.tensor_type.shape.dim
        if len(dimensions) != row.rank:
            result.append(row)
            continue
        pairs = zip(row.shape, dimensions, strict=True)
        shape = [d.dim_value if d.HasField("dim_value") and not isinstance(own, int) else own for own, d in pairs]
        result.append(TensorValue(node.reshaped_type(row, shape), row.narrow_type))
    return result


@converter("Scan", since=9)
def scan(node: Node) -> Result:
    """Convert Scan: a loop over slices of the scan inputs, each iteration giving slices of the scan outputs."""
    inputs = [node.input(index) for index in range(len(node.inputs))]
    scanned = node.integer("num_scan_inputs")
    initial, sources = inputs[: len(inputs) - scanned], inputs[len(inputs) - scanned :]
    axes = [
        node.checked_axis(axis, source.rank)
        for axis, source in zip(node.integers("scan_input_axes", [0] * scanned), sources, strict=True)
    ]
    backward = node.integers("scan_input_directions", [0] * scanned)
    results = _scanned(node, initial, sources, axes, backward)
    collected = results[len(initial) :]
    directions = node.integers("scan_output_directions", [0] * len(collected))
    places = node.integers("scan_output_axes", [0] * len(collected))
    turned = [_placed(node, *row) for row in zip(collected, directions, places, strict=True)]
    return [*results[: len(initial)], *turned]


def _placed(node: Node, rows: Value, reverse: int, axis: int) -> Value:
    """Return stacked rows in reverse order if asked for, with the stacking axis moved from the front to `axis`."""
    expr = node.emit(relax.op.flip(rows.expr, 0)).expr if reverse else rows.expr
    place = node.checked_axis(axis, rows.rank)
    order = [*range(1, place + 1), 0, *range(place + 1, rows.rank)]
    return node.emit(relax.op.permute_dims(expr, order) if place else expr, rows.narrow_type)


def _scanned(
    node: Node, initial: Sequence[Value], sources: Sequence[Value], axes: Sequence[int], backward: Sequence[int]
) -> list[Value]:
    """Return the final state and the rows, stacked along a first axis in the order of the iterations."""
    body = node.subgraph("body")
    length = sources[0].shape[axes[0]]
    true = node.constant(np.array(True))

    def slices(values: Sequence[Value], index: Value) -> list[Value]:
        picked: list[Value] = []
        for value, axis, reverse in zip(values, axes, backward, strict=True):
            place = index
            if reverse:
                last = node.integer_value(value.shape[axis] - 1)
                place = node.emit(relax.op.subtract(last.expr, index.expr))
            picked.append(node.emit(relax.op.take(value.expr, place.expr, axis=axis), value.narrow_type))
        return picked

    if isinstance(length, int) and 0 < length <= _MOST_UNROLLED:
        state: list[Value] = list(initial)
        rows: list[list[Value]] = [[] for _ in body.output[len(state) :]]
        for step_index in range(length):
            picked = slices(sources, node.constant(np.array(step_index, np.int64)))
            made = _only_tensors(node, node.graph.import_subgraph(body, [*state, *picked]))
            state = made[: len(state)]
            for collected, row in zip(rows, made[len(state) :], strict=True):
                collected.append(row)
        return [*state, *[_stacked(node, collected) for collected in rows]]

    # Names that no ONNX value can have, for the scan inputs among the captured values.
    names = [f"\0scan{index}" for index in range(len(sources))]

    def step(index: Value, active: Value, values: Sequence[Value], captured: Mapping[str, AnyValue]) -> Iteration:
        own = _only_tensors(node, [captured[name] for name in names])
        with node.graph.only_names(captured):
            made = _only_tensors(node, node.graph.import_subgraph(body, [*values, *slices(own, index)]))
        rows = _as_declared(node, made[len(initial) :], body.output[len(initial) :])
        return Iteration(active, made[: len(initial)], rows)

    captured = {**node.graph.captured(body), **dict(zip(names, sources, strict=True))}
    final, stacked = repeat(node, node.integer_value(length), true, initial, captured, step)
    # The loop always runs to its end, so that the number of rows is known.
    shapes = [(length, *rows.shape[1:]) for rows in stacked]
    known = [node.reshaped_type(rows, shape) for rows, shape in zip(stacked, shapes, strict=True)]
    return [*final, *[TensorValue(e, rows.narrow_type) for e, rows in zip(known, stacked, strict=True)]]


@converter("Scan", since=8)
def scan_batches(node: Node) -> Result:
    """Convert Scan of opset 8: its first input is the optional sequence lengths, and axis 0 of all others the batch."""
    if node.has_input(0):
        raise node.unsupported("sequence_lens")
    inputs = [node.input(index) for index in range(1, len(node.inputs))]
    batches = static_shape(tuple(value.shape[0] for value in inputs))
    if batches is None or not 0 < batches[0] <= _MOST_UNROLLED:
        raise node.unsupported(f"a batch of {inputs[0].shape[0]}; only small constant ones are supported")
    scanned = node.integer("num_scan_inputs")
    backward = node.integers("directions", [0] * scanned)
    per_batch: list[list[Value]] = []
    for batch in range(batches[0]):
        own = [node.emit(relax.op.take(value.expr, relax.const(batch, "int64"), axis=0)) for value in inputs]
        initial, sources = own[: len(own) - scanned], own[len(own) - scanned :]
        per_batch.append(_scanned(node, initial, sources, [0] * scanned, backward))
    return [_stacked(node, values) for values in zip(*per_batch, strict=True)]
