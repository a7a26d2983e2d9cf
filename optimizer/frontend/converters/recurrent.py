"""Recurrent layers: RNN, GRU, LSTM.

The inputs of all steps are projected by one matrix product; what is left for a step is the recurrent product and the
gates. Short sequences of known length are unrolled, others run in a loop (optimizer.frontend.loops).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.loops import Iteration, repeat
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import AnyValue, TensorValue, Value

_MOST_UNROLLED = 16  # steps
Activation = Callable[[relax.Expr], relax.Expr]


@dataclass(frozen=True)
class _Parameters:
    """What a step reads beside its state, by name; the loop hands it to the function that it becomes."""

    values: Mapping[str, Value]

    def expr(self, name: str) -> relax.Expr:
        return self.values[name].expr

    def has(self, name: str) -> bool:
        return name in self.values


# (node, projected input [B, gates * H], state [B, H]..., parameters, activations) -> the new state
Cell = Callable[[Node, relax.Expr, Sequence[Value], _Parameters, Sequence[Activation]], list[relax.Expr]]


@dataclass(frozen=True)
class _Layer:
    """A kind of layer: its gates, its number of states, its default activations, its step."""

    gates: int
    states: int
    activations: tuple[str, ...]
    cell: Cell


def _rnn_cell(
    node: Node, projected: relax.Expr, state: Sequence[Value], parameters: _Parameters, act: Sequence[Activation]
) -> list[relax.Expr]:
    """Return [f(Wx + Rh + b)]."""
    recurrent = relax.op.matmul(state[0].expr, parameters.expr("recurrent"))
    return [act[0](node.emit(relax.op.add(projected, recurrent)).expr)]


def _gru_cell(
    node: Node, projected: relax.Expr, state: Sequence[Value], parameters: _Parameters, act: Sequence[Activation]
) -> list[relax.Expr]:
    """Return [(1 - z) * candidate + z * h] with update gate z and reset gate r."""
    hidden = state[0].expr
    inputs = _gates(node, projected, 3)
    if node.integer("linear_before_reset", 0):
        product = relax.op.add(relax.op.matmul(hidden, parameters.expr("recurrent")), parameters.expr("candidate_bias"))
        products = _gates(node, node.emit(product).expr, 3)
        reset = act[0](relax.op.add(inputs[1], products[1]))
        from_hidden = relax.op.multiply(reset, products[2])
    else:
        products = _gates(node, node.emit(relax.op.matmul(hidden, parameters.expr("recurrent_gates"))).expr, 2)
        reset = act[0](relax.op.add(inputs[1], products[1]))
        kept = node.emit(relax.op.multiply(reset, hidden)).expr
        from_hidden = relax.op.matmul(kept, parameters.expr("recurrent_candidate"))
    update = node.emit(act[0](relax.op.add(inputs[0], products[0])))
    candidate = act[1](node.emit(relax.op.add(inputs[2], from_hidden)).expr)
    one = node.scalar(1, update.dtype)
    new = relax.op.multiply(relax.op.subtract(one, update.expr), candidate)
    return [relax.op.add(new, relax.op.multiply(update.expr, hidden))]


def _lstm_cell(
    node: Node, projected: relax.Expr, state: Sequence[Value], parameters: _Parameters, act: Sequence[Activation]
) -> list[relax.Expr]:
    """Return [o * h(c'), c'] with c' = f * c + i * candidate; peepholes add P * c to the gates."""
    hidden, memory = (value.expr for value in state)
    gates = node.emit(relax.op.add(projected, relax.op.matmul(hidden, parameters.expr("recurrent")))).expr
    into, out, forget, candidate = _gates(node, gates, 4)

    def peeped(gate: relax.Expr, cell: relax.Expr, name: str) -> relax.Expr:
        if not parameters.has(name):
            return gate
        return relax.op.add(gate, relax.op.multiply(parameters.expr(name), cell))

    admitted = node.emit(act[0](peeped(into, memory, "peephole_input")))
    if node.integer("input_forget", 0):
        kept = relax.op.subtract(node.scalar(1, admitted.dtype), admitted.expr)
    else:
        kept = act[0](peeped(forget, memory, "peephole_forget"))
    new = relax.op.multiply(admitted.expr, act[1](candidate))
    updated = node.emit(relax.op.add(relax.op.multiply(kept, memory), new)).expr
    shown = act[0](peeped(out, updated, "peephole_output"))
    return [relax.op.multiply(shown, act[2](updated)), updated]


def _gates(node: Node, stacked: relax.Expr, count: int) -> list[relax.Expr]:
    return [gate.expr for gate in node.emit_tuple(relax.op.split(stacked, count, axis=-1))]


_LAYERS = {
    "RNN": _Layer(gates=1, states=1, activations=("Tanh",), cell=_rnn_cell),
    "GRU": _Layer(gates=3, states=1, activations=("Sigmoid", "Tanh"), cell=_gru_cell),
    "LSTM": _Layer(gates=4, states=2, activations=("Sigmoid", "Tanh", "Tanh"), cell=_lstm_cell),
}


@converter("RNN", "GRU", "LSTM", since=7)
def recurrent(node: Node) -> Result:
    """Convert RNN, GRU and LSTM: X [T, B, I] to Y [T, D, B, H] and the final states [D, B, H].

    With layout=1 the batch comes first: X [B, T, I], Y [B, T, D, H], states [B, D, H].
    """
    layer = _LAYERS[node.operator]
    batch_first = node.integer("layout", 0)
    direction = node.string("direction", "forward")
    reversals = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
    if reversals is None:
        raise node.unsupported(f"direction '{direction}'")
    dtype = accumulation_dtype(node.input(0).dtype)
    data = node.cast(node.input(0), dtype)
    if batch_first:
        data = node.emit(relax.op.permute_dims(data.expr, [1, 0, 2]))
    sequences: list[relax.Expr] = []
    finals: list[list[relax.Expr]] = [[] for _ in range(layer.states)]
    activations = _activations(node, layer, len(reversals), dtype)
    for number, reverse in enumerate(reversals):
        state = _initial_state(node, layer, number, data, dtype)
        rows, last = _run(node, layer, number, data, state, activations[number], reverse=reverse)
        sequences.append(relax.op.expand_dims(rows.expr, 1))
        for final, value in zip(finals, last, strict=True):
            final.append(relax.op.expand_dims(value.expr, 0))
    joined = [_joined(node, sequences, 1), *[_joined(node, final, 0) for final in finals]]
    if batch_first:
        orders = [[2, 0, 1, 3], *[[1, 0, 2]] * layer.states]
        joined = [node.emit(relax.op.permute_dims(v.expr, o)) for v, o in zip(joined, orders, strict=True)]
    return [cast(value.expr, dtype, node.input(0).dtype) for value in joined]


def _joined(node: Node, parts: Sequence[relax.Expr], axis: int) -> TensorValue:
    return node.emit(relax.op.concat(list(parts), axis=axis) if len(parts) > 1 else parts[0])


def _direction(node: Node, index: int, number: int, dtype: str) -> Value:
    """Return the slice of a weight for one direction; of a constant, at compile time."""
    value = node.input(index)
    if value.constant is not None:
        return node.constant(value.constant[number].astype(dtype))
    picked = relax.op.take(value.expr, node.scalar(number, "int64"), axis=0)
    return node.cast(node.emit(picked), dtype)


def _columns(node: Node, weight: Value) -> Value:
    """Return a weight [N, K] as [K, N]."""
    if weight.constant is not None:
        return node.constant(np.ascontiguousarray(weight.constant.T))
    return node.emit(relax.op.permute_dims(weight.expr))


def _part(node: Node, value: Value, axis: int, start: int, end: int) -> Value:
    if value.constant is not None:
        return node.constant(np.take(value.constant, range(start, end), axis=axis))
    return node.emit(relax.op.strided_slice(value.expr, [axis], [start], [end]))


def _initial_state(node: Node, layer: _Layer, number: int, data: Value, dtype: str) -> list[Value]:
    hidden = _hidden_size(node)
    state: list[Value] = []
    for index in range(5, 5 + layer.states):
        if not node.has_input(index):
            state.append(node.emit(relax.op.zeros(relax.ShapeExpr([data.shape[1], hidden]), dtype)))
        elif node.integer("layout", 0):
            picked = relax.op.take(node.expr(index), node.scalar(number, "int64"), axis=1)
            state.append(node.cast(node.emit(picked), dtype))
        else:
            state.append(_direction(node, index, number, dtype))
    return state


def _hidden_size(node: Node) -> int:
    size = node.input(2).shape[2]
    if not isinstance(size, int):
        raise node.unsupported("the hidden size is not known at compile time")
    return size


def _parameters(node: Node, layer: _Layer, number: int, dtype: str) -> tuple[dict[str, Value], Value | None]:
    """Return the weights that a step needs, and the bias [gates * H] that is added to all projected inputs at once."""
    size = _hidden_size(node)
    recurrent = _columns(node, _direction(node, 2, number, dtype))
    values = {"recurrent": recurrent}
    reset_late = node.operator == "GRU" and node.integer("linear_before_reset", 0)
    if node.operator == "GRU" and not reset_late:
        values = {
            "recurrent_gates": _part(node, recurrent, 1, 0, 2 * size),
            "recurrent_candidate": _part(node, recurrent, 1, 2 * size, 3 * size),
        }
    width = layer.gates * size
    bias: Value | None = None
    candidate_bias: Value = node.constant(np.zeros(width, dtype))
    if node.has_input(3):
        both = _direction(node, 3, number, dtype)
        parts = [_part(node, both, 0, 0, width), _part(node, both, 0, width, 2 * width)]
        if reset_late:
            # The reset gate scales the recurrent bias too, so that one stays in the step.
            bias, candidate_bias = parts
        elif parts[0].constant is not None and parts[1].constant is not None:
            bias = node.constant(parts[0].constant + parts[1].constant)
        else:
            bias = node.emit(relax.op.add(parts[0].expr, parts[1].expr))
    if reset_late:
        values["candidate_bias"] = candidate_bias
    if node.operator == "LSTM" and node.has_input(7):
        peepholes = _direction(node, 7, number, dtype)
        for place, name in enumerate(("peephole_input", "peephole_output", "peephole_forget")):
            values[name] = _part(node, peepholes, 0, place * size, (place + 1) * size)
    return values, bias


def _run(
    node: Node,
    layer: _Layer,
    number: int,
    data: Value,
    state: Sequence[Value],
    activations: Sequence[Activation],
    *,
    reverse: bool,
) -> tuple[Value, Sequence[Value]]:
    """Return the hidden states of one direction [T, B, H], and its final states [B, H]."""
    values, bias = _parameters(node, layer, number, data.dtype)
    weight = _columns(node, _direction(node, 1, number, data.dtype))
    projected = relax.op.matmul(data.expr, weight.expr)
    values["projected"] = node.emit(projected if bias is None else relax.op.add(projected, bias.expr))
    if node.has_input(4):
        lengths = node.input(4)
        values["lengths"] = node.cast(node.reshape(lengths, (lengths.shape[0], 1)), "int64")
    length = data.shape[0]

    def at(index: Value, before: Sequence[Value], captured: Mapping[str, AnyValue]) -> tuple[Sequence[Value], Value]:
        """Return the state after the step `index` and the row of Y that it makes."""
        parameters = _Parameters({name: value for name, value in captured.items() if isinstance(value, Value)})
        time = index
        if reverse:
            last = node.integer_value(parameters.values["projected"].shape[0] - 1)
            time = node.emit(relax.op.subtract(last.expr, index.expr))
        current = node.emit(relax.op.take(parameters.expr("projected"), time.expr, axis=0, mode="clip"))
        made = [node.emit(new) for new in layer.cell(node, current.expr, before, parameters, activations)]
        if not parameters.has("lengths"):
            return made, made[0]
        runs = node.emit(relax.op.less(time.expr, parameters.expr("lengths"))).expr
        kept = [node.emit(relax.op.where(runs, new.expr, old.expr)) for new, old in zip(made, before, strict=True)]
        zero = node.scalar(0, data.dtype)
        return kept, node.emit(relax.op.where(runs, made[0].expr, zero))

    if isinstance(length, int) and 0 < length <= _MOST_UNROLLED:
        current, rows = list(state), []
        for index in range(length):
            current, row = at(node.constant(np.array(index, np.int64)), current, values)
            rows.append(relax.op.expand_dims(row.expr, 0))
        stacked = node.emit(relax.op.concat(rows, axis=0) if len(rows) > 1 else rows[0])
    else:

        def step(index: Value, active: Value, before: Sequence[Value], captured: Mapping[str, AnyValue]) -> Iteration:
            after, row = at(index, before, captured)
            return Iteration(active, after, [row])

        current, collected = repeat(
            node, node.integer_value(length), node.constant(np.array(True)), state, values, step
        )
        shape = (length, *collected[0].shape[1:])
        stacked = TensorValue(node.reshaped_type(collected[0], shape))
    if "lengths" in values:  # as onnxruntime has it: a row without a step ends in zeros, not in its initial state
        steps = node.emit(relax.op.greater(values["lengths"].expr, node.scalar(0, "int64"))).expr
        zero = node.scalar(0, data.dtype)
        current = [node.emit(relax.op.where(steps, last.expr, zero)) for last in current]
    return (node.emit(relax.op.flip(stacked.expr, 0)) if reverse else stacked), current


def _activations(node: Node, layer: _Layer, directions: int, dtype: str) -> list[list[Activation]]:
    """Return the activations of each direction; alphas and betas go in order to those that take them."""
    names = node.strings("activations", layer.activations * directions)
    count = len(layer.activations)
    if len(names) != count * directions:
        raise node.unsupported(f"{len(names)} activations for {directions} direction(s)")
    alphas, betas = iter(node.floats("activation_alpha", [])), iter(node.floats("activation_beta", []))
    clip = node.float("clip", 0.0)
    made: list[Activation] = []
    for name in names:
        entry = _ACTIVATIONS.get(name.lower())
        if entry is None:
            raise node.unsupported(f"activation '{name}'")
        alpha = next(alphas, entry.alpha) if entry.alpha is not None else 0.0
        beta = next(betas, entry.beta) if entry.beta is not None else 0.0
        # As in onnxruntime, the cell state of an LSTM is not clipped on its way to the output.
        limit = 0.0 if len(made) % count == 2 else clip
        made.append(_clipped(entry.build(node, alpha, beta, dtype), limit))
    return [made[number * count : (number + 1) * count] for number in range(directions)]


def _clipped(activation: Activation, limit: float) -> Activation:
    return (lambda x: activation(relax.op.clip(x, -limit, limit))) if limit else activation


@dataclass(frozen=True)
class _Entry:
    """An activation: how it is built from alpha and beta, and their defaults (None where it takes none)."""

    build: Callable[[Node, float, float, str], Activation]
    alpha: float | None = None
    beta: float | None = None


def _affine(node: Node, alpha: float, beta: float, dtype: str) -> Activation:
    return lambda x: relax.op.add(relax.op.multiply(x, node.scalar(alpha, dtype)), node.scalar(beta, dtype))


def _hard_sigmoid(node: Node, alpha: float, beta: float, dtype: str) -> Activation:
    affine = _affine(node, alpha, beta, dtype)
    return lambda x: relax.op.clip(affine(x), 0.0, 1.0)


def _scaled_tanh(node: Node, alpha: float, beta: float, dtype: str) -> Activation:
    return lambda x: relax.op.multiply(
        relax.op.tanh(relax.op.multiply(x, node.scalar(beta, dtype))), node.scalar(alpha, dtype)
    )


def _elu(node: Node, alpha: float, _: float, dtype: str) -> Activation:
    zero, one, scale = node.scalar(0, dtype), node.scalar(1, dtype), node.scalar(alpha, dtype)

    def elu(x: relax.Expr) -> relax.Expr:
        below = relax.op.subtract(relax.op.exp(relax.op.minimum(x, zero)), one)
        return relax.op.where(relax.op.less(x, zero), relax.op.multiply(scale, below), x)

    return elu


def _softplus(node: Node, _alpha: float, _beta: float, dtype: str) -> Activation:
    """Return log(1 + exp(x)) as max(x, 0) + log(1 + exp(-|x|)), which does not overflow."""
    zero, one = node.scalar(0, dtype), node.scalar(1, dtype)
    return lambda x: relax.op.add(
        relax.op.maximum(x, zero), relax.op.log(relax.op.add(one, relax.op.exp(relax.op.negative(relax.op.abs(x)))))
    )


def _softsign(node: Node, _alpha: float, _beta: float, dtype: str) -> Activation:
    one = node.scalar(1, dtype)
    return lambda x: relax.op.divide(x, relax.op.add(one, relax.op.abs(x)))


def _thresholded_relu(node: Node, alpha: float, _: float, dtype: str) -> Activation:
    zero, threshold = node.scalar(0, dtype), node.scalar(alpha, dtype)
    return lambda x: relax.op.where(relax.op.greater(x, threshold), x, zero)


_ACTIVATIONS = {
    "relu": _Entry(lambda *_: relax.op.nn.relu),
    "tanh": _Entry(lambda *_: relax.op.tanh),
    "sigmoid": _Entry(lambda *_: relax.op.sigmoid),
    "affine": _Entry(_affine, 1.0, 0.0),
    "leakyrelu": _Entry(lambda _n, alpha, _b, _d: lambda x: relax.op.nn.leakyrelu(x, alpha), 0.01),
    "thresholdedrelu": _Entry(_thresholded_relu, 1.0),
    "scaledtanh": _Entry(_scaled_tanh, 1.0, 1.0),
    "hardsigmoid": _Entry(_hard_sigmoid, 0.2, 0.5),
    "elu": _Entry(_elu, 1.0),
    "softsign": _Entry(_softsign),
    "softplus": _Entry(_softplus),
}
