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
        (
            lambda x: _centered(x, [2]),
            lambda x: op.nn.instance_norm(x, _ones(3), _zeros(3), 1, [2], _STORED),
            ("n", 3, "m"),
        ),
        (
            lambda x: _centered(x, [2]),
            lambda x: op.nn.instance_norm(x, _ones(3), _zeros(3), 1, [2], _STORED),
            ("n", 3, (1 << 16) + 1),
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
        (lambda x: _centered(x, [1], keepdims=False), (8, 8), "float32", "a mean does not keep its axes"),
        (lambda x: _root_mean_square(x, [1]), (4, "n"), "float32", "the shape of the scale is not known"),
        (
            lambda x: op.multiply(
                x, op.rsqrt(op.add(op.mean(op.multiply(x, x), [1], keepdims=True), relax.const(1e-3, "float64")))
            ),
            (4, 8),
            "float64",
            "statistics of this dtype are not computed in float32",
        ),
        (
            lambda x: op.multiply(x, op.rsqrt(op.add(op.mean(op.multiply(x, x), [1], keepdims=True), op.sum(x)))),
            (4, 8),
            "float32",
            "epsilon is not one constant",
        ),
        (
            lambda x: op.multiply(
                d := _emit(op.subtract(x, op.mean(x, [2], keepdims=True))),
                op.rsqrt(op.add(op.mean(op.multiply(d, d), [1, 2], keepdims=True), relax.const(_EPSILON))),
            ),
            (2, 4, 8),
            "float32",
            "the mean and the variance are over different axes",
        ),
        (
            lambda x: op.multiply(
                x,
                op.rsqrt(
                    op.add(
                        op.mean(op.multiply(x, x), [2], keepdims=True),
                        relax.const(np.full((2, 1, 1, 1), 1.0, "float32")),
                    )
                ),
            ),
            (2, 4, 8),
            "float32",
            "the result has another shape than what is normalized",
        ),
        (lambda x: _root_mean_square(x, [1]), (2, (1 << 16) + 1), "float32", "a scale of more than 65536 elements"),
        (lambda x: _centered(x, [0, 1]), (8, 3), "float32", "the axes are not the last ones"),
    ],
)
def test_what_the_operators_do_not_take_is_refused(body, shape, dtype: str, reason: str) -> None:
    outcome = assert_kept(RecognizeNormalization(), body, shape, dtype=dtype)
    assert {site.refusal for site in outcome.sites} == {reason}


def test_a_scale_of_as_many_elements_as_are_allowed_is_made() -> None:
    outcome = RecognizeNormalization().run(graph(lambda x: _root_mean_square(x, [1]), (2, 1 << 16)))
    assert operators(outcome.module) == ["relax.nn.rms_norm"]


def test_three_axes_with_two_normalized_are_a_layer_norm_and_four_an_instance_norm() -> None:
    for rank, expected in ((3, "relax.nn.layer_norm"), (4, "relax.nn.instance_norm"), (5, "relax.nn.instance_norm")):
        module = graph(
            lambda x, rank=rank: _centered(x, [rank - 2, rank - 1] if rank < 5 else [2, 3, 4]), (2, 3, 4, 5, 6)[:rank]
        )
        assert operators(RecognizeNormalization().run(module).module) == [expected]
    module = graph(lambda x: _centered(x, [3]), (2, 3, 4, 5))
    assert operators(RecognizeNormalization().run(module).module) == ["relax.nn.layer_norm"]


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


_ABSORBED = [(8, 8), (8, 8), (8,)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x, y, g: op.multiply(_norm(x), op.reshape(g, (8, 1))), "the operand differs along axis 0"),
        (lambda x, y, g: op.multiply(_norm(x), y), "the operand differs along axis 0"),
        (lambda x, y, g: op.multiply(_norm(x), op.sum(g)), "the operand is not one number per element of axis 1"),
        (
            lambda x, y, g: op.multiply(_norm(x), op.expand_dims(y, 0)),
            "the operand has more axes than the normalization",
        ),
    ],
)
def test_other_factors_are_refused(body, reason: str) -> None:
    outcome = assert_kept(AbsorbScales(), body, *_ABSORBED)
    assert [site.refusal for site in outcome.sites] == [reason]


