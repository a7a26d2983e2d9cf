"""Convolutions of bytes over blocked channels in tile registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, lower
from passes.block_channels import BlockChannels
from targets.host import missing_features
from tests.schedules.execution import Dimension, assembly_of, module_of
from tests.schedules.test_convolution import convolve
from tests.schedules.test_integer_convolution import conv, drawn, quantize, quantized, run

TARGET = targets.get("x86-avx512-amx")
BLOCK = TARGET.layouts.byte_block
needs_tiles = pytest.mark.skipif(bool(missing_features(TARGET)), reason="this machine has no tile registers")


def compiled(
    function: Callable[[relax.Var], relax.Expr], shape: list[Dimension]
) -> tuple[relax.VMExecutable, list[str]]:
    """Return a function of one image of bytes in blocks of 64 channels, and the families of its kernels."""
    item = BlockChannels(BLOCK, integers="uint8", byte_block=BLOCK)
    lowered = lower(item.run(module_of(function, [shape], ["uint8"])).module, TARGET)
    return build(lowered.module, TARGET), [kernel.family for kernel in lowered.kernels]


@needs_tiles
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 37)),
    channels=st.sampled_from([(64, 64), (128, 96), (66, 40), (96, 130), (256, 64), (3, 64), (4, 70), (64, 3)]),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 2),
    border=st.sampled_from([None, 0, 3]),
    batch=st.sampled_from([1, 2]),
)
def test_sums_are_exact(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    border: int | None,
    batch: int,
) -> None:
    inputs, outputs = channels
    size = (max(size[0], kernel), max(size[1], kernel))
    x, w = drawn("uint8", batch, inputs, *size), drawn("int8", outputs, inputs, kernel, kernel, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        data = x if border is None else op.nn.pad(x, [0, 0, 0, 0, *[padding] * 4], "constant", border)
        return conv(data, w, strides=stride, padding=padding if border is None else 0)

    executable, families = compiled(layer, [*x.shape])
    padded = np.pad(x, [(0, 0), (0, 0), *[(padding, padding)] * 2], constant_values=border or 0)
    want = convolve(padded, w, stride, 0)
    np.testing.assert_array_equal(run(executable, x), want)
    # Of fewer channels than a step takes a single tap, or a single position, may be a product of matrices.
    is_product = inputs < 32 and (kernel == 1 or want.shape[2:] == (1, 1))
    assert "matrix-convolution" in families or (is_product and "matmul" in families)


@needs_tiles
@pytest.mark.parametrize("rows", [1, 7, 13])
def test_what_follows_is_rounded_to_bytes(rows: int) -> None:
    x, w = drawn("uint8", 1, 64, rows, 31), drawn("int8", 128, 64, 1, 1, seed=1)
    second = drawn("int8", 64, 128, 3, 3, seed=2)
    scales = np.linspace(1e-4, 1e-3, 128, dtype=np.float32).reshape(1, 128, 1, 1)

    def layers(x: relax.Var) -> relax.Expr:
        y = quantized(op.multiply(op.astype(conv(x, w), "float32"), relax.const(scales)), "uint8", 0)
        return quantized(op.multiply(op.astype(conv(y, second, padding=1), "float32"), relax.const(1e-4)), "uint8", 9)

    executable, families = compiled(layers, [*x.shape])
    inner = quantize(convolve(x, w, 1, 0).astype(np.float32) * scales, "uint8", 0)
    want = quantize(convolve(inner, second, 1, 1).astype(np.float32) * np.float32(1e-4), "uint8", 9)
    np.testing.assert_array_equal(run(executable, x), want)
    assert families.count("matrix-convolution") == 2


@needs_tiles
def test_layers_that_differ_in_scales_are_one_kernel() -> None:
    """Numbers that a kernel takes as tensors without axes lie nowhere in its result."""
    x, w = drawn("uint8", 1, 64, 5, 7), drawn("int8", 64, 64, 1, 1, seed=1)
    scales = np.float32(1e-4), np.float32(3e-4)

    def layers(x: relax.Var) -> relax.Expr:
        for scale in scales:
            x = quantized(op.multiply(op.astype(conv(x, w), "float32"), relax.const(scale)), "uint8", 0)
        return x

    executable, families = compiled(layers, [*x.shape])
    want = x
    for scale in scales:
        want = quantize(convolve(want, w, 1, 0).astype(np.float32) * scale, "uint8", 0)
    np.testing.assert_array_equal(run(executable, x), want)
    assert families.count("matrix-convolution") == 1


@needs_tiles
@pytest.mark.parametrize(("zero", "other"), [(0, 0), (118, 118), (7, 130)])
def test_numbers_that_are_rounded_twice_become_bytes_once(zero: int, other: int) -> None:
    x, w = drawn("uint8", 1, 64, 9, 13), drawn("int8", 64, 64, 1, 1, seed=1)
    scales = np.linspace(1e-4, 1e-2, 64, dtype=np.float32).reshape(1, 64, 1, 1)

    def layers(x: relax.Var) -> relax.Expr:
        y = quantized(op.multiply(op.astype(conv(x, w), "float32"), relax.const(scales)), "uint8", zero)
        z = op.dequantize(y, relax.const(np.float32(0.5)), relax.const(np.uint8(other)))
        return quantized(op.add(z, op.astype(x, "float32")), "uint8", 3)

    executable, families = compiled(layers, [*x.shape])
    inner = quantize(convolve(x, w, 1, 0).astype(np.float32) * scales, "uint8", zero).astype(np.float32)
    want = quantize((inner - other) * np.float32(0.5) + x.astype(np.float32), "uint8", 3)
    np.testing.assert_array_equal(run(executable, x), want)
    assert families.count("matrix-convolution") == 1
    assembly = assembly_of(executable)
    assert "vpmovdb" not in assembly


@pytest.mark.parametrize(("inputs", "kernel", "stride"), [(64, 1, 1), (64, 3, 1), (128, 3, 2), (3, 7, 2)])
def test_code_has_the_instruction_and_no_call(inputs: int, kernel: int, stride: int) -> None:
    w = drawn("int8", 64, inputs, kernel, kernel)
    executable, families = compiled(lambda x: conv(x, w, padding=kernel // 2, strides=stride), [1, inputs, 14, 14])
    assembly = assembly_of(executable)
    assert "matrix-convolution" in families
    assert "tdpbusd" in assembly
    assert not any(f"call{end}\toptimizer_tiles_{name}" in assembly for end in ("", "q") for name in ("step", "store"))


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "block"),
    [
        ((64, 64), 1, 3, BLOCK),
        ((64, 64), 64, 3, 16),
        ((64, 24), 1, 3, 16),
        ((64, 40), 1, 3, BLOCK),
        # Beside whole blocks, one channel more costs an empty one; tile registers are worth it from several taps on.
        ((64, 65), 1, 3, BLOCK),
        ((64, 65), 1, 1, 16),
        ((65, 65), 1, 3, BLOCK),
        ((129, 129), 1, 1, BLOCK),
    ],
)
def test_blocks_are_of_64_channels_where_all_convolutions_are_faster_so(
    channels: tuple[int, int], groups: int, kernel: int, block: int
) -> None:
    inputs, outputs = channels
    w = drawn("int8", outputs, inputs // groups, kernel, kernel)

    def layer(x: relax.Var) -> relax.Expr:
        return conv(x, w, padding=kernel // 2, groups=groups)

    item = BlockChannels(16, integers="uint8", byte_block=BLOCK)
    text = item.run(module_of(layer, [[1, inputs, 9, 9]], ["uint8"])).module.script()
    assert f"1, {-(-outputs // block)}, 9, 9, {block}" in text.replace("T.int64(", "").replace(")", "")
