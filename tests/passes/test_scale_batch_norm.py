from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.scale_batch_norm import ScaleBatchNorm
from tests.passes.relax_modules import operators, run


def _normalized(
    *,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
    second_reader: bool = False,
    constant_statistics: bool = True,
) -> tvm.IRModule:
    """Return conv(batch_norm(x)), with a relu between them or another reader of the normalization's result."""
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((6, 4 // groups, 3, 3)).astype("float32")
    statistics = [rng.uniform(0.5, 2, 4).astype("float32") for _ in range(4)]
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
