from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import ir, relax
from tvm.relax import op
from tvm.relax.expr_functor import PyExprVisitor, visitor

from optimizer.package.dtypes import numpy_dtype
from schedules import prepack
from tests.schedules.execution import TARGET, build, normal, scheduled

VOCABULARY, HIDDEN = 75, 33  # no multiples of a block
IDS = np.array([[3, 0, 74], [31, 32, 64]], np.int64)


@visitor
class _Constants(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[ir.GenericConst] = []

    def visit_generic_const_(self, op: ir.GenericConst) -> None:
        if isinstance(op.ty, relax.TensorType):
            self.found.append(op)


def packed(table: np.ndarray, weight: np.ndarray) -> tuple[tvm.IRModule, list[tuple[int, ...]], int]:
    """Return a packed language model of nothing but a table and a head, its constants' shapes, and their number."""
    head, embedding = relax.const(weight), relax.const(table)
    module = build(
        lambda ids: op.matmul(op.take(embedding, ids, axis=0), head, out_dtype="float32"), [IDS.shape], ["int64"]
    )
    module = relax.transform.DeadCodeElimination()(prepack(module, TARGET)[0])
    relax.analysis.well_formed(module)
    constants = _Constants()
    constants.visit_expr(module["main"])
    shapes = [tuple(int(extent) for extent in constant.ty.shape.values) for constant in constants.found]
    return module, shapes, len({int(constant.value.data_ptr()) for constant in constants.found})


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [("float32", HIDDEN), ("float16", HIDDEN), ("bfloat16", HIDDEN), pytest.param("bfloat16", 34, id="pairs")],
)
def test_a_tied_table_is_gathered_from_the_packed_weights_and_stored_once(dtype: str, hidden: int) -> None:
    table = normal(VOCABULARY, hidden).astype(numpy_dtype(dtype))
    module, shapes, count = packed(table, np.ascontiguousarray(table.T))
    assert count == 1
    assert len(set(shapes)) == 1
    expected = table.astype(np.float32)[IDS] @ table.astype(np.float32).T
    np.testing.assert_allclose(scheduled(module)[0](IDS), expected, rtol=1e-4, atol=1e-4 * hidden)


def test_a_table_of_other_numbers_keeps_its_rows() -> None:
    table, weight = normal(VOCABULARY, HIDDEN), normal(HIDDEN, VOCABULARY, seed=1)
    module, shapes, count = packed(table, weight)
    assert count == 2
    assert (VOCABULARY, HIDDEN) in shapes
    np.testing.assert_allclose(scheduled(module)[0](IDS), table[IDS] @ weight, rtol=1e-4, atol=1e-4)


def test_a_table_that_is_read_whole_keeps_its_rows() -> None:
    table = normal(VOCABULARY, HIDDEN)
    head, embedding = relax.const(np.ascontiguousarray(table.T)), relax.const(table)

    def model(x: relax.Var) -> relax.Expr:
        return op.add(op.sum(embedding, axis=1), op.sum(op.matmul(x, head), axis=0))

    module = relax.transform.DeadCodeElimination()(prepack(build(model, [(4, HIDDEN)], ["float32"]), TARGET)[0])
    x = normal(4, HIDDEN, seed=1)
    expected = table.sum(1) + (x @ table.T).sum(0)
    np.testing.assert_allclose(scheduled(module)[0](x), expected, rtol=1e-4, atol=1e-4)
