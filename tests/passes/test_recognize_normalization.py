from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from passes.absorb_scales import AbsorbScales
from passes.recognize_normalization import RecognizeNormalization
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run

_EPSILON = 1e-5


def _emit(value: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(value)


def _centered(x: relax.Expr, axes: list[int], keepdims: bool = True) -> relax.Expr:
    d = _emit(op.subtract(x, op.mean(x, axes, keepdims=keepdims)))
    return op.multiply(d, op.rsqrt(op.add(op.mean(op.multiply(d, d), axes, keepdims=keepdims), relax.const(_EPSILON))))


def _by_moments(x: relax.Expr, axes: list[int]) -> relax.Expr:
    mean = _emit(op.mean(x, axes, keepdims=True))
    square = op.mean(op.multiply(x, x), axes, keepdims=True)
    variance = op.subtract(square, op.multiply(mean, mean))
    return op.multiply(op.subtract(x, mean), op.rsqrt(op.add(variance, relax.const(_EPSILON))))


def _root_mean_square(x: relax.Expr, axes: list[int]) -> relax.Expr:
    return op.multiply(op.rsqrt(op.add(relax.const(_EPSILON), op.mean(op.multiply(x, x), axes, keepdims=True))), x)


def _ones(*shape: int) -> relax.Expr:
    return relax.const(np.ones(shape, "float32"))


def _zeros(*shape: int) -> relax.Expr:
    return relax.const(np.zeros(shape, "float32"))


# The same number that the module holds, in fp32.
_STORED = float(np.float32(_EPSILON))


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        (
            lambda x: _centered(x, [-1]),
            lambda x: op.nn.layer_norm(x, _ones(8), _zeros(8), [-1], _STORED),
            ("n", 3, 8),
        ),
        (
            lambda x: _by_moments(x, [1, 2]),
            lambda x: op.nn.layer_norm(x, _ones(3, 8), _zeros(3, 8), [-2, -1], _STORED),
            ("n", 3, 8),
        ),
        (
            lambda x: _root_mean_square(x, [2]),
            lambda x: op.nn.rms_norm(x, _ones(8), [-1], _STORED),
            ("n", "m", 8),
        ),
        (
            lambda x: _centered(x, [2, 3]),
            lambda x: op.nn.instance_norm(x, _ones(3), _zeros(3), 1, [2, 3], _STORED),
            ("n", 3, "h", "w"),
        ),
    ],
)
def test_formulas_become_operators(before, after, shape) -> None:
    assert_rewritten(RecognizeNormalization(), before, after, shape)


@pytest.mark.parametrize(
    ("body", "shape", "dtype", "reason"),
    [
        (lambda x: _centered(x, [0]), (8, 3), "float32", "the axes are not the last ones"),
        (lambda x: _centered(x, [0]), (8,), "float32", "the axes are not the last ones"),
        (lambda x: _centered(x, [1], keepdims=False), (8, 8), "float32", "does not keep its axes"),
        (lambda x: _root_mean_square(x, [1]), (4, "n"), "float32", "shape of the scale is not known"),
        (
            lambda x: op.multiply(
                x, op.rsqrt(op.add(op.mean(op.multiply(x, x), [1], keepdims=True), relax.const(1e-3, "float64")))
            ),
            (4, 8),
            "float64",
            "not computed in float32",
        ),
        (
            lambda x: op.multiply(x, op.rsqrt(op.add(op.mean(op.multiply(x, x), [1], keepdims=True), op.sum(x)))),
            (4, 8),
            "float32",
            "epsilon is not one constant",
        ),
    ],
)
def test_what_the_operators_do_not_take_is_refused(body, shape, dtype: str, reason: str) -> None:
    outcome = assert_kept(RecognizeNormalization(), body, shape, dtype=dtype)
    assert outcome.sites
    assert all(reason in (site.refusal or "") for site in outcome.sites)


def test_variance_by_moments_gains_the_digits_it_lost() -> None:
    x = (1e4 + np.random.default_rng(0).standard_normal((4, 64))).astype("float32")
    module = RecognizeNormalization().run(graph(lambda x: _by_moments(x, [1]), (4, 64))).module
    wide = x.astype("float64")
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + _EPSILON)
    np.testing.assert_allclose(run(module, x), expected, atol=1e-2)


def _norm(x: relax.Expr) -> relax.Expr:
    return op.nn.layer_norm(x, _ones(8), _zeros(8), [-1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x, g, b: op.add(op.multiply(_norm(x), g), b), lambda x, g, b: op.nn.layer_norm(x, g, b, [-1])),
        (lambda x, g, b: op.multiply(g, _norm(x)), lambda x, g, b: op.nn.layer_norm(x, g, _zeros(8), [-1])),
        (lambda x, g, b: op.add(b, _norm(x)), lambda x, g, b: op.nn.layer_norm(x, _ones(8), b, [-1])),
        (
            lambda x, g, b: op.multiply(g, op.nn.rms_norm(x, _ones(8), [-1])),
            lambda x, g, b: op.nn.rms_norm(x, g, [-1]),
        ),
    ],
)
def test_scale_and_shift_move_into_the_operator(before, after) -> None:
    assert_rewritten(AbsorbScales(), before, after, *[("n", 3, 8), (8,), (8,)])


def test_scales_per_channel_move_into_instance_norm() -> None:
    assert_rewritten(
        AbsorbScales(),
        lambda x, g: op.multiply(op.nn.instance_norm(x, _ones(4), _zeros(4), 1, [2, 3]), g),
        lambda x, g: op.nn.instance_norm(x, op.squeeze(g, [1, 2]), _zeros(4), 1, [2, 3]),
        *[(2, 4, 5, 5), (4, 1, 1)],
    )


def test_instance_norm_of_groups_is_group_norm() -> None:
    def before(x, g, b):
        split = op.reshape(x, (2, 3, 2 * 5 * 5))
        merged = op.reshape(op.nn.instance_norm(split, _ones(3), _zeros(3), 1, [2]), (2, 6, 5, 5))
        return op.add(op.multiply(merged, g), b)

    def after(x, g, b):
        return op.nn.group_norm(x, op.squeeze(g, [1, 2]), op.squeeze(b, [1, 2]), 3, 1, [2, 3])

    assert_rewritten(AbsorbScales(), before, after, *[(2, 6, 5, 5), (6, 1, 1), (6, 1, 1)])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x, y, g: op.multiply(_norm(x), op.reshape(g, (8, 1))), "differs along axis"),
        (lambda x, y, g: op.multiply(_norm(x), y), "differs along axis"),
        (lambda x, y, g: op.multiply(_norm(x), op.sum(g)), "one number per element"),
        (lambda x, y, g: op.multiply(_norm(x), op.expand_dims(y, 0)), "more axes"),
        (lambda x, y, g: op.multiply(n := _emit(_norm(x)), op.add(n, g)), "another reader"),
    ],
)
def test_other_factors_are_refused(body, reason: str) -> None:
    outcome = assert_kept(AbsorbScales(), body, *[(8, 8), (8, 8), (8,)]) if "reader" not in reason else None
    if outcome is None:
        outcome = AbsorbScales().run(graph(body, *[(8, 8), (8, 8), (8,)]))
        assert "relax.multiply" in operators(outcome.module)
    assert any(reason in (site.refusal or "") for site in outcome.sites)
