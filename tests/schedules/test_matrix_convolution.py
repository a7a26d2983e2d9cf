"""Convolutions over blocked channels in tile registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import LoweredModule, build, lower
from passes.block_channels import BlockChannels
from schedules.report import Decide
from schedules.schedule import by_default
from targets.host import missing_features
from tests.schedules.execution import Dimension, assembly_of, module_of, normal, sum_tolerance
from tests.schedules.test_bf16_convolution import rounded
from tests.schedules.test_convolution import convolve

TARGET = targets.get("x86-avx512-amx")
BLOCK = TARGET.layouts.rounded_block
needs_tiles = pytest.mark.skipif(bool(missing_features(TARGET)), reason="this machine has no tile registers")


def in_blocks(
    layers: Callable[[relax.Var], relax.Expr], shape: Sequence[Dimension], decide: Decide = by_default
) -> LoweredModule:
    """Return the kernels of layers on an input in fp32, whose channels are in blocks."""
    plain = module_of(layers, [shape], ["float32"])
    return lower(BlockChannels(BLOCK, 0, "bfloat16").run(plain).module, TARGET, decide=decide)


def outputs_of(executable: relax.VMExecutable, x: np.ndarray) -> np.ndarray:
    """Return what compiled layers make of an input."""
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def stored_types(layers: Callable[[relax.Var], relax.Expr], shape: Sequence[Dimension]) -> list[str]:
    """Return the types of what the kernels of layers write, in order."""
    main = in_blocks(layers, shape).module["main"]
    return [str(binding.var.ty.dtype.dtype) for block in main.body.blocks for binding in block.bindings]


def compiled(
    weights: np.ndarray, bias: np.ndarray, shape: list[Dimension], stride: int, padding: int
) -> tuple[relax.VMExecutable, list[str]]:
    """Return the code of a convolution, what follows it, and the families of its kernels."""

    def layer(x: relax.Var) -> relax.Expr:
        y = op.nn.conv2d(x, relax.const(weights), strides=stride, padding=padding)
        return op.nn.relu(op.add(y, relax.const(bias)))

    lowered = in_blocks(layer, shape)
    return build(lowered.module, TARGET), [kernel.family for kernel in lowered.kernels]


@needs_tiles
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 37)),
    channels=st.sampled_from([(32, 32), (24, 80), (64, 96), (66, 40), (96, 17), (160, 64), (512, 256)]),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 2),
    batch=st.sampled_from([1, 2]),
    symbolic=st.booleans(),
)
# Padding that no tap reaches is a stage of its own, whose bfloat16 the copy of the image takes as bits.
@example(size=(1, 1), channels=(32, 32), kernel=1, stride=2, padding=1, batch=1, symbolic=False)
def test_sums_are_those_of_rounded_operands(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    batch: int,
    *,
    symbolic: bool,
) -> None:
    inputs, outputs = channels
    size = (max(size[0], kernel), max(size[1], kernel))
    x, w = rounded(normal(batch, inputs, *size)).astype("float32"), normal(outputs, inputs, kernel, kernel, seed=1)
    bias = normal(1, outputs, 1, 1, seed=2)
    shape: list[Dimension] = ["n" if symbolic else batch, inputs, *size]
    executable, families = compiled(w, bias, shape, stride, padding)
    got = outputs_of(executable, x)
    want = np.maximum(convolve(x, rounded(w), stride, padding) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(inputs * kernel**2, 1.0))
    # Filters of fewer channels than a step takes, and no divisor of these, take narrow blocks without tile registers.
    assert "matrix-convolution" in families or (kernel > 1 and inputs == 24)


@needs_tiles
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [((23, 37), 7, 2, 3), ((16, 18), 4, 4, 0), ((9, 5), 3, 1, 1)]
)
@pytest.mark.parametrize("channels", [3, 4])
def test_first_layer_of_few_channels(
    size: tuple[int, int], kernel: int, stride: int, padding: int, channels: int
) -> None:
    x, w = normal(2, channels, *size), normal(40, channels, kernel, kernel, seed=1)
    bias = normal(1, 40, 1, 1, seed=2)
    executable, families = compiled(w, bias, [*x.shape], stride, padding)
    got = outputs_of(executable, x)
    want = np.maximum(convolve(rounded(x), rounded(w), stride, padding) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(channels * kernel**2, 1.0))
    assert "matrix-convolution" in families


def test_few_channels_are_rounded_in_whole_vectors() -> None:
    weights = relax.const(normal(40, 3, 7, 7))
    module = in_blocks(lambda x: op.nn.conv2d(x, weights, strides=2, padding=3), [1, 3, 32, 40]).module
    blocks = next(
        str(function.script()) for name, function in module.functions_items() if "to_blocks" in name.name_hint
    )
    assert "optimizer_store_bf16" in blocks


def test_pixels_of_few_channels_are_copied_in_whole_vectors() -> None:
    weights = relax.const(normal(40, 3, 7, 7))
    script = in_blocks(lambda x: op.nn.conv2d(x, weights, strides=2, padding=3), [1, 3, 32, 60]).module.script()
    assert re.search(r"v in T.vectorized\((T.int64\()?32\)+:\n *image\[.* = T.reinterpret", str(script))


def test_requests_for_results_take_no_quotient_of_each_pixel() -> None:
    weights = relax.const(normal(64, 64, 3, 3))
    script = in_blocks(lambda x: op.nn.conv2d(x, weights, padding=1), [1, 64, 20, 40]).module.script()
    requests = [line.split("address_of")[1].split(", ") for line in str(script).splitlines() if "tiles_own" in line]
    # Within a block the requests move along the channels of its first pixel.
    assert requests
    assert all("i_1" in lane and not any("i_1" in each for each in place) for *place, lane in requests)


@needs_tiles
@pytest.mark.parametrize("channels", [2, 16, 24, 48])
def test_what_lies_behind_the_last_channel_is_not_read(channels: int) -> None:
    x, w = normal(1, channels + 1, 9, 9), normal(64, channels, 1, 1, seed=1)
    first = normal(channels, channels, 1, 1, seed=2)

    def layers(x: relax.Var) -> relax.Expr:
        # Of channels that there are not the first sums are zero, and their quotients no numbers.
        y = op.nn.conv2d(op.strided_slice(x, [1], [0], [channels]), relax.const(first))
        return op.nn.conv2d(op.divide(op.add(y, y), y), relax.const(w))

    got = outputs_of(build(in_blocks(layers, x.shape).module, TARGET), x)
    want = convolve(np.full((1, channels, 9, 9), 2.0, "float32"), rounded(w), 1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=sum_tolerance(channels, 4.0))


def test_fewer_channels_than_a_block_are_read_in_place() -> None:
    def script(channels: int) -> str:
        weights = relax.const(normal(96, channels, 1, 1))
        return str(in_blocks(lambda x: op.nn.conv2d(x, weights), [1, channels, 14, 14]).module.script())

    assert [" image = " in script(channels) for channels in (16, 24, 48)] == [False, False, True]


@needs_tiles
@pytest.mark.parametrize("kernel", [1, 3])
def test_large_weights_are_read_once_for_all_images(kernel: int) -> None:
    x = rounded(normal(3, 1024, 7, 7)).astype("float32")
    w, bias = normal(1024, 1024, kernel, kernel, seed=1), normal(1, 1024, 1, 1, seed=2)
    executable, _ = compiled(w, bias, [*x.shape], 1, kernel // 2)
    got = outputs_of(executable, x)
    want = np.maximum(convolve(x, rounded(w), 1, kernel // 2) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(1024 * kernel**2, 1.0))


def two_sums(x: relax.Var) -> relax.Expr:
    """Return a convolution of what is positive in the sum of two others."""
    first, second, third = (relax.const(normal(64, 64, 1, 1, seed=seed)) for seed in range(3))
    y = op.nn.relu(op.add(op.nn.conv2d(x, first), op.nn.conv2d(x, second)))
    return op.nn.conv2d(y, third)


@needs_tiles
def test_later_of_two_sums_is_rounded() -> None:
    x = rounded(normal(2, 64, 9, 7)).astype("float32")
    got = outputs_of(build(in_blocks(two_sums, x.shape).module, TARGET), x)
    first, second, third = (rounded(normal(64, 64, 1, 1, seed=seed)) for seed in range(3))
    sums = convolve(x, first, 1, 0).astype("float32") + rounded(convolve(x, second, 1, 0).astype("float32"))
    want = convolve(rounded(np.maximum(sums, 0).astype("float32")), third, 1, 0)
    # Sums in another order may round to a neighbour of bfloat16, 2^-8 off.
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-8 * np.abs(want).max())


def test_sums_are_stored_rounded() -> None:
    stored = stored_types(two_sums, [1, 64, 9, 7])
    # In fp32 is the last result, before and after it has its layout again.
    assert stored[:-2] == ["bfloat16"] * (len(stored) - 2)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_code_has_the_instruction_and_no_call(kernel: int, stride: int) -> None:
    w, bias = normal(64, 64, kernel, kernel), normal(1, 64, 1, 1)
    executable, families = compiled(w, bias, [1, 64, 14, 14], stride, kernel // 2)
    assembly = assembly_of(executable)
    assert "matrix-convolution" in families
    assert "tdpbf16ps" in assembly
    assert not any(f"call{end}\toptimizer_tiles_{name}" in assembly for end in ("", "q") for name in ("step", "store"))


@pytest.mark.parametrize(("target", "pairs"), [("x86-avx512-amx", True), ("x86-avx512-bf16", False)])
def test_lines_of_results_are_stored_at_once_beside_tiles(target: str, pairs: bool) -> None:
    w = relax.const(normal(64, 64, 1, 1))
    module = module_of(lambda x: op.nn.conv2d(op.nn.conv2d(x, w), w), [[1, 64, 9, 7]], ["float32"])
    machine = targets.get(target)
    blocked = BlockChannels(BLOCK, 0, "bfloat16").run(module).module
    code = build(lower(blocked, machine).module, machine)
    assembly = assembly_of(code)
    assert ("vcvtne2ps2bf16" in assembly) == pairs


@needs_tiles
@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 23), st.integers(1, 23)), outputs=st.integers(64, 130), batch=st.integers(1, 3))
def test_images_in_place_larger_than_the_weights(size: tuple[int, int], outputs: int, batch: int) -> None:
    x, w = rounded(normal(batch, 32, *size)).astype("float32"), normal(outputs, 32, 1, 1, seed=1)
    bias = normal(1, outputs, 1, 1, seed=2)
    executable, _ = compiled(w, bias, [*x.shape], 1, 0)
    got = outputs_of(executable, x)
    want = np.maximum(convolve(x, rounded(w), 1, 0) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(32, 1.0))


@pytest.mark.parametrize(("channels", "kernel", "passes"), [(64, 1, False), (512, 1, True), (64, 3, True)])
def test_weights_that_the_first_cache_cannot_keep_pass_it(channels: int, kernel: int, passes: bool) -> None:
    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, relax.const(normal(1024, channels, kernel, kernel)), padding=kernel // 2)

    script = in_blocks(layer, [1, channels, 14, 14]).module.script()
    assert ("optimizer_tiles_step_tdpbf16ps_passing_columns" in script) == passes


def pooled(x: relax.Var) -> relax.Expr:
    """Return a convolution of the largest of positive results of another one."""
    first, second = (relax.const(normal(64, 64, 1, 1, seed=seed)) for seed in range(2))
    y = op.nn.max_pool2d(op.nn.relu(op.nn.conv2d(x, first)), (3, 3), (2, 2), (1, 1, 1, 1))
    return op.nn.conv2d(y, second)


@needs_tiles
def test_largest_are_of_rounded_results() -> None:
    x = rounded(normal(2, 64, 9, 12)).astype("float32")
    got = outputs_of(build(in_blocks(pooled, x.shape).module, TARGET), x)
    first, second = (rounded(normal(64, 64, 1, 1, seed=seed)) for seed in range(2))
    image = rounded(np.maximum(convolve(x, first, 1, 0), 0).astype("float32"))
    padded = np.pad(image, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    want = convolve(windows.max((4, 5)), second, 1, 0)
    # Sums in another order may round to a neighbour of bfloat16, 2^-8 off.
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-8 * np.abs(want).max())


def test_what_is_pooled_is_stored_rounded() -> None:
    stored = stored_types(pooled, [1, 64, 9, 12])
    assert stored[:-2] == ["bfloat16"] * (len(stored) - 2)
