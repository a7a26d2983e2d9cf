from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tvm import relax

import targets
from optimizer.frontend.importer import import_model
from optimizer.lowering import lower
from optimizer.weights import lift_weights
from passes.pack_quantized_weights import PackQuantizedWeights
from schedules.weight_layout import layout_of
from tests.frontend.comparison import theirs
from tests.passes.relax_modules import constants, run

RANDOM = np.random.default_rng(0)
OUTPUTS, INPUTS = 24, 80


def _model(bits: int, block: int, *, zero_points: bool = True, groups: bool = False) -> tuple[ModelProto, np.ndarray]:
    """A MatMulNBits with K that fills no block, and its integers [N, K]."""
    blocks = -(-INPUTS // block)
    weights = {
        "weights": RANDOM.integers(0, 256, (OUTPUTS, blocks, block * bits // 8), dtype=np.uint8),
        "scales": (RANDOM.random(OUTPUTS * blocks) * 0.01 + 0.001).astype(np.float32),
    }
    inputs = ["x", "weights", "scales", ""]
    if zero_points:
        weights["zero_points"] = RANDOM.integers(0, 256, OUTPUTS * -(-blocks * bits // 8), dtype=np.uint8)
        inputs[3] = "zero_points"
    if groups:
        weights["groups"] = RANDOM.integers(0, blocks, INPUTS).astype(np.int32)
        inputs.append("groups")
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        name="packed",
        domain="com.microsoft",
        N=OUTPUTS,
        K=INPUTS,
        bits=bits,
        block_size=block,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, OUTPUTS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    packed = weights["weights"].reshape(OUTPUTS, -1)
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(OUTPUTS, -1)
    return helper.make_model(graph, opset_imports=domains, ir_version=10), codes


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (4, 128)])
def test_integers_are_taken_bit_for_bit(bits: int, block: int, zero_points: bool) -> None:
    model, codes = _model(bits, block, zero_points=zero_points)
    module = import_model(model).module
    item = PackQuantizedWeights()
    outcome = item.run(module)
    assert [(site.refusal, site.nodes) for site in outcome.sites] == [(None, ("packed",))]
    layout = layout_of(item.use.target, bits)
    packed = next(array for array in constants(outcome.module) if array.dtype == np.uint8 and array.shape[2] >= 64)
    assert np.array_equal(layout.unpack(packed, OUTPUTS)[:, :INPUTS], codes[:, :INPUTS])
    # The reference of the same pass computes with the very weights that onnxruntime has.
    x = RANDOM.standard_normal((3, INPUTS)).astype(np.float32)
    exact = run(module, x)
    reference = run(PackQuantizedWeights(activations="reference").run(module).module, x)
    np.testing.assert_allclose(reference, exact, rtol=1e-5, atol=1e-5)
    rounded = run(outcome.module, x)
    assert np.abs(rounded - exact).max() < 0.02 * np.abs(exact).max()


def test_groups_by_index_are_refused_with_the_reason() -> None:
    model, _ = _model(4, 32, zero_points=False, groups=True)
    outcome = PackQuantizedWeights().run(import_model(model).module)
    reason = "its scales change every 1 elements of K, no multiple of 16"
    assert [(site.refusal, site.nodes) for site in outcome.sites] == [(reason, ("packed",))]


def test_a_table_tied_to_a_product_becomes_the_same_constants() -> None:
    model, codes = _model(4, 16, zero_points=False)
    table = model.graph.initializer[0]
    flat = numpy_helper.to_array(table).reshape(OUTPUTS, -1)
    model.graph.initializer.append(numpy_helper.from_array(flat, "table"))
    model.graph.initializer.append(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[1]).reshape(OUTPUTS, -1), "table_scales")
    )
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("rows", TensorProto.INT64, [3]))
    gather = helper.make_node(
        "GatherBlockQuantized",
        ["table", "rows", "table_scales"],
        ["x"],
        domain="com.microsoft",
        bits=4,
        block_size=16,
        gather_axis=0,
        quantize_axis=1,
    )
    model.graph.node.insert(0, gather)
    module = import_model(model).module
    outcome = PackQuantizedWeights().run(module)
    assert [site.refusal for site in outcome.sites] == [None, None]
    lifted = lift_weights(lower(outcome.module, targets.get("host")).module)
    packed = [weight.numpy() for weight in lifted.weights if str(weight.dtype) == "uint8"]
    assert len(packed) == 1
    layout = layout_of(targets.get("host"), 4)
    assert np.array_equal(layout.unpack(packed[0], OUTPUTS)[:, :INPUTS], codes[:, :INPUTS])
    rows = np.array([0, -1, OUTPUTS - 1])
    reference = run(PackQuantizedWeights(activations="reference").run(module).module, rows)
    np.testing.assert_allclose(reference, run(module, rows), rtol=1e-5, atol=1e-5)


