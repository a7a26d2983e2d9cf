"""Products with rounded weights are off by no more than the steps of their groups, and keep their interface."""

from __future__ import annotations

import numpy as np
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from passes import pipeline
from passes.quantize_weights import SMALLEST_MATRIX, QuantizeWeights
from tests.passes.graph import graph
from tests.passes.properties.budget import budget
from tests.passes.properties.relax_interpreter import Interpreter


@budget(25)
@given(
    st.sampled_from([1, 16, 31, 32, 64, 97]),
    st.sampled_from([1, 13, 16, 40]),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.sampled_from([0.0, 5.0]),
)
def test_rounded_weights_are_off_by_at_most_a_step(
    depth: int, columns: int, bits: int, group: int, symmetric: bool, offset: float
) -> None:
    rng = np.random.default_rng([depth, columns])
    weight = (rng.standard_normal((depth, columns)) + offset).astype("float32")

    def body(x: relax.Expr) -> relax.Expr:
        return relax.op.add(relax.op.matmul(x, relax.const(weight)), relax.const(np.float32(1)))

    module = graph(body, ("rows", depth))
    item = QuantizeWeights(bits=bits, group=group, symmetric=symmetric, activations="reference")
    after, (record,) = pipeline.run(module, [item])
    assert record.outcome.rewritten == (weight.size >= SMALLEST_MATRIX)
    tvm.ir.assert_structural_equal(after["main"].ret_ty, module["main"].ret_ty, map_free_vars=True)
    x = rng.standard_normal((3, depth)).astype("float32")
    (before,), (rounded,) = (Interpreter(each).run([x]) for each in (module, after))
    assert (np.abs(rounded - before) <= np.abs(x) @ _steps(weight, bits, group or depth) + 1e-4).all()


def _steps(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Return for each weight the largest step that its group may have, and what fp16 rounds its scale by."""
    largest = np.abs(weight)
    for start in range(0, len(weight), group):
        largest[start : start + group] = largest[start : start + group].max(0)
    return largest / (2 ** (bits - 1) - 1) + largest * 2.0**-9
