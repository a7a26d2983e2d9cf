"""Sums that take the memory of one of their terms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
import tvm.ir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import LoweredModule, build, lower
from optimizer.overwriting import write_over_terms
from passes.block_channels import BlockChannels
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import TARGET as HOST
from tests.schedules.execution import module_of, normal, sum_tolerance
from tests.schedules.test_bf16_convolution import rounded
from tests.schedules.test_convolution import convolve
from tests.schedules.test_matrix_convolution import in_blocks, outputs_of

TARGET = targets.get("x86-avx512-amx")
needs_tiles = pytest.mark.skipif(bool(missing_features(TARGET)), reason="this machine has no tile registers")
CHANNELS = 64
FIRST, SECOND, THIRD = (normal(CHANNELS, CHANNELS, 1, 1, seed=seed) / 8 for seed in range(3))


def residual(x: relax.Var) -> relax.Expr:
    """Return a block whose input is added last, and a layer that reads the sum."""
    y = op.nn.relu(op.nn.conv2d(x, relax.const(FIRST)))
    z = op.nn.relu(op.add(op.nn.conv2d(y, relax.const(SECOND)), y))
    return op.nn.conv2d(z, relax.const(THIRD))


def two_residuals(x: relax.Var) -> relax.Expr:
    """Return two blocks, the second of which adds what the first one adds."""
    y = op.nn.relu(op.nn.conv2d(x, relax.const(FIRST)))
    a = op.nn.relu(op.nn.conv2d(y, relax.const(SECOND)))
    z = op.nn.relu(op.add(op.nn.conv2d(a, relax.const(SECOND)), y))
    b = op.nn.relu(op.nn.conv2d(z, relax.const(THIRD)))
    c = op.nn.relu(op.add(op.nn.conv2d(b, relax.const(FIRST)), z))
    return op.nn.conv2d(op.nn.relu(op.add(op.nn.conv2d(c, relax.const(THIRD)), y)), relax.const(THIRD))


def exact(x: np.ndarray) -> np.ndarray:
    """Return numbers as layers in fp32 store them."""
    return x


def expected(x: np.ndarray, stored: Callable[[np.ndarray], np.ndarray] = rounded) -> np.ndarray:
    """Return what `two_residuals` makes of an input, with weights and results as they are `stored`."""

    def layer(data: np.ndarray, weights: np.ndarray, added: np.ndarray | None = None) -> np.ndarray:
        total = convolve(data, stored(weights), 1, 0) + (0 if added is None else added)
        return stored(np.maximum(total, 0)).astype("float32")

    y = layer(x, FIRST)
    z = layer(layer(y, SECOND), SECOND, y)
    c = layer(layer(z, THIRD), FIRST, z)
    return convolve(layer(c, THIRD, y), stored(THIRD), 1, 0)


def calls_in_place(lowered: LoweredModule) -> list[bool]:
    """Return of each kernel's call whether it writes into a tensor that one before it wrote."""
    module = lowered.module
    for step in (relax.transform.ToNonDataflow, relax.transform.RemovePurityChecking, relax.transform.CallTIRRewrite):
        module = step()(module)
    bindings = [each for block in write_over_terms(module)["main"].body.blocks for each in block.bindings]
    values = [each.value for each in bindings]
    written = [
        each.args[-1] for each in values if isinstance(each, tvm.ir.Call) and isinstance(each.op, tvm.ir.GlobalVar)
    ]
    return [any(each.same_as(other) for other in written[:number]) for number, each in enumerate(written)]


@pytest.mark.parametrize(
    ("layers", "in_place"),
    [
        # The convolution reads what is added.
        (residual, 0),
        # What the last block adds the first one does not overwrite; it is read by none of the last one's convolutions.
        (two_residuals, 2),
    ],
)
def test_a_term_is_overwritten_by_who_reads_it_last(layers: Callable[[relax.Var], relax.Expr], in_place: int) -> None:
    lowered = in_blocks(layers, [2, CHANNELS, 8, 8])
    assert sum(calls_in_place(lowered)) == in_place


@needs_tiles
@settings(max_examples=12, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 23), st.integers(1, 23)), batch=st.sampled_from([1, 2, 8]))
@example(size=(28, 28), batch=1)
# Of 49 and of 51 pixels the last tiles begin earlier, and compute some again.
@example(size=(7, 7), batch=8)
@example(size=(3, 17), batch=8)
def test_sums_in_place_are_those_of_terms(size: tuple[int, int], batch: int) -> None:
    x = rounded(normal(batch, CHANNELS, *size)).astype("float32")
    got = outputs_of(build(in_blocks(two_residuals, [*x.shape]).module, TARGET), x)
    want = expected(x)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-6 * np.abs(want).max() + sum_tolerance(CHANNELS, 1.0))


def in_blocks_of_floats(target: Target, shape: list[int]) -> LoweredModule:
    """Return the kernels of `two_residuals` in fp32."""
    blocked = BlockChannels(target.layouts.channel_block, 0).run(module_of(two_residuals, [shape], ["float32"]))
    return lower(blocked.module, target)


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512", "x86-avx512-amx", "arm64"])
def test_register_tiles_overwrite_terms(name: str) -> None:
    assert sum(calls_in_place(in_blocks_of_floats(targets.get(name), [2, CHANNELS, 8, 8]))) == 2


@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 23), st.integers(1, 23)), batch=st.sampled_from([1, 2, 8]))
@example(size=(7, 7), batch=8)
def test_sums_of_register_tiles_in_place_are_those_of_terms(size: tuple[int, int], batch: int) -> None:
    x = normal(batch, CHANNELS, *size)
    got = outputs_of(build(in_blocks_of_floats(HOST, [*x.shape]).module, HOST), x)
    np.testing.assert_allclose(got, expected(x, exact), rtol=1e-6, atol=sum_tolerance(CHANNELS, 8.0))
