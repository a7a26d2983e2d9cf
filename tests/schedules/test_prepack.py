from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from schedules import prepack
from tests.schedules.execution import TARGET, build, normal, scheduled


def packed_and_plain(module: tvm.IRModule, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    packed, reports = prepack(module, TARGET)
    relax.analysis.well_formed(packed)
    results = [scheduled(relax.transform.DeadCodeElimination()(m))[0](*arrays) for m in (module, packed)]
    return results[0], results[1], len(reports)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 48, 64), (13, 51, 33), (40, 32, 7), (9, 5, 17)])
def test_packed_weights_change_no_bit(rows: int, columns: int, depth: int) -> None:
    weights, bias, x = normal(depth, columns), normal(columns), normal(rows, depth, seed=1)

    def layer(x: relax.Var) -> relax.Expr:
        return op.nn.relu(op.add(op.matmul(x, relax.const(weights)), relax.const(bias)))

    for shape in ((rows, depth), ("m", depth)):
        plain, packed, count = packed_and_plain(build(layer, [shape], ["float32"]), x)
        np.testing.assert_array_equal(packed, plain)
        assert count == 1


def test_one_function_with_two_weights_is_packed_at_both_calls() -> None:
    first, second, x = normal(40, 40), normal(40, 40, seed=1), normal(5, 40, seed=2)
    module = build(lambda x: op.matmul(op.matmul(x, relax.const(first)), relax.const(second)), [x.shape], ["float32"])
    plain, packed, count = packed_and_plain(module, x)
    np.testing.assert_array_equal(packed, plain)
    assert count == 2


def test_weights_that_are_inputs_stay_as_they_are() -> None:
    module = build(op.matmul, [(8, 40), (40, 40)], ["float32", "float32"])
    packed, reports = prepack(module, TARGET)
    assert reports == ()
    tvm.ir.assert_structural_equal(packed, module)
