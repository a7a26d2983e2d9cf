from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, fuse
from passes.block_channels import BlockChannels
from schedules import KernelReport, schedule_module
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import TARGET, compiled, module_of, normal, sum_tolerance
from tests.schedules.test_bf16_convolution import rounded
from tests.schedules.test_convolution import convolve
from tests.schedules.test_matrix_convolution import in_blocks, outputs_of

# Whatever this machine's cores begin in a cycle.
CHAINING = replace(TARGET, multiply_adds=2)
BLOCK = CHAINING.layouts.channel_block
TILES = targets.get("x86-avx512-amx")
needs_tiles = pytest.mark.skipif(bool(missing_features(TILES)), reason="this machine has no tile registers")
_Built = Callable[[relax.Var], relax.Expr]


def _layer(
    channels: tuple[int, int],
    kernels: tuple[int, int],
    strides: tuple[int, int],
    padding: int,
    *,
    twice: bool = False,
    operand: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> tuple[_Built, Callable[[np.ndarray], np.ndarray]]:
    """Return a convolution and a depthwise one in Relax, and the same in NumPy.

    The first one's operands are what `operand` makes of them in NumPy.
    """
    inner, outer = channels
    w, d = normal(outer, inner, kernels[0], kernels[0], seed=1), normal(outer, 1, kernels[1], kernels[1], seed=2)
    bias = normal(1, outer, 1, 1, seed=3)

    def built(x: relax.Var) -> relax.Expr:
        wide = op.nn.conv2d(x, relax.const(w), strides=strides[0], padding=kernels[0] // 2)
        wide = op.clip(op.add(wide, relax.const(bias)), 0, 6)
        deep = op.nn.conv2d(wide, relax.const(d), strides=strides[1], padding=padding, groups=outer)
        deep = op.nn.relu(op.add(deep, relax.const(bias)))
        return op.add(deep, wide) if twice else deep

    def expected(x: np.ndarray) -> np.ndarray:
        wide = np.clip(convolve(operand(x), operand(w), strides[0], kernels[0] // 2) + bias, 0, 6)
        deep = np.maximum(convolve(wide, d, strides[1], padding, groups=outer) + bias, 0)
        return deep + wide if twice else deep

    return built, expected


def _scheduled(
    built: _Built, shape: tuple[int, ...], target: Target = CHAINING
) -> tuple[tvm.IRModule, tuple[KernelReport, ...]]:
    """Return the scheduled module of a layer of one image in blocked layout, and its kernels' reports."""
    blocked = BlockChannels(target.layouts.channel_block, winograd=0).run(module_of(built, [shape], ["float32"]))
    return schedule_module(fuse(blocked.module, target).module, target)


def _families(reports: tuple[KernelReport, ...]) -> list[str]:
    return [report.family for report in reports]


@dataclass(frozen=True)
class Layer:
    """Two convolutions, what each has given for both, and the images that they are given."""

    size: tuple[int, int]
    channels: tuple[int, int]
    kernels: tuple[int, int]
    strides: tuple[int, int]
    padding: int
    batch: int

    @property
    def images(self) -> np.ndarray:
        """Return images, large enough that the second convolution has a result."""
        least = self.strides[0] * (self.kernels[1] - 2 * self.padding - 1) + 1
        return normal(self.batch, self.channels[0], *(max(extent, least) for extent in self.size))

    def tolerance(self, want: np.ndarray) -> float:
        """Return the bound on the error of both one after the other."""
        terms = self.channels[0] * self.kernels[0] ** 2 + self.kernels[1] ** 2
        return sum_tolerance(terms, float(np.abs(want).max(initial=1)))


def layers(channels: list[tuple[int, int]]) -> st.SearchStrategy[Layer]:
    """Return a strategy for layers with one of these numbers of channels, before and between the convolutions."""
    return st.builds(
        Layer,
        size=st.tuples(st.sampled_from([1, 2, 7, 13, 30, 41]), st.sampled_from([1, 3, 7, 14, 29])),
        channels=st.sampled_from(channels),
        kernels=st.tuples(st.sampled_from([1, 3]), st.sampled_from([3, 5])),
        strides=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, 3])),
        padding=st.integers(0, 2),
        batch=st.sampled_from([1, 3]),
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(layers([(3, 32), (16, 16), (17, 40), (24, 144), (40, 80)]))
def test_both_convolutions_are_right(layer: Layer) -> None:
    x = layer.images
    built, expected = _layer(layer.channels, layer.kernels, layer.strides, layer.padding)
    module, _ = _scheduled(built, x.shape)
    want = expected(x)
    tolerance = layer.tolerance(want)
    np.testing.assert_allclose(compiled(module, CHAINING)(x), want, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 4, 5, 23])
@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1)])
def test_tasks_of_some_rows_are_right(rows: int, strides: tuple[int, int]) -> None:
    x = normal(8, BLOCK, 23, 9)
    built, expected = _layer((BLOCK, 3 * BLOCK), (1, 3), strides, 1)

    def decide(known: KernelReport) -> dict[str, int] | None:
        return {"rows": rows, "blocks": 2} if known.family == "channel-chain" else None

    blocked = BlockChannels(BLOCK, winograd=0).run(module_of(built, [x.shape], ["float32"]))
    module, reports = schedule_module(fuse(blocked.module, CHAINING).module, CHAINING, decide)
    assert "channel-chain" in _families(reports)
    want = expected(x)
    tolerance = sum_tolerance(BLOCK + 9, float(np.abs(want).max()))
    np.testing.assert_allclose(compiled(module, CHAINING)(x), want, rtol=1e-6, atol=tolerance)


