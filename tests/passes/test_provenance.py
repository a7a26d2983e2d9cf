from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
import tvm
from tvm import relax

from optimizer.frontend.importer import import_model
from passes import pipeline
from passes.base import Refusal, require
from passes.provenance import Bindings, annotate, carry

_NORMALIZED_CONVOLUTION = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[1,2,5,5] x, float[3,2,3,3] w, float[3] gamma, float[3] beta, float[3] mean, float[3] var)
=> (float[1,3,3,3] y)
{
    [convolution] c = Conv (x, w)
    [normalization] n = BatchNormalization (c, gamma, beta, mean, var)
    [activation] y = Relu (n)
}
"""


def _model(text: str) -> onnx.ModelProto:
    """Return the model with all inputs but the first as initializers of ones."""
    model = onnx.parser.parse_model(text)
    for value in model.graph.input[1:]:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), value.name))
    return model


def _nodes(module: tvm.IRModule) -> dict[str, tuple[str, ...]]:
    bindings = Bindings(module["main"])
    return {
        value.op.name.removeprefix("relax."): bindings.nodes(var)
        for var, value in bindings.values.items()
        if isinstance(value, tvm.ir.Call)
    }


def test_every_operator_of_an_import_knows_its_node() -> None:
    module = import_model(_model(_NORMALIZED_CONVOLUTION)).module
    assert _nodes(module) == {
        "nn.conv2d": ("convolution",),
        "nn.batch_norm": ("normalization",),
        "nn.relu": ("activation",),
    }


def test_what_a_pass_makes_inherits_from_all_that_it_replaced() -> None:
    module = import_model(_model(_NORMALIZED_CONVOLUTION)).module
    module, records = pipeline.run(module, pipeline.parse("fold-batch-norm"))
    assert _nodes(module) == {
        "nn.conv2d": ("convolution", "normalization"),
        "add": ("convolution", "normalization"),
        "nn.relu": ("activation",),
    }
    assert [site.nodes for site in records[0].outcome.sites] == [("convolution", "normalization")]


def test_nodes_survive_merging_folding_and_dead_code_elimination() -> None:
    model = _model("""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2,3] x) => (float[2,3] y)
        {
            [first] a = Exp (x)
            [second] b = Exp (x)
            [unused] u = Sin (x)
            [sum] y = Add (a, b)
        }
    """)
    module, _ = pipeline.run(import_model(model).module, pipeline.parse(pipeline.DEFAULT))
    assert _nodes(module) == {"exp": ("first", "second"), "add": ("sum",)}


def _chain(*operators: str) -> tuple[tvm.IRModule, dict[relax.Var, tuple[str, ...]]]:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    nodes: dict[relax.Var, tuple[str, ...]] = {}
    with builder.function("main", [x]):
        with builder.dataflow():
            value = x
            for operator in operators:
                value = builder.emit(getattr(relax.op, operator)(value), operator)
                nodes[value] = (f"node {operator}",)
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return builder.get(), nodes


def test_a_value_replaced_by_an_older_expression_still_claims_what_is_gone() -> None:
    module, nodes = _chain("exp", "sin", "cos", "tan")
    before = annotate(module, nodes)
    bindings = {var.name: var for var in Bindings(before["main"]).values}
    first = Bindings(before["main"]).values[bindings["exp"]]

    @relax.expr_functor.mutator
    class Shortcut(relax.expr_functor.PyExprMutator):
        def visit_var_binding_(self, binding: relax.VarBinding) -> None:
            if binding.var.name == "cos":  # cos(sin(exp(x))) -> sin(exp(x)), written with exp's own call
                binding = relax.VarBinding(bindings["cos"], self.builder_.normalize(relax.op.sin(first)))
            super().visit_var_binding_(binding)

    rewritten = tvm.IRModule({before.get_global_var("main"): Shortcut().visit_expr(before["main"])})
    after = carry(before, relax.transform.DeadCodeElimination()(rewritten))
    assert _nodes(after)["sin"] == ("node exp", "node sin", "node cos")
    assert _nodes(after)["tan"] == ("node tan",)


def test_annotation_changes_no_structure() -> None:
    module, nodes = _chain("exp", "sin")
    tvm.ir.assert_structural_equal(annotate(module, nodes), module)


def test_require_refuses_with_the_reason() -> None:
    require(True, "not this")
    with pytest.raises(Refusal, match="another user"):
        require(False, "the sum has another user")
