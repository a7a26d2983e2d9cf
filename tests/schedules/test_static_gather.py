"""Elements picked from rows at known places, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.relax import op

from tests.schedules.execution import integers, normal, run


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    width=st.sampled_from([1, 2, 7, 16, 17, 33, 97, 131]),
    first=st.integers(0, 3),
    step=st.sampled_from([-1, 2, 3, 4, 7]),
    dtype=st.sampled_from(["float32", "int8", "float16", "int64"]),
)
def test_strided_slices_of_rows(width: int, first: int, step: int, dtype: str) -> None:
    x = integers(5, first + (width - 1) * abs(step) + 1, dtype=dtype)
    begin, end = (first, x.shape[1]) if step > 0 else (x.shape[1] - 1, -x.shape[1] - 1)
    got, _ = run(lambda x: op.strided_slice(x, [1], [begin], [end], [step]), [x])
    np.testing.assert_array_equal(got, x[:, begin::step])


def test_one_kernel_picks_from_rows_and_reads_others_in_order() -> None:
    x, y = normal(9, 61), normal(9, 61, seed=1)
    got, families = run(lambda x, y: op.add(op.flip(x, 1), op.nn.relu(y)), [x, y])
    np.testing.assert_array_equal(got, x[:, ::-1] + np.maximum(y, 0))
    assert families == {"static-gather"}


@pytest.mark.parametrize("step", [2, 100])
def test_elements_far_apart_are_left_to_the_general_schedule(step: int) -> None:
    x = normal(3, 40 * step)
    got, families = run(lambda x: op.strided_slice(x, [1], [0], [x.ty.shape[1]], [step]), [x])
    np.testing.assert_array_equal(got, x[:, ::step])
    assert families == {"static-gather" if step == 2 else "elementwise"}


def test_rows_of_a_symbolic_number() -> None:
    x = normal(11, 50)
    got, families = run(lambda x: op.flip(x, 1), [x], [("n", 50)])
    np.testing.assert_array_equal(got, x[:, ::-1])
    assert families == {"static-gather"}
