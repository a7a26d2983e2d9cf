from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import targets
from schedules.weight_layout import WeightLayout, layout_of

LAYOUTS = st.builds(
    WeightLayout,
    st.sampled_from([4, 8]),
    st.sampled_from([4, 8, 16, 32]),
    st.sampled_from([4, 8]),
    signed=st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LAYOUTS, st.integers(1, 70), st.integers(1, 9), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(layout: WeightLayout, rows: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << layout.bits, (rows, steps * layout.step), dtype=np.uint8)
    packed = layout.pack(codes)
    assert packed.nbytes == -(-rows // layout.columns) * layout.columns * codes.shape[1] * layout.bits // 8
    assert np.array_equal(layout.unpack(packed, rows), codes)
    groups = rng.standard_normal((rows, steps)).astype(np.float16)
    assert np.array_equal(layout.unpack_groups(layout.pack_groups(groups), rows), groups)


def test_a_lane_holds_neighbours_of_one_output() -> None:
    layout = WeightLayout(4, 16, 4)
    codes = np.zeros((16, 8), np.uint8)
    codes[3] = [1, 2, 3, 4, 5, 6, 7, 8]
    assert layout.pack(codes)[0, 0, 12:16].tolist() == [0x51, 0x62, 0x73, 0x84]


def test_signed_codes_have_their_middle_as_zero() -> None:
    codes = np.array([[0, 7, 8, 9, 15, 8, 8, 8]], np.uint8)
    packed = WeightLayout(4, 1, 4, signed=True).pack(codes)[0, 0]
    assert [(byte & 15) - 2 * (byte & 8) for byte in packed.tolist()] == [-8, -1, 0, 1]
    codes = np.array([[0, 127, 128, 255]], np.uint8)
    assert WeightLayout(8, 1, 4, signed=True).pack(codes).view(np.int8).ravel().tolist() == [-128, -1, 0, 127]


@pytest.mark.parametrize("name", targets.names())
def test_every_target_has_a_layout_for_both_widths(name: str) -> None:
    target = targets.get(name)
    assert layout_of(target, 4).step == 2 * layout_of(target, 8).step
