"""Models of 16-bit floats that are to compute in fp32."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import targets
from optimizer.compile import CompileOptions, compile_in_memory
from optimizer.frontend.widening import widened

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
    g (bool c, KIND[n, 8] x, float[n, 4] z) => (KIND[n, 4] y, KIND[n, 4] p, float[n, 4] s) {
      p = MatMul(x, w)
      e = Exp(p)
      half = Cast <to = NUMBER> (z)
      y = If (c) <
        then_branch = t () => (KIND[n, 4] a) { a = Add(e, half) },
        else_branch = f () => (KIND[n, 4] b) { b = Sub(p, half) }
      >
      s = Cast <to = 1> (e)
    }"""
KINDS = {"float16": ("10", np.float16), "bfloat16": ("16", None)}


def model(kind: str) -> tuple[onnx.ModelProto, np.ndarray]:
    parsed = parser.parse_model(TEXT.replace("KIND", kind).replace("NUMBER", KINDS[kind][0]))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(int(KINDS[kind][0]))
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(dtype)
    parsed.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return parsed, weight


@pytest.mark.parametrize("kind", KINDS)
def test_only_inputs_and_outputs_keep_their_type(kind: str) -> None:
    given = model(kind)[0]
    wide = widened(given)
    onnx.checker.check_model(wide, full_check=True)
    assert [v.type for v in (*wide.graph.input, *wide.graph.output)] == [
        v.type for v in (*given.graph.input, *given.graph.output)
    ]
    assert all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in wide.graph.initializer)
    narrowing = [node for node in wide.graph.node if node.op_type == "Cast" and node.attribute[0].i != 1]
    assert [node.output[0] for node in narrowing] == ["y", "p"]
    assert given == model(kind)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_between_narrow_ends_is_fp32(kind: str) -> None:
    given, weight = model(kind)
    run = compile_in_memory(given, CompileOptions(targets.resolve_host(), precision="fp32"))
    rng = np.random.default_rng(1)
    x, z = rng.standard_normal((3, 8)).astype(weight.dtype), rng.standard_normal((3, 4)).astype(np.float32)
    outputs = run({"c": np.array(True), "x": x, "z": z})
    product = x.astype(np.float32) @ weight.astype(np.float32)
    np.testing.assert_allclose(outputs["s"], np.exp(product), rtol=1e-5)
    expected = (np.exp(product) + z).astype(weight.dtype).astype(np.float32)
    np.testing.assert_allclose(outputs["y"].astype(np.float32), expected, rtol=2.0**-7)  # a unit in bf16's last place
    assert outputs["y"].dtype == outputs["p"].dtype == weight.dtype


def test_a_model_of_fp32_stays_as_it_is() -> None:
    plain = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Exp(x) }'
    )
    assert widened(plain) == plain
