from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from passes.fold_batch_norm import FoldBatchNorm
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import operators, run

_CONVOLUTIONS = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}
_TRANSPOSED = {1: relax.op.nn.conv1d_transpose, 2: relax.op.nn.conv2d_transpose}


def _normalized_convolution(
    *,
    spatial: int = 2,
    bias: np.ndarray | None = None,
    groups: int = 1,
    channels: tuple[int, int] = (4, 6),
    axis: int = 1,
    constant_weights: bool = True,
    second_reader: bool = False,
    transposed: bool = False,
) -> tvm.IRModule:
    rng = np.random.default_rng(7)
    inputs, outputs = channels
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weights = rng.standard_normal((*shape, *(3,) * spatial)).astype("float32")
    convolution = (_TRANSPOSED if transposed else _CONVOLUTIONS)[spatial]
    statistics = [rng.uniform(0.5, 2, outputs).astype("float32") for _ in range(4)]
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, inputs, *(7,) * spatial), "float32"))
    w = relax.Var("w", relax.TensorType(weights.shape, "float32"))
    parameters = [x] if constant_weights else [x, w]
    with builder.function("main", parameters):
        with builder.dataflow():
            kernel = relax.const(weights) if constant_weights else w
            y = builder.emit(convolution(x, kernel, groups=groups))
            if bias is not None:
                y = builder.emit(relax.op.add(y, relax.const(bias)))
            constants = [relax.const(statistic) for statistic in statistics]
            z = builder.emit(relax.op.nn.batch_norm(y, *constants, axis=axis, epsilon=1e-3, training=False))
            result = builder.emit(relax.TupleGetItem(z, 0))
            if second_reader:
                result = builder.emit(relax.op.add(result, y))
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    return builder.get()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    spatial=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2]),
    bias=st.sampled_from([None, "channel", "scalar"]),
)
def test_folding_keeps_the_result(spatial: int, groups: int, bias: str | None) -> None:
    rng = np.random.default_rng(3)
    shape = {"channel": (1, 6, *(1,) * spatial), "scalar": (1,) * (spatial + 2)}
    values = None if bias is None else rng.standard_normal(shape[bias]).astype("float32")
    module = _normalized_convolution(spatial=spatial, groups=groups, bias=values)
    outcome = FoldBatchNorm().run(module)
    assert operators(outcome.module) == [f"relax.nn.conv{spatial}d", "relax.add"]
    assert outcome.rewritten == 1
    x = rng.standard_normal((2, 4, *(7,) * spatial)).astype("float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    # Sums of at most 4 * 27 products of order 1, rounded once more for each weight.
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=108 * np.finfo("float32").eps * np.abs(before).max())


def test_the_factor_goes_into_the_weights_and_the_rest_into_one_bias() -> None:
    weights = np.arange(12, dtype="float32").reshape(2, 3, 2)

    def before(x: relax.Expr) -> relax.Expr:
        convolution = relax.op.add(relax.op.nn.conv1d(x, relax.const(weights)), _bias(5, 6))
        gamma, beta, mean, variance = map(_channels, ([4, 2], [3, 0], [1, 2], [3.75, 0.75]))  # factors of 2
        parts = relax.op.nn.batch_norm(convolution, gamma, beta, mean, variance, axis=1, epsilon=0.25, training=False)
        return relax.TupleGetItem(relax.BlockBuilder.current().emit(parts), 0)

    def after(x: relax.Expr) -> relax.Expr:
        return relax.op.add(relax.op.nn.conv1d(x, relax.const(2 * weights)), _bias(11, 8))

    assert_rewritten(FoldBatchNorm(), before, after, ("n", 3, 9))


def _channels(values: Sequence[float]) -> relax.Expr:
    return relax.const(np.array(values, "float32"))


def _bias(*values: float) -> relax.Expr:
    return relax.const(np.array(values, "float32").reshape(1, -1, 1))


