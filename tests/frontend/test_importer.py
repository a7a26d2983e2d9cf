"""The walk over the graph: names, blockers, domains, opsets, and what is checked when the module runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs, helper, numpy_helper, parser

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from optimizer.frontend.registry import find_converter, registered_operators
from optimizer.reference import unoptimized


def parsed(text: str) -> onnx.ModelProto:
    return parser.parse_model(text)


def test_names_of_inputs_and_outputs_keep_their_dots():
    value = helper.make_tensor_value_info("past.0.key", TensorProto.FLOAT, ("n",))
    result = helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ("n",))
    graph = helper.make_graph([helper.make_node("Relu", ["past.0.key"], ["present.0.key"])], "g", [value], [result])
    imported = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert (imported.input_names, imported.output_names) == (("past.0.key",), ("present.0.key",))
    outputs = unoptimized(imported)({"past.0.key": np.array([-1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(outputs["present.0.key"], [0.0, 2.0])


def test_an_unknown_operator_behind_another_is_reported_too():
    text = """<ir_version: 10, opset_import: ["" : 18, "custom" : 1]>
    g (float[n] x) => (float[n] y) { a = custom.First(x) s = Shape(a) b = Exp(a) y = custom.Second(b, s) }"""
    with pytest.raises(UnsupportedModelError) as caught:
        import_model(parser.parse_model(text))
    assert [blocker.operator for blocker in caught.value.blockers] == ["custom::First", "custom::Second"]


def test_all_blockers_are_reported_at_once_with_their_nodes():
    model = parsed("""
        <ir_version: 10, opset_import: ["": 18, "other": 1]>
        g (float[n] x) => (float[n] y, float[n] z) {
            a = other.First (x)
            y = Relu (a)
            b = StringNormalizer (x)
            z = other.Second (x)
        }
    """)
    for node, name in zip(model.graph.node, ("one", "two", "three", "four"), strict=True):
        node.name = name
    with pytest.raises(UnsupportedModelError) as caught:
        import_model(model)
    found = {(blocker.node, blocker.operator) for blocker in caught.value.blockers}
    assert found == {("one", "other::First"), ("three", "StringNormalizer"), ("four", "other::Second")}
    assert "3 node(s)" in str(caught.value)


def test_embeddings_that_the_builder_shares_wrongly_are_refused_with_the_option_to_build_with():
    model = parsed("""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (int64[n] ids, float[8, 2] scales) => (float[n, 64] y) <int64[2] shape = {8, 32}> {
            rows = Reshape(weights, shape)
            y = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32>(rows, ids, scales)
        }""")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((64, 8), np.float32), "weights"))
    with pytest.raises(UnsupportedModelError, match=r"512 elements .* \[8, 32\].* shared_embeddings=false"):
        import_model(model)


def test_the_domain_of_an_operator_decides_what_it_means():
    standard = find_converter("", "Attention", 23)
    microsoft = find_converter("com.microsoft", "Attention", 1)
    assert standard is not None
    assert microsoft is not None
    assert standard is not microsoft
    assert find_converter("", "GroupQueryAttention", 23) is None


def test_an_operator_of_a_later_opset_is_not_supported_before_it():
    assert find_converter("", "Attention", 22) is None


def test_every_registered_standard_operator_is_one():
    names = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""}
    own = {"SimplifiedLayerNormalization"}  # onnxruntime writes it into the standard domain
    assert {operator for domain, operator in registered_operators() if not domain} <= names | own


@pytest.mark.parametrize("opset", range(7, defs.onnx_opset_version() + 1))
def test_every_opset_imports(opset: int):
    axes = "" if opset >= 13 else "axes = [0]"
    squeeze = "v = Squeeze (t, zero)" if opset >= 13 else f"v = Squeeze <{axes}> (t)"
    model = parsed(f"""
        <ir_version: 4, opset_import: ["": {opset}]>
        g (float[1, n, 4] x, float[4, 4] w) => (float[n, 4] y) {{
            zero = Constant <value = int64[1] {{0}}> ()
            t = MatMul (x, w)
            {squeeze}
            r = Relu (v)
            y = Softmax <axis = 1> (r)
        }}
    """)
    random = np.random.default_rng(0)
    x, w = random.normal(size=(1, 3, 4)).astype(np.float32), random.normal(size=(4, 4)).astype(np.float32)
    rows = np.exp(np.maximum(x[0] @ w, 0))
    outputs = unoptimized(import_model(model))({"x": x, "w": w})
    np.testing.assert_allclose(outputs["y"], rows / rows.sum(axis=1, keepdims=True), rtol=1e-5)


def test_symbols_that_turn_out_different_are_an_error():
    model = parsed("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[a] x, float[b] z) => (float[a] y) { y = Add (x, z) }
    """)
    run = unoptimized(import_model(model))
    np.testing.assert_array_equal(run({"x": np.ones(3, np.float32), "z": np.ones(3, np.float32)})["y"], [2, 2, 2])
    with pytest.raises(RuntimeError, match="match_cast"):
        run({"x": np.ones(3, np.float32), "z": np.ones(2, np.float32)})


def test_symbols_asserted_in_both_directions_import():
    model = parsed("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[a] x, float[b] z) => (float[a] y) {
            s = Add (x, z)
            t = Add (z, x)
            y = Mul (s, t)
        }
    """)
    ones = np.ones(3, np.float32)
    np.testing.assert_array_equal(unoptimized(import_model(model))({"x": ones, "z": ones})["y"], [4, 4, 4])


def test_shape_override_makes_dimensions_static():
    model = parsed("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }
    """)
    imported = import_model(model, shapes={"x": [2, 4]})
    assert [int(size.value) for size in imported.module["main"].ret_ty.shape.values] == [2, 4]
