"""Convolutions over blocked channels of bfloat16, by dot products of pairs where the target has them."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, lower
from passes.block_channels import BlockChannels
from schedules.intrin.bf16_dot import bf16_dot
from schedules.winograd_transforms import transforms
from targets.base import Target
from tests.schedules.execution import TARGET, Dimension, assembly_of, module_of, normal, sum_tolerance
from tests.schedules.test_convolution import convolve

BLOCK = TARGET.layouts.channel_block
# Without such a dot product a compile makes no blocks of bfloat16: their kernels are right then, whatever they are.
HAS_DOT = bf16_dot(TARGET) is not None


def rounded(values: np.ndarray) -> np.ndarray:
    """Return the nearest values of bfloat16."""
    return values.astype(ml_dtypes.bfloat16).astype("float64")


def blocked(
    function: Callable[[relax.Var], relax.Expr], shape: list[Dimension], target: Target = TARGET, winograd: int = 0
) -> tuple[relax.VMExecutable, list[str]]:
    """Return a function of one image with blocks of bfloat16, and the families of its kernels."""
    block = target.layouts.channel_block
    module = BlockChannels(block, winograd, "bfloat16").run(module_of(function, [shape], ["float32"])).module
    lowered = lower(module, target)
    return build(lowered.module, target), [kernel.family for kernel in lowered.kernels]


def run(executable: relax.VMExecutable, image: np.ndarray) -> np.ndarray:
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(image)).numpy()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    channels=st.sampled_from([(8, 16), (16, 16), (18, 31), (24, 80), (33, 20), (64, 8)]),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 2),
    batch=st.sampled_from([1, 2]),
)
def test_sums_are_those_of_rounded_operands(
    size: tuple[int, int], channels: tuple[int, int], kernel: int, stride: int, padding: int, batch: int
) -> None:
    inputs, outputs = channels
    size = (max(size[0], kernel), max(size[1], kernel))
    # What a convolution reads is a blocked tensor that another one made: here a product with ones and zeros.
    x, w = rounded(normal(batch, inputs, *size)).astype("float32"), normal(outputs, inputs, kernel, kernel, seed=1)
    same, bias = np.eye(inputs, dtype="float32")[:, :, None, None], normal(1, outputs, 1, 1, seed=2)

    def layer(x: relax.Var) -> relax.Expr:
        image = op.nn.conv2d(x, relax.const(same))
        y = op.nn.conv2d(image, relax.const(w), strides=stride, padding=padding)
        return op.nn.relu(op.add(y, relax.const(bias)))

    executable, families = blocked(layer, [*x.shape])
    weights = rounded(w) if inputs % 2 == 0 else w
    want = np.maximum(convolve(x, weights, stride, padding) + bias, 0)
    np.testing.assert_allclose(run(executable, x), want, rtol=1e-6, atol=sum_tolerance(inputs * kernel**2, 1.0))
    assert not HAS_DOT or families.count("direct-convolution") == 2


@pytest.mark.parametrize(
    ("channels", "groups", "kernel"), [(4 * BLOCK, 2, 1), (2 * BLOCK, 2, 3), (BLOCK + 3, BLOCK + 3, 3)]
)
def test_groups_and_depthwise(channels: int, groups: int, kernel: int) -> None:
    x, w = normal(1, channels, 9, 30), normal(channels, channels // groups, kernel, kernel, seed=1)
    executable, families = blocked(
        lambda x: op.nn.conv2d(x, relax.const(w), padding=kernel // 2, groups=groups), [*x.shape]
    )
    weights = w if groups == channels else rounded(w)
    want = convolve(rounded(x), weights, 1, kernel // 2, groups=groups)
    np.testing.assert_allclose(run(executable, x), want, rtol=1e-6, atol=sum_tolerance(kernel**2 * channels, 1.0))
    assert "direct-convolution" in families


@pytest.mark.parametrize(
    ("channels", "size", "batch", "tile"),
    [(64, (12, 16), 1, 2), (48, (9, 13), 2, 3), (56, (23, 11), 1, 3), (33, (12, 17), 1, 2)],
)
def test_winograd_and_a_residual_read_the_same_rounded_image(
    channels: int, size: tuple[int, int], batch: int, tile: int
) -> None:
    x, w = normal(batch, channels, *size), normal(channels, channels, 3, 3, seed=1)
    same = np.eye(channels, dtype="float32")[:, :, None, None]

    def layer(x: relax.Var) -> relax.Expr:
        image = op.nn.conv2d(x, relax.const(same))
        return op.add(op.nn.conv2d(image, relax.const(w), padding=1), image)

    executable, families = blocked(layer, [*x.shape], winograd=tile)
    error = np.abs(run(executable, x) - convolve(rounded(x), w, 1, 1) - rounded(x)).max()
    # Both operands of a pair's products are rounded, by at most 2**-8; transforms amplify what that adds up to.
    roundings = 3 * 2.0**-8 * transforms(tile).amplification * np.sqrt(2 * 9 * channels)
    assert error < (roundings if channels % 2 == 0 else 10 * sum_tolerance(9 * channels, 1.0))
    assert not HAS_DOT or "winograd" in families


@pytest.mark.parametrize("outputs", [1, 3])
def test_few_outputs_of_a_plain_image(outputs: int) -> None:
    x, w = normal(1, 2 * BLOCK, 9, 14), normal(outputs, 2 * BLOCK, 3, 3, seed=1)
    executable, families = blocked(lambda x: op.nn.conv2d(x, relax.const(w), padding=1), [*x.shape])
    want = convolve(rounded(x), rounded(w), 1, 1)
    np.testing.assert_allclose(run(executable, x), want, rtol=1e-6, atol=sum_tolerance(18 * BLOCK, 1.0))
    assert "direct-convolution" in families


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_first_layer_of_few_channels(channels: int) -> None:
    x, w = normal(1, channels, 23, 37), normal(24, channels, 7, 7, seed=1)
    executable, families = blocked(lambda x: op.nn.conv2d(x, relax.const(w), strides=2, padding=3), [*x.shape])
    want = convolve(x, w, 2, 3) if channels == 1 else convolve(rounded(x), rounded(w), 2, 3)
    np.testing.assert_allclose(run(executable, x), want, rtol=1e-6, atol=sum_tolerance(49 * channels, 1.0))
    assert channels == 1 or "direct-convolution" in families


def test_a_mean_over_the_image_and_a_pooling_stay_blocked() -> None:
    x, same = normal(1, 2 * BLOCK, 9, 12), np.eye(2 * BLOCK, dtype="float32")[:, :, None, None]

    def layer(x: relax.Var) -> relax.Expr:
        image = op.nn.conv2d(x, relax.const(same))
        pooled = op.nn.max_pool2d(image, (3, 3), (2, 2), (1, 1, 1, 1))
        return op.add(op.mean(image, [2, 3], keepdims=True), op.nn.conv2d(pooled, relax.const(same)))

    got = run(blocked(layer, [*x.shape])[0], x)
    padded = np.pad(rounded(x), [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    want = rounded(x).mean((2, 3), keepdims=True) + windows.max((-1, -2))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(9 * 12, 1.0))


def test_symbolic_batch() -> None:
    x, w = normal(3, BLOCK, 9, 12), normal(BLOCK, BLOCK, 3, 3, seed=1)
    executable, _ = blocked(lambda x: op.nn.conv2d(x, relax.const(w), padding=1), ["n", BLOCK, 9, 12])
    want = convolve(rounded(x), rounded(w), 1, 1)
    np.testing.assert_allclose(run(executable, x), want, rtol=1e-6, atol=sum_tolerance(9 * BLOCK, 1.0))


@pytest.mark.parametrize(
    ("target", "instructions"), [("x86-avx512-bf16", ["vdpbf16ps", "vcvtneps2bf16"]), ("arm64-i8mm", ["bfdot"])]
)
def test_code_has_the_instructions_and_no_call(target: str, instructions: list[str]) -> None:
    w, filters = normal(64, 64, 1, 1), normal(64, 64, 3, 3)

    def layers(x: relax.Var) -> relax.Expr:
        y = op.nn.conv2d(op.nn.relu(op.nn.conv2d(x, relax.const(w))), relax.const(w))
        return op.nn.conv2d(y, relax.const(filters), padding=1)

    executable, families = blocked(layers, [1, 64, 14, 14], targets.get(target), winograd=4)
    assert {"winograd", "direct-convolution"} <= set(families)
    assembly = assembly_of(executable)
    assert all(instruction in assembly for instruction in instructions)
    assert "optimizer_dot_bf16@" not in assembly
    assert not any(f"{call}\toptimizer_" in assembly for call in ("call", "callq", "bl"))
