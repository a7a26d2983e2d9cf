from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from optimizer.certificate.tolerance import arithmetic
from passes.base import Refusal
from passes.blocked_operators import Geometry
from passes.winograd import ALLOWANCE, choose_tile, error_growth, pack_winograd
from schedules.winograd_transforms import SIZES, transforms

PLAIN = Geometry((1, 1), (1, 1), (1, 1), (1, 1))


def refusal(
    shape: tuple[int, ...], image: tuple[int, int], geometry: Geometry = PLAIN, largest: int = 4, in_pairs: bool = False
) -> str:
    with pytest.raises(Refusal) as refused:
        choose_tile(shape, image, 1, geometry, largest, in_pairs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("channels", "size", "batch", "tile"), [(64, 56, 1, 4), (128, 28, 1, 4), (256, 14, 1, 2), (256, 14, 8, 4)]
)
def test_tile_follows_from_the_number_of_tiles(channels: int, size: int, batch: int, tile: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), batch, PLAIN, 4) == tile


def test_refusals_give_the_reason() -> None:
    assert "16 tiles, too few" in refusal((512, 512, 3, 3), (7, 7))
    assert "kernel is 5x5" in refusal((64, 64, 5, 5), (28, 28))
    assert refusal((64, 64, 3, 3), (28, 28), Geometry((2, 2), (1, 1), (1, 1), (1, 1))) == "it is strided or dilated"
    assert "times as fast" in refusal((4, 4, 3, 3), (56, 56))


@pytest.mark.parametrize(("channels", "size", "batch"), [(64, 56, 1), (256, 14, 1), (512, 7, 1), (256, 14, 8)])
def test_tile_of_pairs_is_one_that_keeps_bfloat16_exact_enough(channels: int, size: int, batch: int) -> None:
    assert choose_tile((channels, channels, 3, 3), (size, size), batch, PLAIN, 4, in_pairs=True) == 2
    assert transforms(2).amplification < ALLOWANCE < transforms(4).amplification


def test_few_channels_in_pairs_do_not_pay_for_transforms_in_fp32() -> None:
    assert choose_tile((24, 24, 3, 3), (56, 56), 1, PLAIN, 2) == 2
    assert "times as fast" in refusal((24, 24, 3, 3), (56, 56), in_pairs=True)


def test_largest_tile_is_an_option() -> None:
    assert choose_tile((64, 64, 3, 3), (56, 56), 1, PLAIN, 2) == 2


@pytest.mark.parametrize("tile", SIZES)
@pytest.mark.parametrize("channels", [8, 64, 512])
def test_error_of_a_layer_is_within_half_of_the_certificates_tolerance(tile: int, channels: int) -> None:
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
    assert error_growth(tile, channels) * 2.0**-24 < allowed


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
