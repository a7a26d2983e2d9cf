from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

from optimizer.lowering import lower
from targets import get
from tests.passes.graph import graph
from tests.passes.relax_modules import run

_SHAPE = (2, 6, 5, 4)
_PARAMETERS = [relax.const(np.linspace(start, 2, 6, dtype="float32")) for start in (0.5, -1)]


def _normalized(x: relax.Expr) -> relax.Expr:
    return relax.op.nn.group_norm(x, *_PARAMETERS, num_groups=3, channel_axis=1, axes=[2, 3])


def _reference(x: np.ndarray) -> np.ndarray:
    groups = x.astype("float64").reshape(2, 3, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    scale, shift = (part.value.numpy()[:, None, None] for part in _PARAMETERS)
    return normal.reshape(x.shape) * scale + shift


def _half(x: relax.Expr) -> relax.Expr:
    return relax.op.multiply(x, relax.op.nn.relu(relax.op.add(x, relax.const(0.5))))


@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        (relax.op.nn.silu, lambda x: x / (1 + np.exp(-x))),
        (relax.op.nn.leakyrelu, lambda x: np.where(x > 0, x, 0.01 * x)),
        (_half, lambda x: x * np.maximum(x + 0.5, 0)),
    ],
)
def test_a_group_normalization_and_its_activation_are_one_kernel(
    activation: Callable[[relax.Expr], relax.Expr], reference: Callable[[np.ndarray], np.ndarray]
) -> None:
    module = graph(lambda x: relax.op.sum(activation(_normalized(x)), [3]), _SHAPE)
    assert len(lower(module, get("x86-avx512")).kernels) == 2  # the other one adds up
    x = np.random.default_rng(0).standard_normal(_SHAPE).astype("float32")
    np.testing.assert_allclose(run(module, x), reference(_reference(x)).sum(3), rtol=1e-4, atol=1e-4)


def test_what_reads_another_tensor_too_stays_behind_the_normalization() -> None:
    module = graph(lambda x, y: relax.op.add(_normalized(x), y), _SHAPE, _SHAPE)
    x, y = np.random.default_rng(1).standard_normal((2, *_SHAPE)).astype("float32")
    np.testing.assert_allclose(run(module, x, y), _reference(x) + y, rtol=1e-4, atol=1e-4)
