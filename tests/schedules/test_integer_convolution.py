"""Convolutions of bytes over blocked channels, exact in int32, by dot products of fours."""

from __future__ import annotations

from collections.abc import Callable

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
from schedules.intrin.byte_dot import activation_types, splits_operands
from targets.base import Target
from tests.schedules.execution import TARGET, Dimension, assembly_of, module_of
from tests.schedules.test_convolution import convolve

BLOCK = TARGET.layouts.channel_block
# What this machine can execute.
NARROW = [each for each in map(targets.get, ("x86-avx2", "x86-avx2-vnni")) if not targets.missing_features(each)]
HERE = [TARGET, *NARROW]
DATA = activation_types(TARGET)[0]


def drawn(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Return integers of the whole range of a type."""
    limits = np.iinfo(dtype)
    generator = np.random.default_rng([seed, *shape])
    return generator.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def blocked(
    function: Callable[[relax.Var], relax.Expr], shape: list[Dimension], target: Target = TARGET
) -> tuple[relax.VMExecutable, list[str]]:
    """Return a function of one image of bytes in blocks, and the families of its kernels."""
    data = activation_types(target)[0]
    item = BlockChannels(target.layouts.channel_block, integers=data, words=splits_operands(target))
    module = item.run(module_of(function, [shape], [data])).module
    lowered = lower(module, target)
    return build(lowered.module, target), [kernel.family for kernel in lowered.kernels]


def run(executable: relax.VMExecutable, image: np.ndarray) -> np.ndarray:
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(image)).numpy()


def conv(x: relax.Expr, weights: np.ndarray, **attributes: object) -> relax.Expr:
    operator = {3: op.nn.conv1d, 4: op.nn.conv2d, 5: op.nn.conv3d}[weights.ndim]
    return operator(x, relax.const(weights), out_dtype="int32", **attributes)


def quantized(x: relax.Expr, dtype: str, zero: int) -> relax.Expr:
    limits = np.iinfo(dtype)
    shifted = op.add(op.round(x), relax.const(np.float32(zero)))
    return op.astype(op.clip(shifted, float(limits.min), float(limits.max)), dtype)


def quantize(x: np.ndarray, dtype: str, zero: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.rint(x) + np.float32(zero), limits.min, limits.max).astype(dtype)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    channels=st.sampled_from([(1, 16), (3, 37), (16, 16), (18, 31), (24, 80), (33, 20), (64, 8), (7, 16)]),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 2),
    dilation=st.sampled_from([1, 2]),
    border=st.sampled_from([None, 0, 3]),
    batch=st.sampled_from([1, 2]),
    target=st.sampled_from(HERE),
)
def test_sums_are_exact(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    border: int | None,
    batch: int,
    target: Target,
) -> None:
    inputs, outputs = channels
    reach = dilation * (kernel - 1) + 1
    size = (max(size[0], reach), max(size[1], reach))
    x, w = drawn(DATA, batch, inputs, *size), drawn("int8", outputs, inputs, kernel, kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        widths = [0, 0, 0, 0, *[padding] * 4]
        data = x if border is None else op.nn.pad(x, widths, "constant", border)
        return conv(data, w, strides=stride, padding=padding if border is None else 0, dilation=dilation)

    executable, families = blocked(layer, [*x.shape], target)
    padded = np.pad(x, [(0, 0), (0, 0), *[(padding, padding)] * 2], constant_values=border or 0)
    want = convolve(padded, w, stride, 0, dilation)
    np.testing.assert_array_equal(run(executable, x), want)
    # A convolution with one position may be a product of matrices.
    assert kernel == 1 or "direct-convolution" in families or (want.shape[2:] == (1, 1) and "matmul" in families)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("outputs", [1, 3])
def test_few_outputs_of_a_plain_image(outputs: int, target: Target) -> None:
    x, w = drawn(DATA, 1, 20, 7, 9), drawn("int8", outputs, 20, 3, 3, seed=1)
    executable, families = blocked(lambda x: conv(x, w, padding=1), [*x.shape], target)
    np.testing.assert_array_equal(run(executable, x), convolve(x, w, padding=1))
    assert "direct-convolution" in families


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_groups(target: Target) -> None:
    x, w = drawn(DATA, 1, 4 * BLOCK, 9, 30), drawn("int8", 4 * BLOCK, 2 * BLOCK, 3, 3, seed=1)
    executable, families = blocked(lambda x: conv(x, w, padding=1, groups=2), [*x.shape], target)
    np.testing.assert_array_equal(run(executable, x), convolve(x, w, padding=1, groups=2))
    assert "direct-convolution" in families


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(2, 13), st.integers(2, 31)),
    kernel=st.tuples(st.sampled_from([2, 3, 5]), st.sampled_from([2, 3, 4, 5, 7])),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 1, 2]),
    border=st.sampled_from([None, 0, 3]),
    batch=st.sampled_from([1, 2]),
    target=st.sampled_from(HERE),
)
def test_depthwise(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    border: int | None,
    batch: int,
    target: Target,
) -> None:
    channels = BLOCK + 3
    widths = [dilation * (taps - 1) // 2 for taps in kernel] if border is not None else [0, 0]
    shape = [max(s, dilation * (taps - 1) + 2 + stride) for s, taps in zip(size, kernel, strict=True)]
    x, w = drawn(DATA, batch, channels, *shape), drawn("int8", channels, 1, *kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        around = [0, 0, 0, 0, *[width for width in widths for _ in range(2)]]
        data = op.nn.pad(x, around, "constant", border or 0)
        return conv(data, w, strides=stride, dilation=dilation, groups=channels)

    executable, families = blocked(layer, [*x.shape], target)
    padded = np.pad(x, [(0, 0), (0, 0), *[(width, width) for width in widths]], constant_values=border or 0)
    np.testing.assert_array_equal(run(executable, x), convolve(padded, w, stride, 0, dilation, channels))
    direct = splits_operands(target) or dilation > 1
    assert ("direct-convolution" if direct else "depthwise-bytes") in families


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 0), ("uint8", 113), ("int8", -128), ("int8", 5)])
def test_what_follows_is_computed_in_the_kernel(dtype: str, zero: int) -> None:
    channels = BLOCK + 5
    x, w = drawn(DATA, 1, channels, 6, 11), drawn("int8", channels, channels, 1, 1, seed=1)
    bias, scales = drawn("int16", 1, channels, 1, 1).astype("int32"), np.linspace(0.001, 0.002, channels)
    factors = scales.astype("float32").reshape(1, -1, 1, 1)

    def layer(x: relax.Var) -> relax.Expr:
        image = quantized(op.multiply(op.astype(conv(x, w), "float32"), relax.const(1e-3)), DATA, 7)
        sums = op.add(conv(image, w), relax.const(bias))
        scaled = op.multiply(op.astype(sums, "float32"), relax.const(factors))
        scale, same = relax.const(np.float32(0.25)), relax.const(np.array(3, DATA))
        residual = op.dequantize(image, scale, same, axis=1, out_dtype="float32")
        return quantized(op.nn.relu(op.add(scaled, residual)), dtype, zero)

    executable, families = blocked(layer, [*x.shape])
    image = quantize(convolve(x, w).astype("float32") * np.float32(1e-3), DATA, 7)
    scaled = (convolve(image, w) + bias).astype("float32") * factors
    residual = (image.astype("float32") - 3) * np.float32(0.25)
    want, got = quantize(np.maximum(scaled + residual, 0), dtype, zero), run(executable, x)
    # A product and a sum are rounded once or twice: a number on the border of two codes may become either.
    assert np.abs(got.astype(int) - want).max() <= 1
    assert np.mean(got != want) < 0.01
    assert families.count("direct-convolution") == 2
    assert len(families) == 4


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 31)),
    kernel=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["uint8", "int8"]),
    zero=st.integers(-128, 255),
    target=st.sampled_from(HERE),
)
def test_columns_are_rounded_together(
    size: tuple[int, int], kernel: int, dtype: str, zero: int, target: Target
) -> None:
    x, w = drawn(DATA, 1, 16, *size), drawn("int8", 33, 16, kernel, kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        sums = op.astype(conv(x, w, padding=kernel // 2), "float32")
        return quantized(op.multiply(sums, relax.const(np.float32(2**-9))), dtype, zero)

    executable, _ = blocked(layer, [*x.shape], target)
    sums = convolve(x, w, 1, kernel // 2).astype("float32")
    np.testing.assert_array_equal(run(executable, x), quantize(sums * np.float32(2**-9), dtype, zero))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 31)),
    kernel=st.sampled_from([1, 3]),
    zero=st.integers(-128, 255),
    bounds=st.sampled_from([(0, 255), (3, 250)]),
    target=st.sampled_from(HERE),
)
def test_codes_between_convolutions_are_exact(
    size: tuple[int, int], kernel: int, zero: int, bounds: tuple[int, int], target: Target
) -> None:
    shift, data = 128 if activation_types(target)[0] == "int8" else 0, activation_types(target)[0]
    low, high = (float(bound - shift) for bound in bounds)
    x, w = drawn(data, 1, 16, *size), drawn("int8", 33, 16, kernel, kernel, seed=1)
    second = drawn("int8", 16, 33, 1, 1, seed=2)

    def layer(x: relax.Var) -> relax.Expr:
        sums = op.multiply(op.astype(conv(x, w, padding=kernel // 2), "float32"), relax.const(np.float32(2**-9)))
        codes = op.astype(op.clip(op.add(op.round(sums), relax.const(np.float32(zero))), low, high), data)
        return conv(codes, second)

    executable, _ = blocked(layer, [*x.shape], target)
    sums = convolve(x, w, 1, kernel // 2).astype("float32") * np.float32(2**-9)
    codes = np.clip(np.rint(sums) + np.float32(zero), low, high).astype(data)
    np.testing.assert_array_equal(run(executable, x), convolve(codes, second))


def test_a_network_converts_its_image_only_at_the_ends() -> None:
    x, w = drawn(DATA, 1, 3, 17, 15), drawn("int8", BLOCK, 3, 7, 7, seed=1)
    other, depthwise = drawn("int8", 8, BLOCK, 1, 1), drawn("int8", BLOCK, 1, 3, 3)

    def layer(x: relax.Var) -> relax.Expr:
        first = quantized(
            op.multiply(op.astype(conv(x, w, strides=2, padding=3), "float32"), relax.const(1e-3)), DATA, 0
        )
        pooled = op.nn.max_pool2d(first, (3, 3), (2, 2), (1, 1, 1, 1))
        sums = conv(pooled, depthwise, padding=1, groups=BLOCK)
        second = quantized(op.multiply(op.astype(sums, "float32"), relax.const(1e-2)), DATA, 0)
        return conv(second, other)

    executable, families = blocked(layer, [*x.shape])
    first = quantize(convolve(x, w, 2, 3).astype("float32") * np.float32(1e-3), DATA, 0)
    padded = np.pad(first, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=np.iinfo(DATA).min)
    pooled = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((-1, -2))
    sums = convolve(pooled, depthwise, 1, 1, groups=BLOCK).astype("float32")
    want = convolve(quantize(sums * np.float32(1e-2), DATA, 0), other)
    np.testing.assert_array_equal(run(executable, x), want)
    assert families.count("direct-convolution") + families.count("depthwise-bytes") == 4
    assert len(families) == 6


def test_symbolic_batch_and_other_numbers_of_spatial_dimensions() -> None:
    x, w = drawn(DATA, 3, BLOCK, 9, 12), drawn("int8", BLOCK, BLOCK, 3, 3, seed=1)
    executable, _ = blocked(lambda x: conv(x, w, padding=1), ["n", BLOCK, 9, 12])
    np.testing.assert_array_equal(run(executable, x), convolve(x, w, 1, 1))
    for size in ((19,), (5, 6, 7)):
        x, w = drawn(DATA, 2, 5, *size), drawn("int8", 17, 5, *(3,) * len(size), seed=1)
        executable, families = blocked(lambda x, w=w: conv(x, w, padding=1), [*x.shape])
        np.testing.assert_array_equal(run(executable, x), convolve(x, w, 1, 1))
        assert "direct-convolution" in families


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("x86-avx512", ["vpdpbusd", "vpackssdw", "vpackuswb"]),
        ("x86-avx2", ["vpmovsxbw", "vpmaddwd", "vpackssdw"]),
        ("x86-avx2-vnni", ["vpdpbusd", "vpackssdw", "vpackuswb"]),
        ("arm64", ["sdot", "fcvtns", "sqxtn2"]),
    ],
)
def test_code_has_the_instructions_and_no_call(target: str, instructions: list[str]) -> None:
    w, filters = drawn("int8", 64, 64, 1, 1), drawn("int8", 64, 64, 3, 3)
    chosen = targets.get(target)
    data = activation_types(chosen)[0]

    def layers(x: relax.Var) -> relax.Expr:
        return conv(quantized(op.multiply(op.astype(conv(x, w), "float32"), relax.const(1e-3)), data, 3), filters)

    executable, families = blocked(layers, [1, 64, 14, 14], chosen)
    assert families.count("direct-convolution") + families.count("winograd") == 2
    assembly = assembly_of(executable)
    assert all(instruction in assembly for instruction in instructions)
    assert not any(f"{call}\toptimizer_" in assembly for call in ("call", "callq", "bl"))
