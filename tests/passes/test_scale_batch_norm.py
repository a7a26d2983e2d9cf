from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.scale_batch_norm import ScaleBatchNorm
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import operators, run


def _normalized(
    *,
    padding: int = 0,
    shifted: bool = True,
    groups: int = 1,
    relu: bool = False,
    second_reader: bool = False,
    constant_statistics: bool = True,
) -> tvm.IRModule:
    """Return conv(batch_norm(x)), with a relu between them or another reader of the normalization's result."""
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((6, 4 // groups, 3, 3)).astype("float32")
    statistics = [rng.uniform(0.5, 2, 4).astype("float32") for _ in range(4)]
    if not shifted:
        statistics[1:3] = [np.zeros(4, "float32")] * 2
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 4, 7, 5), "float32"))
    gamma = relax.Var("gamma", relax.TensorType((4,), "float32"))
    with builder.function("main", [x] if constant_statistics else [x, gamma]):
        with builder.dataflow():
            constants: list[relax.Expr] = [relax.const(statistic) for statistic in statistics]
            if not constant_statistics:
                constants[0] = gamma
            parts = builder.emit(relax.op.nn.batch_norm(x, *constants, axis=1, epsilon=1e-3, training=False))
            z = builder.emit(relax.TupleGetItem(parts, 0))
            data = builder.emit(relax.op.nn.relu(z)) if relu else z
            result = builder.emit(relax.op.nn.conv2d(data, relax.const(weights), padding=padding, groups=groups))
            if second_reader:
                result = builder.emit(relax.op.add(relax.op.mean(z), result))
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    return builder.get()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["nn.conv2d", "add"]),
        ({"groups": 2}, ["nn.conv2d", "add"]),
        ({"padding": 1}, ["multiply", "add", "nn.conv2d"]),
        ({"padding": 1, "shifted": False}, ["nn.conv2d"]),
        ({"relu": True}, ["multiply", "add", "nn.relu", "nn.conv2d"]),
        ({"second_reader": True}, ["multiply", "add", "nn.conv2d", "mean", "add"]),
    ],
)
def test_the_result_stays_and_no_normalization_is_left(options: dict, expected: list[str]) -> None:
    module = _normalized(**options)
    outcome = ScaleBatchNorm().run(module)
    found = [name.removeprefix("relax.") for name in operators(outcome.module)]
    assert sorted(found) == sorted(expected)
    x = np.random.default_rng(3).standard_normal((2, 4, 7, 5)).astype("float32")
    before, after = run(module, x), run(outcome.module, x)
    # Sums of 36 products of order 1, rounded once more for each weight.
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=36 * np.finfo("float32").eps * np.abs(before).max())


def test_statistics_that_are_inputs_are_refused() -> None:
    module = _normalized(constant_statistics=False)
    outcome = ScaleBatchNorm().run(module)
    assert [site.refusal for site in outcome.sites] == ["gamma, beta, mean or variance is not constant"]
    tvm.ir.assert_structural_equal(outcome.module, module)


