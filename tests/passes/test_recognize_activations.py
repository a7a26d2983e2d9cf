from __future__ import annotations

import math

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from passes.recognize_activations import RecognizeActivations
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run


def _c(value: float, dtype: str = "float32") -> relax.Expr:
    return relax.const(value, dtype)


def _cube(x: relax.Expr) -> relax.Expr:
    return op.multiply(op.multiply(x, x), x)


def _bell(x: relax.Expr) -> relax.Expr:
    return op.add(op.erf(op.divide(x, _c(math.sqrt(2)))), _c(1.0))


def _tanh(x: relax.Expr) -> relax.Expr:
    inner = op.add(x, op.multiply(_c(0.044715), _cube(x)))
    return op.add(_c(1.0), op.tanh(op.multiply(_c(math.sqrt(2 / math.pi)), inner)))


_ROOT = math.sqrt(2 / math.pi)
_INNER = (
    lambda x: op.multiply(op.multiply(x, _c(_ROOT)), op.add(_c(1.0), op.multiply(_c(0.044715), op.multiply(x, x)))),
    lambda x: op.multiply(op.multiply(x, _c(_ROOT)), op.add(_c(1.0), op.multiply(op.multiply(_c(0.044715), x), x))),
    lambda x: op.add(op.multiply(x, _c(_ROOT)), op.multiply(_cube(x), _c(0.044715 * _ROOT))),
)


def _halved_tanh(x: relax.Expr, inner: relax.Expr) -> relax.Expr:
    return op.multiply(x, op.add(op.multiply(op.tanh(inner), _c(0.5)), _c(0.5)))


_GELU = {
    "times the root of a half": lambda x: op.multiply(
        op.multiply(x, _c(0.5)), op.add(op.erf(op.multiply(x, _c(math.sqrt(0.5)))), _c(1.0))
    ),
    "half of x first": lambda x: op.multiply(op.multiply(x, _c(0.5)), _bell(x)),
    "half last": lambda x: op.multiply(op.multiply(x, _bell(x)), _c(0.5)),
    "half of the curve": lambda x: op.multiply(x, op.multiply(_c(0.5), _bell(x))),
    "half outside": lambda x: op.multiply(_c(0.5), op.multiply(x, _bell(x))),
}


@pytest.mark.parametrize("body", _GELU.values(), ids=_GELU)
def test_gelu_in_any_order_of_its_factors(body) -> None:
    assert_rewritten(RecognizeActivations(), body, op.nn.gelu, ("n", 8))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: op.multiply(op.multiply(_c(0.5), x), _tanh(x)), op.nn.gelu_tanh),
        (lambda x: op.multiply(x, op.sigmoid(x)), op.nn.silu),
        (lambda x: op.divide(x, op.add(op.exp(op.negative(x)), _c(1.0))), op.nn.silu),
        *((lambda x, inner=inner: _halved_tanh(x, inner(x)), op.nn.gelu_tanh) for inner in _INNER),
        (lambda x: op.multiply(op.sigmoid(x), x), op.nn.silu),
        (lambda x: op.divide(_c(1.0), op.add(_c(1.0), op.exp(op.negative(x)))), op.sigmoid),
    ],
)
def test_other_activations(before, after) -> None:
    assert_rewritten(RecognizeActivations(), before, after, ("n", 8))


def _hard_sigmoid(x: relax.Expr) -> relax.Expr:
    return op.minimum(op.maximum(op.add(op.multiply(x, _c(1 / 6)), _c(0.5)), _c(0.0)), _c(1.0))


_RELU6 = {
    "clip": lambda x: op.minimum(op.maximum(x, _c(0.0)), _c(6.0)),
    "clip from above": lambda x: op.maximum(op.minimum(x, _c(6.0)), _c(0.0)),
    "relu and minimum": lambda x: op.minimum(op.nn.relu(x), _c(6.0)),
}
_SIXTH = {"divided": lambda x: op.divide(x, _c(6.0)), "multiplied": lambda x: op.multiply(_c(1 / 6), x)}


@pytest.mark.parametrize("relu6", _RELU6.values(), ids=_RELU6)
@pytest.mark.parametrize("sixth", _SIXTH.values(), ids=_SIXTH)
def test_hard_sigmoid_and_hard_swish(relu6, sixth) -> None:
    def gate(x: relax.Expr) -> relax.Expr:
        return relu6(op.add(x, _c(3.0)))

    swish = lambda x: op.multiply(x, _hard_sigmoid(x))  # noqa: E731
    assert_rewritten(RecognizeActivations(), lambda x: sixth(gate(x)), _hard_sigmoid, ("n", 8))
    assert_rewritten(RecognizeActivations(), lambda x: op.multiply(x, sixth(gate(x))), swish, ("n", 8))
    assert_rewritten(RecognizeActivations(), lambda x: sixth(op.multiply(gate(x), x)), swish, ("n", 8))


def test_the_hard_sigmoid_keeps_its_values_at_its_corners() -> None:
    x = np.array([-4, -3, -2.999, -1, -0.0, 0, 1, 2.999, 3, 4, np.inf, -np.inf], "float32")
    body = lambda x: op.divide(_RELU6["clip"](op.add(x, _c(3.0))), _c(6.0))  # noqa: E731
    rewritten = RecognizeActivations().run(graph(body, (12,))).module
    np.testing.assert_allclose(run(rewritten, x), np.clip(x / 6 + 0.5, 0, 1), atol=1e-7)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.divide(op.minimum(op.maximum(op.add(x, _c(3.0)), _c(0.0)), _c(6.0)), _c(5.0)),
        lambda x: op.divide(op.minimum(op.maximum(op.add(x, _c(2.0)), _c(0.0)), _c(6.0)), _c(6.0)),
        lambda x: op.divide(op.multiply(op.exp(x), _RELU6["clip"](op.add(x, _c(3.0)))), _c(6.0)),
        lambda x: op.multiply(op.multiply(x, _c(0.5)), op.add(op.erf(op.multiply(x, _c(0.7))), _c(1.0))),
        lambda x: op.multiply(x, op.sigmoid(op.multiply(x, _c(1.702)))),
        lambda x: op.multiply(op.exp(x), op.sigmoid(x)),
    ],
)
def test_other_constants_and_arguments_are_kept(body) -> None:
    assert_kept(RecognizeActivations(), body, (2, 8))


def test_constants_that_widen_the_result_are_refused() -> None:
    half = relax.const(np.full((3, 1, 1), 0.5, "float32"))
    outcome = assert_kept(RecognizeActivations(), lambda x: op.multiply(op.multiply(x, half), _bell(x)), (2, 8))
    assert [site.refusal for site in outcome.sites] == ["the result has another shape than the function's argument"]


@pytest.mark.parametrize("body", [*_GELU.values(), lambda x: op.multiply(op.multiply(_c(0.5), x), _tanh(x))])
def test_values_stay_within_rounding(body) -> None:
    x = np.linspace(-12, 12, 400, dtype="float32").reshape(50, 8)
    module = graph(body, (50, 8))
    after = RecognizeActivations().run(module).module
    assert len(operators(after)) == 1
    # 1 + erf cancels for negative x: the error is absolute, of the rounding of 1 times x.
    np.testing.assert_allclose(run(after, x), run(module, x), rtol=4e-6, atol=12 * 2.0**-22)
