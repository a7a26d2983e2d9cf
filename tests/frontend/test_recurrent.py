"""Recurrent layers against onnxruntime: what the backend suite leaves out, on unrolled and on symbolic sequences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import assert_same

STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def layer_inputs(operator: str, directions: int, *, steps: int = STEPS, lengths: bool = False, peepholes: bool = False):
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    width = GATES[operator] * HIDDEN
    inputs = {
        "x": values(steps, BATCH, INPUTS),
        "w": values(directions, width, INPUTS),
        "r": values(directions, width, HIDDEN),
        "b": values(directions, 2 * width),
        "lengths" if lengths else "_lengths": np.array([steps, steps - 2], np.int32),
        "h": values(directions, BATCH, HIDDEN),
    }
    if operator == "LSTM":
        inputs["c"] = values(directions, BATCH, HIDDEN)
    if peepholes:
        inputs["p"] = values(directions, 3 * HIDDEN)
    return inputs


def check(operator: str, inputs: dict[str, np.ndarray], **options: object) -> None:
    outputs = ["y", "yh", "yc"][: 3 if operator == "LSTM" else 2]
    constants = [name for name in ("w", "r", "b", "p") if name in inputs]
    assert_same(
        operator, inputs, outputs, domain="", constants=constants, tolerance=4, hidden_size=HIDDEN, opset=14, **options
    )


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("operator", GATES)
def test_direction_and_sequence_lengths(operator: str, direction: str):
    inputs = layer_inputs(operator, 2 if direction == "bidirectional" else 1, lengths=True)
    check(operator, inputs, direction=direction)


@pytest.mark.parametrize("operator", GATES)
def test_a_row_without_a_step_ends_in_zeros(operator: str):
    inputs = layer_inputs(operator, 2, lengths=True)
    inputs["lengths"][:] = [0, STEPS]
    check(operator, inputs, direction="bidirectional")


@pytest.mark.parametrize("operator", GATES)
def test_symbolic_sequence_runs_as_a_loop(operator: str):
    inputs = layer_inputs(operator, 2, steps=23, lengths=True)
    check(operator, inputs, direction="bidirectional", shapes={"x": ["steps", BATCH, INPUTS]})


def test_long_sequence_of_symbolic_batch():
    inputs = layer_inputs("LSTM", 1, steps=40)
    inputs["_h"], inputs["_c"] = inputs.pop("h"), inputs.pop("c")
    check("LSTM", inputs, shapes={"x": ["steps", "batch", INPUTS]})


def test_lstm_peepholes_clip_and_coupled_gates():
    for coupled in (0, 1):
        check("LSTM", layer_inputs("LSTM", 1, peepholes=True), input_forget=coupled, clip=0.6)


def test_gru_reset_after_the_recurrent_product():
    check("GRU", layer_inputs("GRU", 2), direction="bidirectional", linear_before_reset=1)


@pytest.mark.parametrize(
    "names",
    [
        ["HardSigmoid", "Softsign", "Affine"],
        ["Sigmoid", "LeakyRelu", "ScaledTanh"],
        ["Sigmoid", "Elu", "Softplus"],
        ["HardSigmoid", "Relu", "ThresholdedRelu"],
    ],
)
def test_activations_of_a_list(names: list[str]):
    parameters = {"Affine": 2, "LeakyRelu": 1, "ScaledTanh": 2, "HardSigmoid": 2, "Elu": 1, "ThresholdedRelu": 1}
    alphas = [0.3 for name in names if name in parameters]
    betas = [0.4 for name in names if parameters.get(name) == 2]
    numbers = {"activation_alpha": alphas, "activation_beta": betas}
    given = {name: values for name, values in numbers.items() if values}
    check("LSTM", layer_inputs("LSTM", 1), activations=names, **given)