def _emit(value: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(value)


def _batch_norm(x: relax.Expr, index: int = 0, **options: object) -> relax.Expr:
    axis = int(options.get("axis", 1))
    channels = int(x.ty.shape.values[axis])
    statistics = [relax.const(np.linspace(n + 1, n + 2, channels, dtype="float32")) for n in range(4)]
    defaults = {"axis": 1, "epsilon": 0.5, "training": False}
    return relax.TupleGetItem(_emit(relax.op.nn.batch_norm(x, *statistics, **{**defaults, **options})), index)


@pytest.mark.parametrize(
    "options", [{}, {"axis": 2}, {"axis": -1}, {"center": False}, {"scale": False}, {"center": False, "scale": False}]
)
def test_scale_and_shift_are_those_of_the_statistics(options: dict) -> None:
    module = graph(lambda x: _batch_norm(x, **options), (2, 3, 4))
    outcome = ScaleBatchNorm().run(module)
    assert operators(outcome.module) == ["relax.multiply", "relax.add"]
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_the_normalization_becomes_a_product_and_a_sum() -> None:
    def before(x: relax.Expr) -> relax.Expr:
        statistics = [relax.const(np.array(v, "float32")) for v in ([4, 2], [3, 0], [1, 2], [3.75, 0.75])]
        parts = relax.op.nn.batch_norm(x, *statistics, axis=-1, epsilon=0.25, training=False)
        return relax.TupleGetItem(_emit(parts), 0)

    def after(x: relax.Expr) -> relax.Expr:  # (x - 1) / 2 * 4 + 3 and (x - 2) / 1 * 2
        factor, shift = (relax.const(np.array([[values]], "float32")) for values in ([2, 2], [1, -4]))
        return relax.op.add(relax.op.multiply(x, factor), shift)

    assert_rewritten(ScaleBatchNorm(), before, after, ("n", 3, 2))


def test_training_is_refused() -> None:
    outcome = assert_kept(ScaleBatchNorm(), lambda x: _batch_norm(x, training=True), (2, 3, 4))
    assert [site.refusal for site in outcome.sites] == ["the normalization is not an inference-time one"]


def test_running_statistics_are_no_site() -> None:
    assert assert_kept(ScaleBatchNorm(), lambda x: _batch_norm(x, 1), (2, 3, 4)).sites == ()


def _weights(*shape: int) -> relax.Expr:
    return relax.const(np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape))


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (lambda x, w: relax.op.nn.conv1d(_batch_norm(x), _weights(6, 3, 2)), ["nn.conv1d", "add"]),
        (lambda x, w: relax.op.nn.conv1d(_batch_norm(x), w), ["multiply", "add", "nn.conv1d"]),
        (lambda x, w: relax.op.nn.conv1d(_batch_norm(x, axis=2), _weights(6, 3, 2)), ["multiply", "add", "nn.conv1d"]),
        (
            lambda x, w: relax.op.nn.conv1d_transpose(_batch_norm(x), _weights(3, 6, 2)),
            ["multiply", "add", "nn.conv1d_transpose"],
        ),
    ],
)
def test_only_an_unpadded_convolution_of_constant_weights_takes_it(body, left: list[str]) -> None:
    module = graph(body, (2, 3, 4), (6, 3, 2))
    outcome = ScaleBatchNorm().run(module)
    assert [name.removeprefix("relax.") for name in operators(outcome.module)] == left
    arrays = [np.random.default_rng(0).standard_normal(shape).astype("float32") for shape in ((2, 3, 4), (6, 3, 2))]
    (before,), (after,) = (Interpreter(each).run(arrays) for each in (module, outcome.module))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def _twice(x: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
    normalized = _emit(_batch_norm(x))
    return [relax.op.nn.conv1d(normalized, _weights(6, 3, 2)), relax.op.add(normalized, relax.op.sum(w))]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda x, w: relax.op.nn.conv1d(_emit(_batch_norm(x)), _weights(6, 3, 2), padding=(0, 1)),
            "the convolution pads what is normalized with zeros, which before that are other numbers",
        ),
        (
            lambda x, w: relax.op.nn.conv1d(_emit(_batch_norm(x)), w),
            "the weights of the convolution are not constant",
        ),
        (
            lambda x, w: relax.op.nn.conv1d(_emit(_batch_norm(x, axis=2)), _weights(6, 3, 2)),
            "the normalization is not over the convolution's channels",
        ),
        (_twice, "something else reads the normalization before the convolution"),
    ],
)
def test_a_convolution_that_cannot_take_a_normalization_says_why(body, reason: str) -> None:
    outcome = ScaleBatchNorm().run(graph(body, (2, 3, 4), (6, 3, 2)))
    assert [site.refusal for site in outcome.sites] == [None, reason]
