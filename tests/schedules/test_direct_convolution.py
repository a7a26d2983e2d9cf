from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

import targets
from passes.block_channels import BlockChannels
from schedules.division import Division, with_division
from schedules.schedule import schedule_module
from targets.base import Target
from tests.schedules.execution import TARGET, Dimension, compiled, lower, module_of, normal, sum_tolerance
from tests.schedules.test_convolution import convolve

BLOCK = TARGET.layouts.channel_block


def run_blocked(
    function, image: np.ndarray, shape: list[Dimension] | None = None, target: Target = TARGET
) -> tuple[np.ndarray, list[str]]:
    """Return the result of `function` of one image in blocked layout, and the families of its kernels in order."""
    module = module_of(function, [shape or list(image.shape)], ["float32"])
    block = target.layouts.channel_block
    module, reports = schedule_module(lower(BlockChannels(block, winograd=0).run(module).module), target)
    return compiled(module, target)(image), sorted(report.family for report in reports)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([(1, 16), (3, 37), (16, 16), (17, 31), (24, 80), (40, 8)]),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 3),
    dilation=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 2]),
)
def test_convolution_with_bias_residual_and_activation(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    batch: int,
) -> None:
    reach = dilation * (kernel - 1) + 1
    size = (max(size[0], reach - 2 * padding), max(size[1], reach - 2 * padding))
    x, w = normal(batch, channels[0], *size), normal(channels[1], channels[0], kernel, kernel, seed=1)
    bias = normal(1, channels[1], 1, 1, seed=2)

    def layer(x: relax.Var) -> relax.Expr:
        y = op.nn.conv2d(x, relax.const(w), strides=stride, padding=padding, dilation=dilation)
        return op.nn.relu(op.add(y, relax.const(bias)))

    got, families = run_blocked(layer, x)
    want = np.maximum(convolve(x, w, stride, padding, dilation) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(channels[0] * kernel**2, 1.0))
    if channels[0] > 1:
        assert "direct-convolution" in families


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "stride", "size"),
    [
        (2 * BLOCK, 2, 3, 1, (9, 14)),
        (4 * BLOCK, 2, 1, 2, (7, 5)),
        (BLOCK + 3, BLOCK + 3, 3, 2, (11, 29)),
        (2 * BLOCK, 2 * BLOCK, 5, 1, (4, 3)),
        (5, 5, 7, 1, (8, 31)),
    ],
)
def test_groups_and_depthwise(channels: int, groups: int, kernel: int, stride: int, size: tuple[int, int]) -> None:
    x, w = normal(1, channels, *size), normal(channels, channels // groups, kernel, kernel, seed=1)
    got, families = run_blocked(
        lambda x: op.nn.conv2d(x, relax.const(w), strides=stride, padding=kernel // 2, groups=groups), x
    )
    want = convolve(x, w, stride, kernel // 2, groups=groups)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(kernel**2 * channels // groups, 1.0))
    assert "direct-convolution" in families


def test_padding_on_one_side_and_wider_than_the_image() -> None:
    x, w = normal(1, BLOCK, 3, 2), normal(BLOCK, BLOCK, 5, 5, seed=1)
    padding = (4, 0, 1, 5)
    got, families = run_blocked(lambda x: op.nn.conv2d(x, relax.const(w), padding=padding), x)
    padded = np.pad(x, [(0, 0), (0, 0), (4, 1), (0, 5)])
    np.testing.assert_allclose(got, convolve(padded, w), rtol=1e-6, atol=sum_tolerance(25 * BLOCK, 1.0))
    assert "direct-convolution" in families


def test_symbolic_batch() -> None:
    x, w = normal(3, BLOCK, 9, 12), normal(BLOCK, BLOCK, 3, 3, seed=1)
    got, families = run_blocked(lambda x: op.nn.conv2d(x, relax.const(w), padding=1), x, ["n", BLOCK, 9, 12])
    np.testing.assert_allclose(got, convolve(x, w, 1, 1), rtol=1e-6, atol=sum_tolerance(9 * BLOCK, 1.0))
    assert "direct-convolution" in families


def test_one_and_three_spatial_dimensions() -> None:
    x, w = normal(2, 5, 19), normal(17, 5, 3, seed=1)
    got, _ = run_blocked(lambda x: op.nn.conv1d(x, relax.const(w), strides=2, padding=1), x)
    np.testing.assert_allclose(got, convolve(x, w, 2, 1), rtol=1e-6, atol=sum_tolerance(15, 1.0))
    x, w = normal(1, BLOCK, 5, 6, 7), normal(BLOCK, BLOCK, 3, 3, 3, seed=1)
    got, families = run_blocked(lambda x: op.nn.conv3d(x, relax.const(w), padding=1), x)
    np.testing.assert_allclose(got, convolve(x, w, 1, 1), rtol=1e-6, atol=sum_tolerance(27 * BLOCK, 1.0))
    assert "direct-convolution" in families


@pytest.mark.parametrize("name", sorted({TARGET.name, "x86-avx2"}))
@pytest.mark.parametrize("size", [(13, 15), (7, 7), (28, 5)])
def test_pooling(size: tuple[int, int], name: str) -> None:
    target = targets.get(name)
    x, w = normal(2, BLOCK, *size), normal(BLOCK, BLOCK, 1, 1, seed=1)
    product = convolve(x, w)
    atol = sum_tolerance(9 * BLOCK, 1.0)
    padded = np.pad(product, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    got, families = run_blocked(
        lambda x: op.nn.max_pool2d(op.nn.conv2d(x, relax.const(w)), (3, 3), (2, 2), (1, 1)), x, target=target
    )
    np.testing.assert_allclose(got, windows.max((-1, -2)), rtol=1e-6, atol=atol)
    assert families.count("direct-convolution") == 2
    padded = np.where(np.isinf(padded), 0, padded)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    got, families = run_blocked(
        lambda x: op.nn.avg_pool2d(op.nn.conv2d(x, relax.const(w)), (3, 3), (2, 2), (1, 1), count_include_pad=True),
        x,
        target=target,
    )
    np.testing.assert_allclose(got, windows.mean((-1, -2)), rtol=1e-6, atol=atol)
    assert families.count("direct-convolution") == 2


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    beyond=st.tuples(st.integers(0, 9), st.integers(3, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(2, 7)),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 3),
    dilation=st.sampled_from([1, 2]),
)
def test_depthwise_taps_in_the_order_of_positions(
    beyond: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int, dilation: int
) -> None:
    target = targets.get("x86-avx2")
    channels = 2 * target.layouts.channel_block + 1
    reach = [dilation * (taps - 1) + 1 - 2 * padding for taps in kernel]
    x = normal(2, channels, *(max(1, least) + more for least, more in zip(reach, beyond, strict=True)))
    w = normal(channels, 1, *kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, relax.const(w), strides=stride, padding=padding, dilation=dilation, groups=channels)

    got, _ = run_blocked(layer, x, target=target)
    want = convolve(x, w, stride, padding, dilation, channels)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(kernel[0] * kernel[1], 1.0))


@pytest.mark.parametrize(("kernel", "columns"), [(3, 12), (5, 10), (7, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_tiles_have_sums_enough_to_hide_the_latency(kernel: int, columns: int, stride: int) -> None:
    target, weights = targets.get("x86-avx2"), relax.const(normal(64, 1, kernel, kernel))

    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, weights, strides=stride, padding=kernel // 2, groups=64)

    module = module_of(layer, [(1, 64, 120 * stride, 120 * stride)], ["float32"])
    reports = schedule_module(lower(BlockChannels(target.layouts.channel_block).run(module).module), target)[1]
    found = [report.parameters["columns"] for report in reports if report.family == "direct-convolution"]
    assert found == [columns]


def parameters_of_pointwise(target: Target, outputs: int, image: tuple[int, int, int, int]) -> dict[str, object]:
    """Return the parameters of a product of every position of an image: a convolution by a kernel of 1x1."""
    weights = relax.const(normal(outputs, image[1], 1, 1))
    module = module_of(lambda x: op.nn.conv2d(x, weights), [image], ["float32"])
    blocked = lower(BlockChannels(target.layouts.channel_block).run(module).module)
    (found,) = (each for each in schedule_module(blocked, target)[1] if each.family == "direct-convolution")
    return dict(found.parameters)


@pytest.mark.parametrize(("size", "tile"), [(7, (2, 5)), (14, (2, 6)), (56, (2, 6))])
def test_tiles_load_few_elements_where_each_load_is_an_instruction(size: int, tile: tuple[int, int]) -> None:
    found = parameters_of_pointwise(targets.get("x86-avx2"), 256, (1, 64, size, size))
    assert (found["blocks"], found["columns"]) == tile


@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx512-amx"])
def test_weights_are_asked_for_where_a_core_begins_two_multiply_adds(name: str, channels: int) -> None:
    target, weights = targets.get(name), relax.const(normal(64, channels, 3, 3))
    module = module_of(lambda x: op.nn.conv2d(x, weights, padding=1), [(1, channels, 14, 14)], ["float32"])
    blocked = lower(BlockChannels(target.layouts.channel_block, 0).run(module).module)
    asks = channels == 64 and target.multiply_adds > 1
    assert ("prefetch" in schedule_module(blocked, target)[0].script()) == asks


@pytest.mark.parametrize(
    ("name", "channels", "size", "tile"),
    [
        ("x86-avx512", (64, 256), 56, (2, 14)),
        ("x86-avx512-amx", (64, 256), 56, (4, 6)),
        ("x86-avx512-amx", (256, 64), 56, (4, 6)),
        # A tile of six columns leaves one of 49, whose weights come from the last cache.
        ("x86-avx512-amx", (2048, 512), 7, (2, 13)),
    ],
)
def test_tiles_of_many_blocks_load_little_where_weights_are_asked_for(
    name: str, channels: tuple[int, int], size: int, tile: tuple[int, int]
) -> None:
    found = parameters_of_pointwise(targets.get(name), channels[1], (1, channels[0], size, size))
    assert (found["blocks"], found["columns"]) == tile


@pytest.mark.parametrize("size", [14, 28, 29, 56])
def test_with_narrow_tiles_no_part_of_an_image_is_a_remainder(size: int) -> None:
    parameters = parameters_of_pointwise(targets.get("x86-avx512-amx"), 64, (1, 64, size, size))
    tiles = -(-(size**2) // parameters["columns"])
    parts = -(-tiles // parameters["column_tiles"])
    assert tiles - (parts - 1) * parameters["column_tiles"] > parameters["column_tiles"] - parts


@pytest.mark.parametrize("division", list(Division))
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "batch"),
    [
        ((64, 130), 1, 1, (9, 7), 3),
        ((48, 80), 3, 2, (11, 13), 2),
        ((33, 96), 1, 2, (14, 5), 1),
        ((16, 48), 1, 1, (1, 1), 2),
    ],
)
def test_parts_of_an_image_that_a_small_cache_keeps(
    division: Division, channels: tuple[int, int], kernel: int, stride: int, size: tuple[int, int], batch: int
) -> None:
    level2 = 24 * 1024
    target = replace(TARGET, multiply_adds=2, cores=2, caches=replace(TARGET.caches, level2=level2))
    x, w = normal(batch, channels[0], *size), normal(channels[1], channels[0], kernel, kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.relu(op.nn.conv2d(x, relax.const(w), strides=stride, padding=kernel // 2))

    module = lower(BlockChannels(BLOCK, winograd=0).run(module_of(layer, [x.shape], ["float32"])).module)
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module[variable] = with_division(function, division)
    module, reports = schedule_module(module, target)
    assert "direct-convolution" in [report.family for report in reports]
    want = np.maximum(convolve(x, w, stride, kernel // 2), 0)
    tolerance = sum_tolerance(channels[0] * kernel**2, 1.0)
    np.testing.assert_allclose(compiled(module, target)(x), want, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(("multiply_adds", "rows"), [(1, 8), (2, 1)])
def test_tiles_of_channels_whose_weights_no_cache_keeps_pass_images_together(multiply_adds: int, rows: int) -> None:
    target = replace(targets.get("x86-avx512"), cores=2, multiply_adds=multiply_adds)
    assert parameters_of_pointwise(target, 1024, (8, 2048, 7, 7))["rows"] == rows


@pytest.mark.parametrize(("name", "column_tiles"), [("x86-avx512", 56), ("x86-avx2", 19)])
def test_few_registers_compute_parts_of_an_image_that_no_cache_keeps(name: str, column_tiles: int) -> None:
    """131 tiles of six columns are a prime number: parts are of about one size."""
    target = replace(targets.get(name), cores=2)
    assert parameters_of_pointwise(target, 512, (1, 128, 28, 28))["column_tiles"] == column_tiles


@pytest.mark.parametrize("outputs", [96, 256, 512])
@pytest.mark.parametrize("size", [14, 28, 29])
def test_with_few_registers_no_part_of_an_image_is_a_remainder(outputs: int, size: int) -> None:
    target = replace(targets.get("x86-avx2"), cores=2)
    parameters = parameters_of_pointwise(target, outputs, (1, 32, size, size))
    tiles = -(-(size**2) // parameters["columns"])
    parts = -(-tiles // parameters["column_tiles"])
    assert tiles - (parts - 1) * parameters["column_tiles"] > parameters["column_tiles"] - parts


@pytest.mark.parametrize(("kernel", "tile"), [(4, (2, 5)), (16, (2, 5)), (7, (4, 2))])
def test_columns_that_read_no_element_together_need_no_registers_for_them(kernel: int, tile: tuple[int, int]) -> None:
    target, stride = targets.get("x86-avx2"), 2 if kernel == 7 else kernel
    x, w = normal(1, 3, 14 * kernel, 14 * kernel), normal(96, 3, kernel, kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, relax.const(w), strides=stride, padding=(kernel - stride) // 2)

    module = lower(BlockChannels(target.layouts.channel_block).run(module_of(layer, [x.shape], ["float32"])).module)
    module, reports = schedule_module(module, target)
    (found,) = (each.parameters for each in reports if each.family == "direct-convolution")
    assert (found["blocks"], found["columns"]) == tile
    want = convolve(x, w, stride, (kernel - stride) // 2)
    np.testing.assert_allclose(compiled(module, target)(x), want, rtol=1e-6, atol=sum_tolerance(w[0].size, 1.0))
