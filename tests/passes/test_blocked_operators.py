from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te

from passes.blocked_operators import (
    blocks,
    channels_last,
    from_blocks,
    pack_dense,
    pack_depthwise,
    pack_shallow,
    pack_tensor,
    to_blocks,
)

BLOCK = 4


def _numbers(*shape: int) -> np.ndarray:
    return np.arange(1, 1 + np.prod(shape), dtype="float32").reshape(shape)


def test_blocks_hold_all_channels() -> None:
    assert [blocks(channels, 4) for channels in (1, 4, 5, 8)] == [1, 1, 2, 2]


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 4), (5, 3), (9, 7)])
def test_dense_weights_have_outputs_and_inputs_in_blocks(outputs: int, inputs: int) -> None:
    weights = _numbers(outputs, inputs, 3, 2)
    packed = pack_dense(weights, BLOCK)
    assert packed.shape == (blocks(outputs, BLOCK), blocks(inputs, BLOCK), 3, 2, BLOCK, BLOCK)
    assert packed.flags.c_contiguous
    assert packed.sum() == weights.sum()
    for o, i, y, x in np.ndindex(*weights.shape):
        assert packed[o // BLOCK, i // BLOCK, y, x, i % BLOCK, o % BLOCK] == weights[o, i, y, x]


@pytest.mark.parametrize("outputs", [4, 5])
def test_weights_of_few_channels_have_only_outputs_in_blocks(outputs: int) -> None:
    weights = _numbers(outputs, 3, 2)
    packed = pack_shallow(weights, BLOCK)
    assert packed.shape == (blocks(outputs, BLOCK), 3, 2, BLOCK)
    assert packed.sum() == weights.sum()
    for o, i, x in np.ndindex(*weights.shape):
        assert packed[o // BLOCK, i, x, o % BLOCK] == weights[o, i, x]
    single = _numbers(outputs, 1, 2)
    np.testing.assert_array_equal(pack_depthwise(single, BLOCK), pack_shallow(single, BLOCK)[:, 0])


@pytest.mark.parametrize("channels", [4, 5])
def test_layouts_lead_back_to_the_same_tensor(channels: int) -> None:
    x = _numbers(2, channels, 3, 5)
    packed = pack_tensor(x, BLOCK)
    plain = te.placeholder(x.shape, "float32", "plain")
    blocked = te.placeholder(packed.shape, "float32", "blocked")
    outputs = [to_blocks(plain, BLOCK), from_blocks(blocked, channels), channels_last(blocked, channels)]
    results = [np.zeros([int(extent) for extent in output.shape], "float32") for output in outputs]
    tensors = [tvm.runtime.tensor(array) for array in (x, packed, *results)]
    tvm.compile(te.create_prim_func([plain, blocked, *outputs]), "llvm")(*tensors)
    repeated = pack_tensor(np.pad(x, [(0, 0), (0, -channels % BLOCK), (0, 0), (0, 0)], mode="edge"), BLOCK)
    for tensor, expected in zip(tensors[2:], (repeated, x, np.moveaxis(x, 1, -1)), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected)