def test_a_factor_of_unknown_shape_is_refused() -> None:
    outcome = assert_kept(AbsorbScales(), lambda x, g: op.multiply(_norm(x), g), (8, 8), 1)
    assert [site.refusal for site in outcome.sites] == ["the operand's shape is not known, or its dtype another"]


def test_a_normalization_with_another_reader_is_refused() -> None:
    module = graph(lambda x, y, g: op.multiply(n := _emit(_norm(x)), op.add(n, g)), *_ABSORBED)
    outcome = AbsorbScales().run(module)
    assert "relax.multiply" in operators(outcome.module)
    assert "the normalization has another reader" in [site.refusal for site in outcome.sites]


@pytest.mark.parametrize(
    "body",
    [
        lambda x, g: op.multiply(op.nn.layer_norm(x, g, _zeros(8), [-1]), g),  # scaled already
        lambda x, g: op.add(op.nn.layer_norm(x, _ones(8), g, [-1]), g),  # shifted already
        lambda x, g: op.multiply(op.nn.layer_norm(x, _ones(8), g, [-1]), g),
        lambda x, g: op.multiply(op.nn.rms_norm(x, g, [-1]), g),
        lambda x, g: op.add(op.nn.rms_norm(x, _ones(8), [-1]), g),  # rms_norm has no shift
        lambda x, g: op.subtract(op.nn.layer_norm(x, _ones(8), _zeros(8), [-1]), g),
    ],
)
def test_what_is_taken_already_is_no_site(body) -> None:
    assert assert_kept(AbsorbScales(), body, (8, 8), (8,)).sites == ()


def _grouped(
    x: relax.Expr, split: tuple[int, ...], axes: list[int], merged: tuple[int, ...] | None = None
) -> relax.Expr:
    ones, zeros = _ones(split[1]), _zeros(split[1])
    normalized = op.nn.instance_norm(op.reshape(x, split), ones, zeros, 1, axes)
    return op.reshape(normalized, merged or [int(extent) for extent in x.ty.shape.values])


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (lambda x: _grouped(x, (4, 2, 3), [2]), (8, 3), "no axes of batch, groups and positions"),
        (lambda x: _grouped(x, (4, 3, 25), [2]), (2, 6, 25), "the reshape changes the batch"),
        (lambda x: _grouped(x, (2, 3, 2, 25), [2]), (2, 6, 25), "not normalized over all but two axes"),
        (lambda x: _grouped(x, (2, 4, 3), [2]), (2, 6, 2), "the groups do not divide the channels"),
    ],
)
def test_groups_of_another_form_are_refused(body, shape, reason: str) -> None:
    assert [site.refusal for site in assert_kept(AbsorbScales(), body, shape).sites] == [reason]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: _grouped(x, (2, 3, 50), [2], (2, 3, 2, 25)),  # not reshaped back
        lambda x: op.reshape(op.nn.instance_norm(x, _ones(6), _zeros(6), 1, [2]), (2, 150)),
        lambda x: op.reshape(op.nn.instance_norm(op.reshape(x, (2, 3, 50)), _zeros(3), _zeros(3), 1, [2]), (2, 6, 25)),
    ],
)
def test_reshapes_around_nothing_grouped_are_no_site(body) -> None:
    assert assert_kept(AbsorbScales(), body, (2, 6, 25)).sites == ()


def test_groups_keep_the_epsilon() -> None:
    def before(x):
        return op.reshape(op.nn.instance_norm(op.reshape(x, (2, 3, 50)), _ones(3), _zeros(3), 1, [2], 0.25), (2, 6, 25))

    assert_rewritten(
        AbsorbScales(), before, lambda x: op.nn.group_norm(x, _ones(6), _zeros(6), 3, 1, [2], 0.25), (2, 6, 25)
    )
