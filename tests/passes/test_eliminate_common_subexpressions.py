from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm.ir
from tvm import relax
from tvm.relax import op

from passes import pipeline
from passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from passes.provenance import Bindings, annotate, nodes_of
from tests.passes.graph import graph


@pytest.mark.parametrize("columns", [3, 1000])
def test_equal_computations_with_one_constant_are_done_once(columns: int) -> None:
    weight = relax.const(np.arange(4 * columns, dtype="float32").reshape(4, columns))

    def twice(x: relax.Expr) -> relax.Expr:
        return op.add(op.matmul(x, weight), op.matmul(x, weight))

    def once(x: relax.Expr) -> relax.Expr:
        product = op.matmul(x, weight)
        return op.add(product, product)

    merged = EliminateCommonSubexpressions().run(graph(twice, (2, 4))).module
    tvm.ir.assert_structural_equal(merged, EliminateCommonSubexpressions().run(graph(once, (2, 4))).module)
    assert _products(merged) == 1


def test_constants_of_one_shape_and_other_values_stay_apart() -> None:
    first, second = (relax.const(np.full((4, 1000), value, "float32")) for value in (1, 2))
    module = graph(lambda x: op.add(op.matmul(x, first), op.matmul(x, second)), (2, 4))
    assert _products(EliminateCommonSubexpressions().run(module).module) == 2


def test_what_nobody_reads_is_dropped() -> None:
    builder = relax.BlockBuilder()
    value = relax.Var("x", relax.TensorType([2, 4], "float32"))
    with builder.function("main", [value]):
        with builder.dataflow():
            builder.emit(op.exp(value))
            result = builder.emit_output(op.nn.relu(value))
        builder.emit_func_output(result)
    (call,) = _calls(EliminateCommonSubexpressions().run(builder.get()).module)
    assert call.op.name == "relax.nn.relu"


def _calls(module: tvm.IRModule) -> list[tvm.ir.Call]:
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    return [binding.value for binding in bindings if isinstance(binding.value, tvm.ir.Call)]


def _products(module: tvm.IRModule) -> int:
    return sum(call.op.name == "relax.matmul" for call in _calls(module))


def test_what_is_merged_is_a_site_and_hands_on_its_nodes() -> None:
    module = graph(lambda x: op.add(op.exp(x), op.exp(x)), (3,))
    first, second, _ = Bindings(module["main"]).values
    named = annotate(module, {first: ("one",), second: ("other",)})
    after, (record,) = pipeline.run(named, [EliminateCommonSubexpressions()])
    assert [(site.refusal, site.nodes) for site in record.outcome.sites] == [(None, ("other",))]
    (survivor, *_) = Bindings(after["main"]).values.values()
    assert nodes_of(survivor) == ("one", "other")
    _, (again,) = pipeline.run(after, [EliminateCommonSubexpressions()])
    assert again.outcome.sites == ()
