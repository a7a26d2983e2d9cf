"""What holds for every pass and every order of passes, on generated models.

`OPTIMIZER_PROPERTY_EXAMPLES=1000 python -m pytest tests/passes/properties` runs a long random session. A model that it
finds is printed as ONNX text; shrunk, it goes to `counterexamples/`, whose files are run here too.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnx.shape_inference
import pytest
import tvm
import tvm.ir
from hypothesis import given, reject
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from optimizer.empty_constants import make_empty_constants
from optimizer.frontend.importer import import_model
from passes import pipeline
from passes.base import Pass
from passes.block_channels import BlockChannels
from passes.convert_precision import ConvertPrecision
from passes.fold_constants import FoldConstants
from tests.passes.properties.budget import budget
from tests.passes.properties.onnx_graphs import Generated
from tests.passes.properties.onnx_models import CONVOLUTIONAL, models
from tests.passes.properties.relax_interpreter import Interpreter

# Passes that keep values: the others change the arithmetic on purpose.
KEEPING = (*pipeline.DEFAULT.split(","), "fold-norm-scales", "fold-requantization")
TWINS = ("renamed", "identities", "widened", "reordered")
COUNTEREXAMPLES = sorted((Path(__file__).parent / "counterexamples").glob("*.onnxtxt"))


@cache
def _pass(name: str) -> Pass:
    return pipeline.parse(name)[0]


def _arrays(generated: Generated, module: tvm.IRModule) -> list[np.ndarray]:
    return [generated.inputs[value.name] for value in generated.model.graph.input][: len(module["main"].params)]


def _assert_same_values(before: tvm.IRModule, after: tvm.IRModule, generated: Generated) -> None:
    """Assert equal integers and booleans, and floats that differ by the rounding of float64 where nothing rounds."""
    arrays = _arrays(generated, before)
    wide = zip(Interpreter(before, wide=True).run(arrays), Interpreter(after, wide=True).run(arrays), strict=True)
    for expected, given_ in wide:
        if expected.dtype.kind in "iub":
            np.testing.assert_array_equal(given_, expected)
        else:
            # Constants such as sqrt(1/2) of float32 models are rounded to float32.
            np.testing.assert_allclose(given_, expected, rtol=1e-5, atol=1e-5)
    exact = zip(Interpreter(before).run(arrays), Interpreter(after).run(arrays), strict=True)
    for expected, given_ in exact:
        assert given_.dtype == expected.dtype
        if expected.dtype.kind in "iub":
            np.testing.assert_array_equal(given_, expected)


def _assert_same_interface(before: tvm.IRModule, after: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(before["main"].ret_ty, after["main"].ret_ty, map_free_vars=True)
    assert [parameter.name for parameter in before["main"].params] == [p.name for p in after["main"].params]


def _bindings(module: tvm.IRModule) -> int:
    return sum(len(block.bindings) for block in module["main"].body.blocks)


def _constant_bytes(module: tvm.IRModule) -> int:
    sizes: list[int] = []

    def note(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.ty, relax.TensorType):
            size = expr.value.numpy().nbytes
            sizes.append(size if size > 1024 else 0)

    relax.analysis.post_order_visit(module["main"], note)
    return sum(sizes)


@budget(25)
@given(models(), st.sampled_from(sorted(set(KEEPING))))
def test_each_pass_keeps_values_and_interface_and_is_idempotent(generated: Generated, name: str) -> None:
    module = import_model(generated.model).module
    item = _pass(name)
    after, _ = pipeline.run(module, [item])
    _assert_same_interface(module, after)
    _assert_same_values(module, after, generated)
    again, _ = pipeline.run(after, [item])
    tvm.ir.assert_structural_equal(again, after, map_free_vars=True)


@budget(25)
@given(models(), st.lists(st.sampled_from(sorted(set(KEEPING))), min_size=2, max_size=6))
def test_any_order_of_passes_keeps_values_and_interface(generated: Generated, names: list[str]) -> None:
    module = import_model(generated.model).module
    after, _ = pipeline.run(module, [_pass(name) for name in names])
    _assert_same_interface(module, after)
    _assert_same_values(module, after, generated)


@budget(25)
@given(models())
def test_default_passes_agree_with_the_reference_evaluator(generated: Generated) -> None:
    onnx.checker.check_model(generated.model)
    try:
        with np.errstate(all="ignore"):
            expected = ReferenceEvaluator(generated.model).run(None, generated.inputs)
    except (TypeError, ValueError):  # it has no transposed convolutions of no images, or with several outputs a group
        reject()
    imported = import_model(generated.model)
    after, _ = pipeline.run(imported.module, pipeline.parse(pipeline.DEFAULT))
    assert list(imported.output_names) == [output.name for output in generated.model.graph.output]
    for reference, result in zip(expected, Interpreter(after).run(_arrays(generated, after)), strict=True):
        assert (result.shape, result.dtype) == (reference.shape, reference.dtype)
        if reference.dtype.kind in "iub":
            np.testing.assert_array_equal(result, reference)


@budget(8)
@given(models(most_steps=6, growth=CONVOLUTIONAL))
def test_blocks_of_channels_keep_values_and_interface(generated: Generated) -> None:
    module = import_model(generated.model).module
    after, _ = pipeline.run(module, [BlockChannels(2)])
    _assert_same_interface(module, after)
    _assert_same_values(module, after, generated)


@budget(10)
@given(models(), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_converted_precision_keeps_the_interface_and_is_idempotent(generated: Generated, dtype: str) -> None:
    module = import_model(generated.model).module
    after, _ = pipeline.run(module, [ConvertPrecision(dtype)])
    _assert_same_interface(module, after)
    again, _ = pipeline.run(after, [ConvertPrecision(dtype)])
    tvm.ir.assert_structural_equal(again, after, map_free_vars=True)


@budget(15)
@given(models())
def test_folding_adds_no_nodes_and_no_weights(generated: Generated) -> None:
    module = import_model(generated.model).module
    after = FoldConstants().run(module).module
    assert _bindings(after) <= _bindings(module)
    assert _constant_bytes(after) <= _constant_bytes(module)


@budget(10)
@given(models())
def test_same_model_gives_the_same_module_and_survives_a_round_trip(generated: Generated) -> None:
    first, _ = pipeline.run(import_model(generated.model).module, pipeline.parse(pipeline.DEFAULT))
    second, _ = pipeline.run(import_model(generated.model).module, pipeline.parse(pipeline.DEFAULT))
    assert first.script() == second.script()
    # TVM cannot read back a constant without elements; lowering makes these at run time.
    kept = make_empty_constants(first)
    tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(kept)), kept, map_free_vars=True)


@budget(20)
@given(models(), st.sampled_from(TWINS))
def test_twins_get_the_same_fusions_and_results(generated: Generated, kind: str) -> None:
    default = pipeline.parse(pipeline.DEFAULT)
    module, _ = pipeline.run(import_model(generated.model).module, default)
    if kind == "reordered":
        twin, _ = pipeline.run(import_model(_reordered(generated.model)).module, default)
        assert _operators(twin) == _operators(module)
        _assert_same_interface(module, twin)
        _assert_same_values(module, twin, generated)
    else:
        twin, _ = pipeline.run(import_model(_twin(generated.model, kind)).module, default)
        tvm.ir.assert_structural_equal(twin["main"].body, module["main"].body, map_free_vars=True)


def _operators(module: tvm.IRModule) -> Counter[str]:
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    return Counter(binding.value.op.name for binding in bindings if isinstance(binding.value, tvm.ir.Call))


def _reordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the same nodes in another order: of those that may come next always the last one."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    pending = list(model.graph.node)
    known = {value.name for value in [*model.graph.input, *model.graph.initializer]}
    del twin.graph.node[:]
    while pending:
        node = next(node for node in reversed(pending) if known.issuperset(node.input))
        pending.remove(node)
        known.update(node.output)
        twin.graph.node.append(node)
    return twin


# A dtype that holds every value of another.
_WIDER = {
    onnx.TensorProto.FLOAT: onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16: onnx.TensorProto.FLOAT,
    onnx.TensorProto.BFLOAT16: onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT8: onnx.TensorProto.INT16,
    onnx.TensorProto.INT16: onnx.TensorProto.INT32,
    onnx.TensorProto.INT32: onnx.TensorProto.INT64,
    onnx.TensorProto.UINT8: onnx.TensorProto.INT32,
    onnx.TensorProto.UINT16: onnx.TensorProto.UINT32,
    onnx.TensorProto.UINT32: onnx.TensorProto.UINT64,
    onnx.TensorProto.BOOL: onnx.TensorProto.INT32,
}


def _twin(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """Return a model of the same meaning: other names, Identity on every edge, or a cast up and down on every edge."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.node[:]
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    for node in model.graph.node:
        copy = twin.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [name if _is_given(model, name) else f"other_{name}" for name in node.input]
        name = node.output[0]
        if kind == "renamed":
            copy.output[0] = f"other_{name}"
            twin.graph.node.add(op_type="Identity", input=[f"other_{name}"], output=[name])
        elif kind == "widened" and types[name] in _WIDER:
            up = twin.graph.node.add(op_type="Cast", input=[name], output=[f"wide_{name}"])
            up.attribute.append(helper.make_attribute("to", _WIDER[types[name]]))
            down = twin.graph.node.add(op_type="Cast", input=[f"wide_{name}"], output=[f"other_{name}"])
            down.attribute.append(helper.make_attribute("to", types[name]))
        else:
            twin.graph.node.add(op_type="Identity", input=[name], output=[f"other_{name}"])
    return twin


def _is_given(model: onnx.ModelProto, name: str) -> bool:
    return any(value.name == name for value in [*model.graph.input, *model.graph.initializer])


@pytest.mark.parametrize("path", COUNTEREXAMPLES, ids=lambda path: path.stem)
def test_counterexamples_of_the_past_hold(path: Path) -> None:
    model = onnx.parser.parse_model(path.read_text())
    rng = np.random.default_rng(0)
    inputs = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = [dimension.dim_value if not dimension.dim_param else 2 for dimension in kind.shape.dim]
        inputs[value.name] = (rng.standard_normal(shape) * 4).astype(dtype)
    generated = Generated(model, inputs)
    module = import_model(model).module
    default = pipeline.parse(pipeline.DEFAULT)
    after, _ = pipeline.run(module, default)
    _assert_same_interface(module, after)
    _assert_same_values(module, after, generated)
    for item in default:
        once, _ = pipeline.run(module, [item])
        twice, _ = pipeline.run(once, [item])
        tvm.ir.assert_structural_equal(twice, once, map_free_vars=True)