def test_a_product_and_a_gathering_under_another_name_are_one_site() -> None:
    x, rows = relax.Var("x", relax.TensorType((3, 64), "float32")), relax.Var("rows", relax.TensorType((2,), "int64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, rows]):
        with builder.dataflow():
            codes = builder.emit(relax.op.astype(relax.const(np.ones((64, 64), np.int8)), "float32"))
            weights = builder.emit(relax.op.multiply(codes, relax.const(0.5)))
            values = relax.op.matmul(x, weights), relax.op.take(weights, rows, axis=0)
            outputs = [builder.emit_output(builder.emit(builder.emit(value))) for value in values]
        builder.emit_func_output(relax.Tuple(outputs))
    outcome = PackQuantizedWeights(activations="reference").run(builder.get())
    assert [site.refusal for site in outcome.sites] == [None, None]


_INTEGERS = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


def _dequantized(dtype: str, axis: int | None, block: int, *, zero_points: bool, gemm: bool) -> ModelProto:
    """DequantizeLinear of a weight [K, N] (of Gemm [N, K]) per tensor, along `axis` or in blocks of it, and a product.

    `axis` counts as if the weight were [K, N].
    """
    low = 0 if dtype.startswith("u") else -8 if dtype == "int4" else -128
    high = low + (16 if dtype.endswith("4") else 256)
    shape = [INPUTS, OUTPUTS]
    parameters = [] if axis is None else [shape[axis]]
    if block and axis is not None:
        parameters = [-(-extent // block) if place == axis else extent for place, extent in enumerate(shape)]
    turn = (lambda array: array.T) if gemm else (lambda array: array)
    weights = {
        "weights": turn(RANDOM.integers(low, high, shape)).astype(_INTEGERS[dtype]),
        "scales": turn(np.asarray(RANDOM.random(parameters) * 0.01 + 0.001, np.float32)),
    }
    if zero_points:
        weights["zero_points"] = turn(np.asarray(RANDOM.integers(low, high, parameters))).astype(_INTEGERS[dtype])
    attributes = {} if axis is None else {"axis": 1 - axis if gemm else axis}
    if block:
        attributes["block_size"] = block
    nodes = [
        helper.make_node("DequantizeLinear", list(weights), ["w"], **attributes),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        if gemm
        else helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, OUTPUTS])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("gemm", [False, True], ids=["matmul", "gemm"])
@pytest.mark.parametrize(("axis", "block"), [(0, 16), (0, 32), (1, 0), (None, 0)])
@pytest.mark.parametrize("dtype", _INTEGERS)
def test_integers_of_dequantize_linear_stay_integers(
    dtype: str, axis: int | None, block: int, *, gemm: bool, zero_points: bool
) -> None:
    model = _dequantized(dtype, axis, block, zero_points=zero_points, gemm=gemm)
    module = import_model(model).module
    item = PackQuantizedWeights()
    outcome = item.run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    integers = numpy_helper.to_array(model.graph.initializer[0]).astype(np.int16)
    bits = 4 if dtype.endswith("4") else 8
    shift = 0 if dtype.startswith("u") else 1 << (bits - 1)
    packed = next(array for array in constants(outcome.module) if array.dtype == np.uint8 and array.shape[2] >= 64)
    codes = layout_of(item.use.target, bits).unpack(packed, OUTPUTS)[:, :INPUTS]
    assert np.array_equal(codes, (integers if gemm else integers.T) + shift)
    x = RANDOM.standard_normal((3, INPUTS)).astype(np.float32)
    reference = run(PackQuantizedWeights(activations="reference").run(module).module, x)
    np.testing.assert_allclose(reference, theirs(model)({"x": x})["y"], rtol=1e-5, atol=1e-5)


def test_blocks_of_no_multiple_of_16_are_refused_with_the_reason() -> None:
    model = _dequantized("int4", 0, 40, zero_points=False, gemm=False)
    outcome = PackQuantizedWeights().run(import_model(model).module)
    assert [site.refusal for site in outcome.sites] == ["its scales change every 40 elements of K, no multiple of 16"]
