from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from passes.fold_norm_scales import FoldNormScales
from tests.passes.graph import Body, assert_kept, assert_rewritten, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import constants, operators

_RNG = np.random.default_rng(11)
_SCALE, _SHIFT = (_RNG.uniform(0.5, 2, 8).astype("float32") for _ in range(2))
_A, _B = (_RNG.standard_normal((8, columns)).astype("float32") for columns in (4, 6))
_BIAS = _RNG.standard_normal(4).astype("float32")
_ONES, _ZEROS = np.ones(8, "float32"), np.zeros(8, "float32")


def _rms(x: relax.Expr, scale: np.ndarray = _SCALE, axes: tuple[int, ...] = (-1,)) -> relax.Expr:
    return op.nn.rms_norm(x, relax.const(scale), axes=list(axes), epsilon=1e-5)


def _layer(x: relax.Expr, scale: np.ndarray = _SCALE, shift: np.ndarray = _SHIFT) -> relax.Expr:
    return op.nn.layer_norm(x, relax.const(scale), relax.const(shift), axes=[-1], epsilon=1e-5)


def _product(x: relax.Expr, weight: np.ndarray, bias: np.ndarray | None = None) -> relax.Expr:
    product = op.matmul(x, relax.const(weight))
    return product if bias is None else op.add(product, relax.const(bias))


def _bound(value: relax.Expr) -> relax.Expr:
    """Return a value bound to one variable, whatever reads it."""
    return relax.BlockBuilder.current().emit(value)


def _scaled(weight: np.ndarray, scale: np.ndarray = _SCALE) -> np.ndarray:
    return (weight.astype("float64") * scale.astype("float64")[:, None]).astype("float32")


def _parallel(normalized: relax.Expr, scale: np.ndarray) -> list[relax.Expr]:
    return [_product(normalized, _scaled(_A, scale)), _product(normalized, _scaled(_B, scale))]


def test_the_scale_goes_into_the_weights_of_all_products() -> None:
    assert_rewritten(
        FoldNormScales(),
        lambda x: _parallel(_bound(_rms(x)), _ONES),
        lambda x: _parallel(_bound(_rms(x, _ONES)), _SCALE),
        ("rows", 8),
    )


def test_the_shift_goes_into_the_bias() -> None:
    bias = (_BIAS + _SHIFT.astype("float64") @ _A.astype("float64")).astype("float32")
    assert_rewritten(
        FoldNormScales(),
        lambda x: _product(_layer(x), _A, _BIAS),
        lambda x: _product(_layer(x, _ONES, _ZEROS), _scaled(_A), bias),
        (2, "rows", 8),
    )


def test_a_scale_without_a_shift_needs_no_bias() -> None:
    assert_rewritten(
        FoldNormScales(),
        lambda x: _product(_layer(x, _SCALE, _ZEROS), _A),
        lambda x: _product(_layer(x, _ONES, _ZEROS), _scaled(_A)),
        (3, 8),
    )


def test_views_that_keep_the_columns_are_looked_through() -> None:
    assert_rewritten(
        FoldNormScales(),
        lambda x: _product(op.reshape(_rms(x), (6, 8)), _A),
        lambda x: _product(op.reshape(_rms(x, _ONES), (6, 8)), _scaled(_A)),
        (2, 3, 8),
    )


def test_slices_that_keep_the_columns_are_looked_through() -> None:
    assert_rewritten(
        FoldNormScales(),
        lambda x: _product(op.strided_slice(_rms(x), [1], [1], [3]), _A),
        lambda x: _product(op.strided_slice(_rms(x, _ONES), [1], [1], [3]), _scaled(_A)),
        (2, "rows", 8),
    )


