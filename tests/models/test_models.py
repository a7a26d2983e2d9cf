"""The committed exports import with symbolic shapes, and compiled for this machine give the outputs of onnxruntime."""

from __future__ import annotations

import onnx
import pytest
import tvm.ir
from tvm import relax

import targets
from optimizer.compile import CompileOptions, compile_in_memory
from optimizer.frontend.importer import ImportedModel, import_model
from tests.models.catalog import MODELS, ExportedModel
from tests.models.comparison import require_reference_outputs

each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.path.stem)


@each_model
def test_no_shape_depends_on_data(model: ExportedModel):
    imported = import_model(onnx.load(model.path))
    main = imported.module["main"]
    assert _operators(main).isdisjoint({"relax.tensor_to_shape"})
    assert set(relax.analysis.defined_symbolic_vars(main)) == _parameter_symbols(main)


@each_model
def test_every_dynamic_dimension_is_a_symbol_of_its_name(model: ExportedModel):
    proto = onnx.load(model.path)
    declared = {
        dimension.dim_param
        for value in proto.graph.input
        for dimension in value.type.tensor_type.shape.dim
        if dimension.dim_param
    }
    imported = import_model(proto)
    assert {symbol.name for symbol in _parameter_symbols(imported.module["main"])} == declared


@pytest.mark.parametrize(
    "model", [each for each in MODELS if not each.keeps_a_cache], ids=lambda model: model.path.stem
)
def test_compiled_model_gives_the_reference_outputs(model: ExportedModel):
    require_reference_outputs(compile_in_memory(onnx.load(model.path), CompileOptions(targets.get("host"))), model)


def test_names_of_inputs_and_outputs_keep_their_dots():
    model = next(model for model in MODELS if model.name == "gpt2")
    imported: ImportedModel = import_model(onnx.load(model.path))
    assert "past_key_values.0.key" in imported.input_names
    assert any("." in name for name in imported.output_names)


def _operators(function: relax.Function) -> set[str]:
    names: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            names.add(expr.op.name)

    relax.analysis.post_order_visit(function, visit)
    return names


def _parameter_symbols(function: relax.Function) -> set[tvm.ir.Expr]:
    symbols: set[tvm.ir.Expr] = set()
    for parameter in function.params:
        symbols |= set(relax.analysis.free_symbolic_vars(relax.ShapeExpr(list(parameter.ty.shape.values))))
    return symbols
