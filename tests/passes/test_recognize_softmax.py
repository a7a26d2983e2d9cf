from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from passes.recognize_softmax import RecognizeSoftmax
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run


def _softmax(x: relax.Expr, axis: int, *, maximum: bool = True, keepdims: bool = True) -> relax.Expr:
    builder = relax.BlockBuilder.current()
    shifted = op.subtract(x, op.max(x, [axis], keepdims=True)) if maximum else x
    exponential = builder.emit(op.exp(shifted))
    return op.divide(exponential, op.sum(exponential, [axis], keepdims=keepdims))


@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_formula_becomes_the_operator(axis: int, maximum: bool) -> None:
    assert_rewritten(
        RecognizeSoftmax(),
        lambda x: _softmax(x, axis, maximum=maximum),
        lambda x: op.nn.softmax(x, axis % 3),
        *[("n", 4, 5)],
    )


def test_an_operator_of_what_was_shifted_before_is_that_of_the_whole() -> None:
    def body(x: relax.Expr) -> relax.Expr:
        return op.nn.softmax(op.subtract(x, op.max(x, [-1], keepdims=True)), -1)

    assert_rewritten(RecognizeSoftmax(), body, lambda x: op.nn.softmax(x, 2), *[("n", 4, 5)])
    assert assert_kept(RecognizeSoftmax(), lambda x: op.nn.softmax(x, -1), (4, 5)).sites == ()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: _softmax(x, 1, keepdims=False), "not over one axis that is kept"),
        (
            lambda x: op.divide(e := relax.BlockBuilder.current().emit(op.exp(x)), op.sum(e, [0, 1], keepdims=True)),
            "not over one axis that is kept",
        ),
    ],
)
def test_other_reductions_are_refused(body, reason: str) -> None:
    outcome = assert_kept(RecognizeSoftmax(), body, (4, 4))
    assert [site.refusal for site in outcome.sites] == [reason]


@pytest.mark.parametrize(
    "shift",
    [
        lambda x, y: op.max(y, [1], keepdims=True),  # of another tensor
        lambda x, y: op.maximum(op.max(x, [1], keepdims=True), op.max(y, [1], keepdims=True)),
        lambda x, y: op.max(x, [1]),  # along the columns
        lambda x, y: relax.const(1.0),
        lambda x, y: x,
    ],
)
def test_other_shifts_stay_subtracted(shift) -> None:
    def exponents(x, y):
        return op.subtract(x, shift(x, y))

    def body(x, y):
        e = relax.BlockBuilder.current().emit(op.exp(exponents(x, y)))
        return op.divide(e, op.sum(e, [1], keepdims=True))

    assert_rewritten(RecognizeSoftmax(), body, lambda x, y: op.nn.softmax(exponents(x, y), 1), (4, 4), (4, 4))


def test_any_shift_that_is_one_number_a_row_falls_away() -> None:
    def body(x):
        e = relax.BlockBuilder.current().emit(op.exp(op.subtract(x, op.mean(x, [1], keepdims=True))))
        return op.divide(e, op.sum(e, [1], keepdims=True))

    assert_rewritten(RecognizeSoftmax(), body, lambda x: op.nn.softmax(x, 1), (4, 4))


def test_a_shift_that_widens_the_argument_stays() -> None:
    def body(x):
        wide = op.subtract(x, op.expand_dims(op.max(x, [1], keepdims=True), 0))
        e = relax.BlockBuilder.current().emit(op.exp(wide))
        return op.divide(e, op.sum(e, [2], keepdims=True))

    outcome = RecognizeSoftmax().run(graph(body, (4, 4)))
    assert "relax.subtract" in operators(outcome.module)


def test_other_dtypes_are_no_sites() -> None:
    def body(x):
        e = relax.BlockBuilder.current().emit(op.exp(x))
        return op.divide(e, op.sum(e, [1], keepdims=True))

    assert assert_kept(RecognizeSoftmax(), body, (4, 4), dtype="float16").sites == ()


def test_large_arguments_no_longer_overflow() -> None:
    x = np.array([[1000.0, 1000.0, -1000.0]], "float32")
    after = RecognizeSoftmax().run(graph(lambda x: _softmax(x, 1, maximum=False), (1, 3))).module
    np.testing.assert_allclose(run(after, x), [[0.5, 0.5, 0.0]], rtol=1e-6)


def test_maximum_over_another_axis_stays_subtracted() -> None:
    def body(x):
        e = relax.BlockBuilder.current().emit(op.exp(op.subtract(x, op.max(x, [0], keepdims=True))))
        return op.divide(e, op.sum(e, [1], keepdims=True))

    def expected(x):
        return op.nn.softmax(op.subtract(x, op.max(x, [0], keepdims=True)), 1)

    assert_rewritten(RecognizeSoftmax(), body, expected, (4, 4))


def test_a_tensor_of_unknown_shape_is_refused() -> None:
    outcome = assert_kept(RecognizeSoftmax(), lambda x: _softmax(x, 1, maximum=False), 2)
    assert [site.refusal for site in outcome.sites] == ["the result has another shape than the argument"]