def test_a_result_that_another_one_reads_is_stored() -> None:
    x = normal(1, BLOCK, 11, 8)
    built, expected = _layer((BLOCK, 2 * BLOCK), (1, 3), (1, 1), 1, twice=True)
    module, reports = _scheduled(built, x.shape)
    assert "channel-chain" not in _families(reports)
    want = expected(x)
    tolerance = sum_tolerance(BLOCK + 9, float(np.abs(want).max()))
    np.testing.assert_allclose(compiled(module, CHAINING)(x), want, rtol=1e-6, atol=tolerance)


def test_convolutions_whose_tasks_would_repeat_each_other_stay_apart() -> None:
    built, _ = _layer((BLOCK, 2 * BLOCK), (1, 5), (1, 1), 2)
    assert "channel-chain" not in _families(_scheduled(built, (1, BLOCK, 56, 56))[1])
    assert "channel-chain" in _families(_scheduled(built, (8, BLOCK, 28, 28))[1])


@pytest.mark.parametrize(("name", "chains"), [("x86-avx512", False), ("x86-avx512-amx", True), ("arm64", False)])
def test_cores_that_begin_two_multiply_adds_chain(name: str, chains: bool) -> None:
    target = targets.get(name)
    built, _ = _layer((24, 144), (1, 3), (1, 2), 1)
    reports = _scheduled(built, (8, 24, 28, 28), target)[1]
    assert ("channel-chain" in _families(reports)) == chains


@needs_tiles
@settings(max_examples=12, deadline=None, derandomize=True)
@given(layers([(3, 32), (16, 32), (17, 40), (24, 144), (40, 80), (64, 96)]))
def test_sums_in_tile_registers_are_not_rounded_between(layer: Layer) -> None:
    x = layer.images
    built, expected = _layer(layer.channels, layer.kernels, layer.strides, layer.padding, operand=rounded)
    lowered = in_blocks(built, x.shape)
    got, want = outputs_of(build(lowered.module, TILES), x), expected(x)
    # What stays apart is rounded between the two.
    between = 0 if "channel-chain" in _families(lowered.kernels) else 2.0**-8 * 6 * layer.kernels[1] ** 2
    tolerance = layer.tolerance(want)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=tolerance + between)


@needs_tiles
@pytest.mark.parametrize("channels", [(16, 96), (40, 80), (3, 32)])
@pytest.mark.parametrize("rows", [1, 4, 5, 23])
@pytest.mark.parametrize("stride", [1, 2])
def test_tasks_of_some_rows_in_tile_registers_are_right(channels: tuple[int, int], rows: int, stride: int) -> None:
    x = normal(8, channels[0], 23, 9)
    built, expected = _layer(channels, (1 if channels[0] > 3 else 3, 3), (1, stride), 1, operand=rounded)

    def decide(known: KernelReport) -> dict[str, int] | None:
        return {"rows": rows, "blocks": 2} if known.family == "channel-chain" else None

    lowered = in_blocks(built, x.shape, decide)
    assert "channel-chain" in _families(lowered.kernels)
    want = expected(x)
    tolerance = sum_tolerance(9 * channels[0] + 9, float(np.abs(want).max()))
    np.testing.assert_allclose(outputs_of(build(lowered.module, TILES), x), want, rtol=1e-6, atol=tolerance)


def test_a_first_convolution_in_tile_registers_chains_everywhere() -> None:
    built, _ = _layer((24, 144), (1, 3), (1, 2), 1)
    lowered = in_blocks(built, (8, 24, 28, 28))
    assert "channel-chain" in _families(lowered.kernels)
    chain = next(str(f.script()) for name, f in lowered.module.functions_items() if "conv2d" in name.name_hint)
    assert "optimizer_tiles_step" in chain
