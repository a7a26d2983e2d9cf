from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.exact import in_float64
from benchmarks.integer_products import byte_product


def test_outputs_are_computed_in_float64() -> None:
    x, w = np.full((1, 3), 1 / 3, np.float32), np.full((3, 1), 1e-9, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Exp", ["p"], ["y"])]
    types = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 3), ("y", 1))]
    graph = helper.make_graph(nodes, "kernel", types[:1], types[1:], [numpy_helper.from_array(w, "w")])
    outputs = in_float64(helper.make_model(graph), {"x": x})
    assert outputs is not None
    np.testing.assert_array_equal(outputs["y"], np.exp(x.astype(np.float64) @ w.astype(np.float64)))


def test_operators_of_other_domains_have_no_outputs() -> None:
    node = helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft")
    assert in_float64(helper.make_model(helper.make_graph([node], "kernel", [], [])), {}) is None


def test_products_of_bytes_have_outputs() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.uint8)
    model = byte_product(4, 8, 64)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zero, scale = int(constants["zero"]), float(constants["scale"])
    product = (rows.astype(np.float64) - zero) * scale @ (constants["codes"] * constants["w_scale"].astype(np.float64))
    outputs = in_float64(model, {"x": rows})
    assert outputs is not None
    np.testing.assert_array_equal(outputs["y"], np.clip(np.rint(product / scale) + zero, 0, 255))
