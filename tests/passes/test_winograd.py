from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from optimizer.certificate.tolerance import arithmetic
from passes.base import Refusal
from passes.blocked_operators import Geometry
from passes.winograd import ALLOWANCE, bound_of_results, choose_tile, error_growth, pack_winograd
from schedules.winograd_structure import largest_result
from schedules.winograd_transforms import SIZES, integer_transforms, transforms

PLAIN = Geometry((1, 1), (1, 1), (1, 1), (1, 1))
STRIDED = Geometry((2, 2), (1, 1), (1, 1), (1, 1))


def refusal(
    shape: tuple[int, ...], image: tuple[int, int], geometry: Geometry = PLAIN, largest: int = 4, in_pairs: bool = False
) -> str:
    with pytest.raises(Refusal) as refused:
        choose_tile(shape, image, 1, geometry, largest, in_pairs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("channels", "size", "batch", "tile"),
    [(64, 56, 1, 4), (128, 28, 1, 4), (256, 14, 1, 3), (256, 14, 8, 4), (512, 7, 1, 2)],
)
def test_tile_follows_from_the_number_of_tiles(channels: int, size: int, batch: int, tile: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), batch, PLAIN, 4) == tile


@pytest.mark.parametrize(("channels", "size", "tile"), [(128, 56, 4), (256, 28, 2)])
def test_taps_of_stride_two_are_filtered_apart(channels: int, size: int, tile: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), 1, STRIDED, 4) == tile


def test_refusals_give_the_reason() -> None:
    reason = refusal((512, 512, 3, 3), (5, 5))
    assert "F(2, 3) has 9 tiles, too few" in reason
    assert "F(2, 3) would be" in refusal((512, 512, 3, 3), (14, 14), STRIDED)
    assert "kernel is 5x5" in refusal((64, 64, 5, 5), (28, 28))
    assert refusal((64, 64, 3, 3), (28, 28), Geometry((3, 3), (1, 1), (1, 1), (1, 1))) == "its strides are 3x3"
    assert refusal((64, 64, 3, 3), (28, 28), Geometry((2, 1), (1, 1), (1, 1), (1, 1))) == "its strides are 2x1"
    assert refusal((64, 64, 3, 3), (28, 28), Geometry((1, 1), (2, 2), (1, 1), (1, 1))) == "it is dilated"
    assert "times as fast" in refusal((4, 4, 3, 3), (56, 56))


@pytest.mark.parametrize(
    ("channels", "size", "batch", "tile"), [(64, 56, 1, 3), (256, 14, 1, 3), (512, 7, 1, 2), (256, 14, 8, 3)]
)
def test_tile_of_pairs_is_one_that_keeps_bfloat16_exact_enough(channels: int, size: int, batch: int, tile: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), batch, PLAIN, 4, in_pairs=True) == tile
    assert transforms(3).amplification < ALLOWANCE < transforms(4).amplification


def test_few_channels_in_pairs_do_not_pay_for_transforms_in_fp32() -> None:
    assert choose_tile((16, 16, 3, 3), (56, 56), 1, PLAIN, 2) == 2
    assert "times as fast" in refusal((16, 16, 3, 3), (56, 56), largest=2, in_pairs=True)


def test_largest_tile_is_an_option() -> None:
    assert choose_tile((64, 64, 3, 3), (56, 56), 1, PLAIN, 2) == 2


@pytest.mark.parametrize(("tile", "stride"), [(tile, stride) for stride, tiles in SIZES.items() for tile in tiles])
@pytest.mark.parametrize("channels", [8, 64, 512])
def test_error_of_a_layer_is_within_half_of_the_certificates_tolerance(tile: int, stride: int, channels: int) -> None:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, channels, 28, 28])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8, 26, 26])],
        [onnx.numpy_helper.from_array(np.ones((8, channels, 3, 3), np.float32), "w")],
    )
    tolerance = arithmetic(helper.make_model(graph)).tolerance("float32")
    allowed = ALLOWANCE * (1 + np.sqrt(9 * channels)) * 2.0**-24
    assert allowed <= tolerance / 2 * (1 + 1e-6)
    assert error_growth(tile, channels, stride) * 2.0**-24 < allowed


def test_packed_weights_are_zero_past_the_last_channel() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    packed = pack_winograd(weights, 2, 8)
    assert (packed.shape, packed.dtype) == ((1, 16, 3, 8), np.float32)
    assert not packed[..., 5:].any()
    np.testing.assert_array_equal(packed[0, 15, :, :5], weights[:, :, 2, 2].T)


def test_packed_pairs_are_neighbouring_inputs_rounded() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 6, 3, 3)).astype(np.float32)
    pairs = pack_winograd(weights, 2, 8, in_pairs=True)
    assert (pairs.shape, pairs.dtype) == ((1, 16, 3, 8, 2), ml_dtypes.bfloat16)
    plain = pack_winograd(weights, 2, 8).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(pairs[:, :, 2, :, 1], plain[:, :, 5])


@pytest.mark.parametrize(("channels", "size", "tile"), [(64, 56, 4), (128, 28, 4), (256, 14, 3)])
def test_tile_of_words_follows_from_the_number_of_tiles(channels: int, size: int, tile: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), 1, PLAIN, 4, bound=0) == tile


def test_no_tile_is_one_whose_multiples_could_exceed_32_bits() -> None:
    shape, image = (64, 64, 3, 3), (56, 56)
    assert choose_tile(shape, image, 1, PLAIN, 4, bound=largest_result(4, 1) - 1) == 4
    assert choose_tile(shape, image, 1, PLAIN, 4, bound=largest_result(4, 1)) == 3
    with pytest.raises(Refusal, match=r"multiples of F\(2, 3\) could exceed 32 bits"):
        choose_tile(shape, image, 1, PLAIN, 4, bound=largest_result(2, 1))


def test_bound_of_results_is_what_the_largest_data_reach() -> None:
    weights = np.random.default_rng(0).integers(-128, 128, (5, 6, 3, 3)).astype(np.int8)
    flat = weights.reshape(5, -1).astype(np.int64)
    reached = max(int(np.abs(flat @ (255 * (row > 0))).max()) for row in (*flat, *-flat))
    assert bound_of_results(weights) == reached


def test_packed_words_are_neighbouring_inputs() -> None:
    weights = np.random.default_rng(0).integers(-128, 128, (5, 6, 3, 3)).astype(np.int8)
    packed = pack_winograd(weights, 4, 8)
    assert (packed.shape, packed.dtype) == ((1, 36, 3, 8, 2), np.int16)
    last = weights[:, :, 2, 2].reshape(5, 3, 2).swapaxes(0, 1)
    np.testing.assert_array_equal(packed[0, 35, :, :5], integer_transforms(4).weights[-1][-1] ** 2 * last)
