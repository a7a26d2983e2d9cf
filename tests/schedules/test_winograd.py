from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from passes.block_channels import BlockChannels
from passes.winograd import error_growth, pack_winograd
from schedules.schedule import schedule_module
from schedules.winograd_structure import largest_result, winograd
from schedules.winograd_transforms import SIZES, integer_transforms, transforms
from targets.base import Target
from tests.schedules.execution import TARGET, Dimension, compiled, lower, module_of, normal
from tests.schedules.test_convolution import convolve

BLOCK = TARGET.layouts.channel_block
FORMS = [(tile, stride) for stride, tiles in SIZES.items() for tile in tiles]


@dataclass(frozen=True)
class Layer:
    """F(m, 3) with a stride, of images of a size, with zeros `before` and `after` them."""

    form: tuple[int, int]
    image: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """The size of the images, at least one that the filter fits into."""
        height, width = (max(n, 3 - b - a) for n, b, a in zip(self.image, self.before, self.after, strict=True))
        return height, width

    def padded(self, images: np.ndarray) -> np.ndarray:
        return np.pad(images, [(0, 0), (0, 0), *zip(self.before, self.after, strict=True)])


LAYERS = st.builds(
    Layer,
    form=st.sampled_from(FORMS),
    image=st.tuples(st.integers(1, 19), st.integers(1, 23)),
    before=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    after=st.tuples(st.integers(0, 2), st.integers(0, 3)),
)