@pytest.mark.parametrize(("spatial", "groups"), [(1, 1), (2, 2)])
def test_folding_into_a_transposed_convolution_keeps_the_result(spatial: int, groups: int) -> None:
    rng = np.random.default_rng(3)
    bias = rng.standard_normal((1, 6, *(1,) * spatial)).astype("float32")
    module = _normalized_convolution(spatial=spatial, groups=groups, bias=bias, transposed=True)
    outcome = FoldBatchNorm().run(module)
    assert operators(outcome.module) == [f"relax.nn.conv{spatial}d_transpose", "relax.add"]
    x = rng.standard_normal((2, 4, *(7,) * spatial)).astype("float32")
    before, after = run(module, x), run(outcome.module, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=36 * np.finfo("float32").eps * np.abs(before).max())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axis": 2, "channels": (4, 5)}, "the normalization is not an inference-time one over axis 1"),
        ({"constant_weights": False}, "the convolution's weights are not constant"),
        ({"second_reader": True}, "the convolution's result has another user"),
        ({"bias": np.zeros((2, 6, 5, 5), "float32")}, "what is added to the convolution differs within a channel"),
        ({"bias": np.zeros((1, 1, 1, 5), "float32")}, "what is added to the convolution differs within a channel"),
    ],
)
def test_refusal_says_why_and_changes_nothing(options: dict, reason: str) -> None:
    module = _normalized_convolution(**options)
    outcome = FoldBatchNorm().run(module)
    assert [site.refusal for site in outcome.sites] == [reason]
    tvm.ir.assert_structural_equal(outcome.module, module)


def test_folding_twice_changes_nothing_more() -> None:
    once = FoldBatchNorm().run(_normalized_convolution()).module
    twice = FoldBatchNorm().run(once)
    assert twice.sites == ()
    tvm.ir.assert_structural_equal(twice.module, once)


def _emit(value: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(value)


def _normalized(y: relax.Expr, index: int = 0, **options: object) -> relax.Expr:
    statistics = options.pop("statistics", None) or [relax.const(np.full(3, 1 + n / 4, "float32")) for n in range(4)]
    training = bool(options.pop("training", False))
    parts = _emit(relax.op.nn.batch_norm(y, *statistics, axis=1, training=training, **options))
    return relax.TupleGetItem(parts, index)


_KERNEL = np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2, 1)


def _convolved(x: relax.Expr) -> relax.Expr:
    return relax.op.nn.conv1d(x, relax.const(_KERNEL))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda x, g: _normalized(_convolved(x), training=True),
            "the normalization is not an inference-time one over axis 1",
        ),
        (
            lambda x, g: _normalized(_convolved(x), statistics=[g, *[relax.const(np.ones(3, "float32"))] * 3]),
            "gamma, beta, mean or variance is not constant",
        ),
        (
            lambda x, g: _normalized(relax.op.add(_convolved(x), relax.op.reshape(g, (1, 3, 1)))),
            "what is added to the convolution is not constant",
        ),
    ],
)
def test_what_is_not_constant_is_refused(body, reason: str) -> None:
    assert [site.refusal for site in assert_kept(FoldBatchNorm(), body, (2, 2, 5), (3,)).sites] == [reason]


@pytest.mark.parametrize(
    "body",
    [
        _normalized,
        lambda x: _normalized(relax.op.nn.relu(x)),
        lambda x: relax.TupleGetItem(_emit(relax.op.split(x, 3, 1)), 0),
    ],
)
def test_what_is_no_convolution_with_a_normalization_is_no_site(body) -> None:
    assert assert_kept(FoldBatchNorm(), body, (2, 3, 5)).sites == ()


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True), (False, False)])
def test_a_normalization_without_scale_or_shift_is_folded(center: bool, scale: bool) -> None:
    module = graph(lambda x: _normalized(_convolved(x), center=center, scale=scale, epsilon=0.5), (2, 2, 5))
    outcome = FoldBatchNorm().run(module)
    assert operators(outcome.module) == ["relax.nn.conv1d", "relax.add"]
    x = np.random.default_rng(0).standard_normal((2, 2, 5)).astype("float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
