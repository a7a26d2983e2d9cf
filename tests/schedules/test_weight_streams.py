"""A single row may read several blocks of columns by turns: the same sums, with requests for all that is read."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from optimizer.lowering import lower
from passes.quantization.methods import quantize
from passes.quantization.scheme import Scheme
from passes.quantized_weights import WeightUse
from schedules.weight_streams import MANY_TASKS, blocks_at_once
from tests.schedules.test_quantized_matmul import NATIVE, product_module, run

NAME = "x86-avx512" if "x86-avx512" in NATIVE else "host"


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(4, 32, False, 256, 512, 4)
@example(4, 128, True, 129, 1024, 4)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.integers(1, 300),
    st.integers(1, 700),
    st.sampled_from([2, 4]),
)
def test_blocks_by_turns_have_the_sums_of_one_after_the_other(
    bits: int, group: int, symmetric: bool, outputs: int, inputs: int, streams: int
) -> None:
    rng = np.random.default_rng(0)
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric, scale_dtype="float16")
    matrix = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), scheme)
    use = WeightUse.of(NAME, "int8", bits)
    module = product_module((1, inputs), matrix, use, residual=True)
    x = rng.standard_normal((1, inputs)).astype(np.float32)
    one, several = (run(module, replace(use.target, read_streams=each), x)[0] for each in (1, streams))
    np.testing.assert_array_equal(several, one)


@pytest.mark.parametrize(("symmetric", "reads"), [(True, 2), (False, 3)])
def test_a_group_asks_for_codes_scales_and_zero_points_of_all_blocks(symmetric: bool, reads: int) -> None:
    scheme = Scheme(4, 64, symmetric=symmetric, scale_dtype="float16")
    matrix = quantize(np.random.default_rng(0).standard_normal((128, 2048)).astype(np.float32), scheme)
    use = WeightUse.of("x86-avx512-amx", "int8", 4)
    code = lower(product_module((1, 2048), matrix, use), use.target).module.script()
    asked = re.findall(r"prefetch\(T.address_of\((\w+)\[", code)
    # Of each of four blocks, twice (before its end and at it): 4 lines of codes in a group of 32, and the parameters'.
    assert sorted(map(asked.count, set(asked))) == [8] * (reads - 1) + [32]


@pytest.mark.parametrize("columns", [1, 16, 17, 576, 960, 2048, 3072, 8016 * 16])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_two_cores_get_even_shares_of_blocks(columns: int, most: int) -> None:
    count = blocks_at_once(columns, 16, most)
    tasks = -(-columns // (16 * count))
    assert 1 <= count <= most
    assert count == 1 or tasks % 2 == 0 or tasks >= MANY_TASKS


def test_as_many_blocks_are_read_by_turns_as_shares_allow() -> None:
    assert [blocks_at_once(columns, 16, 4) for columns in (576, 960, 1152, 2048)] == [2, 2, 4, 4]
