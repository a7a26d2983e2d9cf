"""Stores past the caches: the same results, and whole lines alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from schedules import schedule_module, streaming
from tests.schedules.execution import TARGET, build, compiled, normal

ROWS = st.sampled_from([33, 61, 64])
# Whole lines, and rows whose first elements are anywhere in a line.
WIDTHS = st.sampled_from([1024, 1040, 1021, 1032])
STREAMS = TARGET.architecture == "x86_64"
# Transpositions write what a register holds, or whole lines where rows lie about a page apart.
WIDE_ENOUGH = STREAMS and TARGET.vector_lanes(32) == streaming.LANES


@pytest.fixture(scope="module", autouse=True)
def every_parallel_output_is_large() -> object:
    """Let outputs of the tests' sizes be beyond the caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "LAST_CACHE_BYTES", 4 * 32 * 1024)
        yield


def result_and_code(function: Callable[..., relax.Expr], *arrays: np.ndarray) -> tuple[np.ndarray, str]:
    """Return what a function computes, and its scheduled code."""
    module = build(function, [array.shape for array in arrays], [str(array.dtype) for array in arrays])
    module, _ = schedule_module(module, TARGET)
    return compiled(module)(*arrays), str(module)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(rows=ROWS, width=WIDTHS)
def test_elementwise_rows_and_transpositions(rows: int, width: int) -> None:
    x, bias = normal(rows, width), normal(width, seed=1)
    got, code = result_and_code(lambda x, b: op.nn.relu(op.add(x, b)), x, bias)
    np.testing.assert_array_equal(got, np.maximum(x + bias, 0))
    assert ("optimizer_stream_line" in code) == (STREAMS and width % streaming.LANES == 0)
    got, code = result_and_code(lambda x: op.permute_dims(x, [1, 0]), x)
    np.testing.assert_array_equal(got, x.T)
    by_lines = WIDE_ENOUGH or (STREAMS and width != 1040)
    assert ("optimizer_stream_line" in code) == (by_lines and rows % streaming.LANES == 0)


@pytest.mark.parametrize("width", [1024, 1021])
def test_rows_in_several_steps(width: int) -> None:
    x = normal(40, width)
    got, code = result_and_code(lambda x: op.nn.softmax(x, axis=-1), x)
    exponentials = np.exp(x.astype("float64") - x.max(-1, keepdims=True))
    np.testing.assert_allclose(got, exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-5)
    assert ("optimizer_stream_line" in code) == (STREAMS and width % streaming.LANES == 0)


def test_other_types_and_small_outputs_stay_in_the_caches() -> None:
    for array in (normal(64, 1024, dtype="float16"), normal(16, 1024)):
        got, code = result_and_code(lambda x: op.add(x, x), array)
        np.testing.assert_array_equal(got, array + array)
        assert "optimizer_stream_line" not in code