def size_of_results(image: Sequence[int], before: Sequence[int], after: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple((n + b + a - 3) // stride + 1 for n, b, a in zip(image, before, after, strict=True))


def in_blocks(image: np.ndarray, filler: float = 0.0, block: int = BLOCK) -> np.ndarray:
    """Return [N, C, H, W] as [N, C/block, H, W, block], `filler` past the last channel."""
    batch, channels, *size = image.shape
    padded = np.pad(image, [(0, 0), (0, -channels % block), (0, 0), (0, 0)], constant_values=filler)
    return np.ascontiguousarray(np.moveaxis(padded.reshape(batch, -1, block, *size), 2, -1))


def filtered(
    x: np.ndarray,
    w: np.ndarray,
    tile: int,
    before: tuple[int, int] = (1, 1),
    after: tuple[int, int] = (1, 1),
    batch: Dimension | None = None,
    stride: int = 1,
    target: Target = TARGET,
) -> np.ndarray:
    """Return relu(conv(x, w) + residual of ones) by F(tile, 3)."""
    size = size_of_results(x.shape[2:], before, after, stride)
    image = in_blocks(x, filler=np.nan)
    weights = relax.const(pack_winograd(w, tile, BLOCK, stride=stride))

    def layer(image: relax.Var) -> relax.Expr:
        builder = relax.BlockBuilder.current()
        y = builder.emit(builder.call_te(lambda x, w: winograd(x, w, tile, before, size, stride), image, weights))
        return op.nn.relu(op.add(y, relax.const(np.ones((1, 1, *size, 1), np.float32))))

    module = module_of(layer, [[batch or len(x), *image.shape[1:]]], ["float32"])
    module, reports = schedule_module(lower(module), target)
    assert "winograd" in {report.family for report in reports}
    result = np.moveaxis(compiled(module)(image), -1, 2)
    return result.reshape(len(x), -1, *size)[:, : len(w)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    layer=LAYERS,
    channels=st.sampled_from([(2, 1), (16, 16), (17, 31), (24, 80), (40, 8), (3, 37)]),
    batch=st.sampled_from([1, 2]),
)
def test_filtering_of_any_size_stride_and_padding(layer: Layer, channels: tuple[int, int], batch: int) -> None:
    x, w = normal(batch, channels[0], *layer.size), normal(channels[1], channels[0], 3, 3, seed=1)
    tile, stride = layer.form
    got = filtered(x, w, tile, layer.before, layer.after, stride=stride)
    want = np.maximum(convolve(layer.padded(x), w, stride) + 1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=6 * 2.0**-24 * 3 * error_growth(tile, channels[0], stride))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    size=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    channels=st.sampled_from([(48, 144), (40, 100)]),
    batch=st.sampled_from([2, 4, 5, 6, 8]),
)
def test_tasks_have_the_tiles_of_several_small_images(
    form: tuple[int, int], size: tuple[int, int], channels: tuple[int, int], batch: int
) -> None:
    x, w = normal(batch, channels[0], *size), normal(channels[1], channels[0], 3, 3, seed=1)
    tile, stride = form
    caches = replace(TARGET.caches, level2=256 * 1024)
    got = filtered(x, w, tile, stride=stride, target=replace(TARGET, multiply_adds=2, caches=caches))
    np.testing.assert_array_equal(got, filtered(x, w, tile, stride=stride))


@pytest.mark.parametrize(("batch", "channels", "size", "tiles"), [(1, 256, 14, 5), (8, 256, 14, 16), (8, 512, 7, 16)])
def test_tasks_read_weights_for_many_tiles_where_registers_are_few(
    batch: int, channels: int, size: int, tiles: int
) -> None:
    target = targets.get("x86-avx2")
    weights = relax.const(normal(channels, channels, 3, 3))
    module = module_of(lambda x: op.nn.conv2d(x, weights, padding=1), [(batch, channels, size, size)], ["float32"])
    reports = schedule_module(lower(BlockChannels(target.layouts.channel_block).run(module).module), target)[1]
    assert [report.parameters["tiles"] for report in reports if report.family == "winograd"] == [tiles]


def test_symbolic_batch() -> None:
    x, w = normal(3, BLOCK, 9, 12), normal(2 * BLOCK, BLOCK, 3, 3, seed=1)
    got = filtered(x, w, 4, batch="n")
    want = np.maximum(convolve(x, w, 1, 1) + 1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=6 * 2.0**-24 * 3 * error_growth(4, BLOCK))


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_error_stays_below_the_growth_that_the_pass_allows(tile: int, stride: int) -> None:
    channels = 256
    x, w = normal(1, channels, 24, 24), normal(BLOCK, channels, 3, 3, seed=1)
    images = np.concatenate([x, np.maximum(x, 0), np.ones_like(x)])
    exact = np.maximum(convolve(images.astype(np.float64), w.astype(np.float64), stride, 1) + 1, 0)
    errors = np.abs(filtered(images, w, tile, stride=stride) - exact).max((1, 2, 3)) / np.abs(exact).max((1, 2, 3))
    assert errors.max() < 2.0**-24 * error_growth(tile, channels, stride)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_transforms_filter_exactly(tile: int, stride: int) -> None:
    chosen = transforms(tile, stride)
    data, taps = normal(chosen.window).astype(np.float64), normal(3, seed=1).astype(np.float64)
    products = (np.array(chosen.weights) @ taps) * (np.array(chosen.data) @ data)
    want = np.convolve(data, taps[::-1], mode="valid")[::stride]
    np.testing.assert_allclose(np.array(chosen.outputs) @ products, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_transforms_of_integers_give_a_multiple_of_what_filters_give(tile: int, stride: int) -> None:
    chosen = integer_transforms(tile, stride)
    generator = np.random.default_rng(0)
    data, taps = generator.integers(0, 256, chosen.window), generator.integers(-128, 128, 3)
    products = (np.array(chosen.weights) @ taps) * (np.array(chosen.data) @ data)
    want = np.convolve(data, taps[::-1], mode="valid")[::stride]
    np.testing.assert_array_equal(np.array(chosen.outputs) @ products, chosen.scale * want)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_words_hold_transformed_bytes(tile: int, stride: int) -> None:
    for matrix, largest in (
        (integer_transforms(tile, stride).data, 255),
        (integer_transforms(tile, stride).weights, 128),
    ):
        assert np.abs(matrix).sum(1).max() ** 2 * largest < 2**15


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_multiples_of_the_largest_results_are_numbers_of_32_bits(tile: int, stride: int) -> None:
    scale = integer_transforms(tile, stride).scale ** 2
    power = scale & -scale
    assert largest_result(tile, stride) * power == 2**31


@pytest.mark.skipif(TARGET.architecture != "x86_64", reason="words are multiplied by AVX2")
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    layer=LAYERS,
    channels=st.sampled_from([(2, 1), (16, 16), (18, 31), (24, 80), (40, 8), (6, 37)]),
    batch=st.sampled_from([1, 2]),
    extreme=st.sampled_from([None, 127, -128]),
    narrow=st.booleans(),
)
def test_filtering_of_bytes_is_exact(
    layer: Layer, channels: tuple[int, int], batch: int, extreme: int | None, narrow: bool
) -> None:
    target, (tile, stride), (inputs, outputs) = targets.get("x86-avx2"), layer.form, channels
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (batch, inputs, *layer.size)).astype(np.int16)
    w = generator.integers(-128, 128, (outputs, inputs, 3, 3)).astype(np.int8)
    if extreme is not None:
        x[:], w[:] = 255, extreme
    size = size_of_results(layer.size, layer.before, layer.after, stride)
    block = target.layouts.channel_block
    weights = relax.const(pack_winograd(w, tile, block, stride=stride))

    def codes(image: relax.Var) -> relax.Expr:
        builder = relax.BlockBuilder.current()
        sums = builder.call_te(lambda x, w: winograd(x, w, tile, layer.before, size, stride), image, weights)
        scaled = op.multiply(op.astype(sums, "float32"), relax.const(np.float32(2**-16)))
        return op.astype(op.astype(op.clip(op.round(scaled), 0, 255), "uint8"), "int16") if narrow else sums

    image = in_blocks(x, 7, block)
    module, reports = schedule_module(lower(module_of(codes, [image.shape], ["int16"])), target)
    assert [report.family for report in reports] == ["winograd"]
    got = np.moveaxis(compiled(module, target)(image), -1, 2).reshape(batch, -1, *size)[:, :outputs]
    want = convolve(layer.padded(x).astype(np.int64), w.astype(np.int64), stride)
    if narrow:
        want = np.clip(np.rint(want.astype(np.float32) * np.float32(2**-16)), 0, 255)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_constants_of_the_code_are_exact_in_fp32(tile: int, stride: int) -> None:
    for matrix in (transforms(tile, stride).data, transforms(tile, stride).outputs):
        np.testing.assert_array_equal(np.array(matrix, np.float32), np.array(matrix))