def test_no_constant_gets_larger() -> None:
    module = graph(lambda x: _product(_layer(x), _A, _BIAS), (3, 8))
    before, after = (
        sum(array.nbytes for array in constants(each)) for each in (module, FoldNormScales().run(module).module)
    )
    assert after == before


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.sampled_from([1, 2, 7, 13]), st.integers(1, 6), st.booleans())
def test_numbers_stay_within_a_rounding_of_the_weights(rows: int, depth: int, columns: int, shifted: bool) -> None:
    rng = np.random.default_rng(rows * depth + columns)
    scale, shift = (rng.uniform(0.1, 3, depth).astype("float32") for _ in range(2))
    weight, bias = (rng.standard_normal(shape).astype("float32") for shape in ((depth, columns), (columns,)))

    def body(x: relax.Expr) -> relax.Expr:
        return _product(_layer(x, scale, shift), weight, bias) if shifted else _product(_rms(x, scale), weight)

    module = graph(body, (rows, depth))
    outcome = FoldNormScales().run(module)
    x = rng.standard_normal((rows, depth)).astype("float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    # Each term of the sums is rounded once more.
    bound = np.finfo("float32").eps * (np.sqrt(depth) * 4 * np.abs(weight).sum(0) * 3 + 4 * np.abs(bias))
    assert outcome.rewritten == 1
    assert (np.abs(after - before) <= bound).all()


def _two_readers(x: relax.Expr) -> list[relax.Expr]:
    normalized = _bound(_rms(x))
    return [_product(normalized, _A), op.exp(normalized)]


def _returned(x: relax.Expr) -> list[relax.Expr]:
    normalized = _bound(_rms(x))
    return [_product(normalized, _A), normalized]


def _tied(x: relax.Expr) -> list[relax.Expr]:
    return [_product(_rms(x), _A), op.multiply(relax.const(_A.T.copy()), relax.const(np.float32(3)))]


def _same_weights_twice(x: relax.Expr) -> list[relax.Expr]:
    weight = relax.const(_A)
    return [op.matmul(_rms(x), weight), op.exp(weight)]


def _shared_bias(x: relax.Expr) -> list[relax.Expr]:
    bias = relax.const(_BIAS)
    return [op.add(op.matmul(_layer(x), relax.const(_A)), bias), op.exp(bias)]


_COLUMNS_MOVE = "relax.reshape reads the normalized value too, which is no product with constant weights"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_two_readers, "relax.exp reads the normalized value too, which is no product with constant weights"),
        (_returned, "the function returns the normalized value"),
        (lambda x: op.matmul(_rms(x), op.permute_dims(x)),
         "relax.matmul reads the normalized value too, which is no product with constant weights"),
        (lambda x: _product(op.reshape(_rms(x), (6, 4)), _RNG.standard_normal((4, 2)).astype("float32")),
         _COLUMNS_MOVE),
        (lambda x: _product(op.strided_slice(_rms(x), [1], [0], [4]), _A[:4]),
         "relax.strided_slice reads the normalized value too, which is no product with constant weights"),
        (lambda x: _product(_rms(x, np.full((3, 8), 2, "float32"), (-2, -1)), _A),
         "it is not over the last axis alone"),
        (lambda x: _product(_layer(x), _A), "a product has no bias that could take up the shift"),
        (lambda x: _product(_layer(x), _A, np.ones(1, "float32")),
         "a product's bias would become larger, or be stored twice"),
        (_shared_bias, "a product's bias would become larger, or be stored twice"),
        (_tied, "others read a product's weights too: scaled, they would be stored twice"),
        (_same_weights_twice, "others read a product's weights too: scaled, they would be stored twice"),
        (lambda x: _product(_rms(x, _SCALE * np.float32(1e30)), _A * np.float32(1e20)),
         "scaled, a product's weights or bias would leave the range of float32"),
        (lambda x: _product(_layer(x, _ONES, _ONES * np.float32(3e38)), np.full((8, 4), 2, "float32"), _BIAS),
         "scaled, a product's weights or bias would leave the range of float32"),
        (lambda x: _product(_rms(x, _SCALE * np.float32(1e-30)), _A * np.float32(1e-20)),
         "scaled, a product's weights or bias would leave the range of float32"),
    ],
)  # fmt: skip
def test_refusals(body: Body, reason: str) -> None:
    outcome = assert_kept(FoldNormScales(), body, (3, 8))
    assert [site.refusal for site in outcome.sites] == [reason]


def test_half_precision_is_refused() -> None:
    def body(x: relax.Expr) -> relax.Expr:
        return _product(_rms(x, _SCALE.astype("float16")), _A.astype("float16"))

    (site,) = assert_kept(FoldNormScales(), body, (3, 8), dtype="float16").sites
    assert site.refusal == "weights of float16 would lose digits to one more rounding"


def test_a_scale_that_is_not_constant_is_refused() -> None:
    def body(x: relax.Expr, scale: relax.Expr) -> relax.Expr:
        return _product(op.nn.rms_norm(x, scale, axes=[-1], epsilon=1e-5), _A)

    (site,) = assert_kept(FoldNormScales(), body, (3, 8), (8,)).sites
    assert site.refusal == "its scale or shift is not constant"


def test_a_plain_normalization_is_no_site() -> None:
    assert not assert_kept(FoldNormScales(), lambda x: _product(_layer(x, _ONES, _ZEROS), _A), (3, 8)).sites


def test_quantized_weights_are_refused() -> None:
    def identity(x: tvm.te.Tensor) -> tvm.te.Tensor:
        return tvm.te.compute(x.shape, lambda *index: x[index], name="kernel")

    def body(x: relax.Expr) -> relax.Expr:
        builder = relax.BlockBuilder.current()
        return builder.call_te(identity, _bound(_rms(x)))

    outcome = FoldNormScales().run(graph(body, (3, 8)))
    assert [site.refusal for site in outcome.sites] == ["the weights of a product are quantized, and take up no scale"]
    assert operators(outcome.module) == ["relax.nn.rms_norm", "relax.call_tir"]


def test_a_bias_may_be_the_first_operand() -> None:
    bias = (_BIAS + _SHIFT.astype("float64") @ _A.astype("float64")).astype("float32")

    def before(x: relax.Expr) -> relax.Expr:
        return op.add(relax.const(_BIAS), op.matmul(_layer(x), relax.const(_A)))

    def after(x: relax.Expr) -> relax.Expr:
        return _product(_layer(x, _ONES, _ZEROS), _scaled(_A), bias)

    assert_rewritten(FoldNormScales(), before, after, (3, 8))


def test_several_normalizations_are_folded_at_once() -> None:
    def body(scale: np.ndarray, weights: Sequence[np.ndarray]) -> Body:
        return lambda x, y: [_product(_rms(x, scale), weights[0]), _product(_rms(y, scale), weights[1])]

    folded = [_scaled(_A), _scaled(_B)]
    outcome = FoldNormScales().run(graph(body(_SCALE, [_A, _B]), (3, 8), (5, 8)))
    tvm.ir.assert_structural_equal(outcome.module, graph(body(_ONES, folded), (3, 8), (5, 8)))
    assert [site.refusal for site in outcome.sites] == [None, None]


def test_a_normalization_that_nothing_reads_is_left() -> None:
    def body(x: relax.Expr) -> relax.Expr:
        _bound(_rms(x))
        return op.exp(x)

    assert [site.refusal for site in FoldNormScales().run(graph(body, (3, 8))).sites] == ["nothing reads it"]
