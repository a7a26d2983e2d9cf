from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from optimizer.compile import find_target
from optimizer.frontend.importer import import_model
from optimizer.kernel_nodes import kernel_name
from optimizer.lowering import LoweredModule, lower
from passes import pipeline


def _lowered(text: str) -> LoweredModule:
    """Lower a model; its inputs but the first are initializers."""
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for value in model.graph.input[1:]:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
    onnx.checker.check_model(model)
    module, _ = pipeline.run(import_model(model).module, pipeline.parse(pipeline.DEFAULT))
    return lower(module, find_target("x86-avx2"))


def test_calls_of_one_kernel_know_their_own_nodes() -> None:
    lowered = _lowered("""
        <ir_version: 8, opset_import: ["" : 17]>
        two_layers (float[4,16] x, float[16,16] w1, float[16] b1, float[16,16] w2, float[16] b2) => (float[4,16] y)
        {
            [product1] p1 = MatMul (x, w1)
            [sum1] s1 = Add (p1, b1)
            [active1] a1 = Relu (s1)
            [product2] p2 = MatMul (a1, w2)
            [sum2] s2 = Add (p2, b2)
            [active2] y = Relu (s2)
        }
    """)
    (kernel,) = lowered.kernels
    assert kernel.operators == ("matmul", "add", "relu")
    assert kernel.nodes == (("product1", "sum1", "active1"), ("product2", "sum2", "active2"))
    assert kernel.function == "matmul_add_relu_packed"


def test_groups_that_read_the_same_input_are_told_apart() -> None:
    lowered = _lowered("""
        <ir_version: 8, opset_import: ["" : 17]>
        branches (float[4,16] x, float[16,8] w1, float[8] b1, float[16,8] w2, float[8] b2)
            => (float[4,8] y, float[4,8] z)
        {
            [product1] p1 = MatMul (x, w1)
            [product2] p2 = MatMul (x, w2)
            [sum2] y = Add (p2, b2)
            [sum1] z = Add (p1, b1)
        }
    """)
    calls = {nodes for kernel in lowered.kernels for nodes in kernel.nodes}
    assert calls == {("product1", "sum1"), ("product2", "sum2")}


def test_a_group_with_two_results_keeps_its_nodes_and_those_of_its_readers() -> None:
    lowered = _lowered("""
        <ir_version: 8, opset_import: ["" : 17]>
        results (float[4,16] x, float[16,8] w) => (float[4,16] exponential, float[4,8] y)
        {
            [sine] s = Sin (x)
            [exponential] exponential = Exp (s)
            [product] p = MatMul (exponential, w)
            [root] y = Abs (p)
        }
    """)
    calls = [nodes for kernel in lowered.kernels for nodes in kernel.nodes]
    assert sorted(calls) == [("product", "root"), ("sine", "exponential")]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["matmul", "add", "reshape", "transpose", "layer_norm", "sigmoid"]), min_size=1))
def test_kernel_names_are_identifiers_of_bounded_length(operators: list[str]) -> None:
    name = kernel_name(tuple(operators))
    assert re.fullmatch(r"[a-z]\w{0,47}", name)


@pytest.mark.parametrize(
    ("operators", "name"),
    [
        (("reshape", "transpose"), "reshape_transpose"),
        (("reshape", "transpose", "multiply"), "multiply"),
        (("strided_slice", "strided_slice", "strided_slice"), "strided_slice"),
        (("conv2d", "add", "add", "relu"), "conv2d_add_relu"),
        (("mean", *("subtract", "multiply") * 6), "mean_subtract_multiply_subtract_and_9_more"),
    ],
)
def test_kernel_names_say_what_is_computed(operators: tuple[str, ...], name: str) -> None:
    assert kernel_name(operators) == name
