from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

import targets
from optimizer.compile import CompileOptions, compile_in_memory
from optimizer.frontend.importer import import_model
from passes.recognize_integer_products import RecognizeIntegerProducts
from tests.frontend.comparison import theirs
from tests.passes.relax_modules import operators

Arrays = Mapping[str, np.ndarray]
HOST = targets.resolve_host()


def model_of(text: str, constants: Arrays) -> onnx.ModelProto:
    """Return a model of opset 21 from the text of its graph and its initializers."""
    header = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\n'
    model = parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    return model


def after(model: onnx.ModelProto, target: str = "x86-avx512") -> tuple[list[str], list[str | None], tvm.IRModule]:
    """Return the operators after the pass, and the refusal of each site."""
    outcome = RecognizeIntegerProducts(target=target).run(import_model(model).module)
    return operators(outcome.module), [site.refusal for site in outcome.sites], outcome.module


def products_of(module: tvm.IRModule) -> list[tuple[str, ...]]:
    """Return the types of the operands and the result of each product."""
    found = [
        binding.value
        for block in module["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, tvm.ir.Call)
    ]
    names = ("relax.matmul", *(f"relax.nn.conv{rank}d" for rank in (1, 2, 3)))
    calls = [call for call in found if isinstance(call.op, tvm.ir.Op) and call.op.name in names]
    return [tuple(str(each.ty.dtype.dtype) for each in (*call.args, call)) for call in calls]


def run_both(model: onnx.ModelProto, inputs: Arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
    ours = compile_in_memory(model, CompileOptions(HOST))(inputs)
    return list(ours.values()), list(theirs(model)(inputs).values())


def weights_of(
    shape: Sequence[int], dtype: str, axis: int | None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random codes, their scales (one per index of `axis`, or one), and their zero points."""
    rng, limits = np.random.default_rng([seed, *shape]), np.iinfo(dtype)
    codes = rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    parameters = () if axis is None else (shape[axis],)
    zeros = np.full(parameters, 0 if dtype == "int8" else 128, dtype)
    return codes, (rng.random(parameters) * 0.01 + 0.001).astype(np.float32), zeros


QDQ = """
g (float[{rows}, {depth}] x) => ({kind}[{rows}, {columns}] y) {{
  q = QuantizeLinear (x, sx, zx)
  d = DequantizeLinear (q, sx, zx)
  w = DequantizeLinear <axis = 1> (codes, sw, zw)
  p = MatMul (d, w)
  b = Add (p, bias)
  r = Relu (b)
  {last}
}}
"""


def qdq_product(
    rows: str, depth: int, columns: int, data: str, weights: str, *, per_column: bool, quantized: bool
) -> onnx.ModelProto:
    codes, scales, zeros = weights_of((depth, columns), weights, 1 if per_column else None)
    constants = {
        "sx": np.float32(0.03),
        "zx": np.array(101 if data == "uint8" else -7, data),
        "sy": np.float32(0.05 * depth**0.5),
        "zy": np.array(3, data),
        "codes": codes,
        "sw": scales,
        "zw": zeros,
        "bias": np.linspace(-1, 1, columns, dtype=np.float32),
    }
    last, kind = ("y = QuantizeLinear (r, sy, zy)", data) if quantized else ("y = Identity (r)", "float")
    return model_of(QDQ.format(rows=rows, depth=depth, columns=columns, kind=kind, last=last), constants)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 5, 17]),
    depth=st.sampled_from([1, 13, 64]),
    columns=st.sampled_from([1, 19, 48]),
    data=st.sampled_from(["uint8", "int8"]),
    weights=st.sampled_from(["uint8", "int8"]),
    per_column=st.booleans(),
    quantized=st.booleans(),
    symbolic=st.booleans(),
)
def test_quantized_products_are_those_of_onnxruntime(
    rows: int, depth: int, columns: int, data: str, weights: str, per_column: bool, quantized: bool, symbolic: bool
) -> None:
    model = qdq_product(
        "m" if symbolic else str(rows), depth, columns, data, weights, per_column=per_column, quantized=quantized
    )
    x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)
    (ours,), (reference,) = run_both(model, {"x": x})
    if quantized:
        assert np.abs(ours.astype(int) - reference.astype(int)).max() <= 1
    else:
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(reference).max()))


@pytest.mark.parametrize("data", ["uint8", "int8"])
@pytest.mark.parametrize(("target", "kind"), [("x86-avx512", "uint8"), ("x86-avx2", "int16"), ("arm64", "int8")])
def test_operands_are_of_the_types_that_the_target_multiplies(data: str, target: str, kind: str) -> None:
    model = qdq_product("4", 16, 8, data, "int8", per_column=True, quantized=True)
    names, refusals, module = after(model, target)
    assert (refusals, products_of(module)) == ([None], [(kind, "int8", "int32")])
    assert "relax.dequantize" not in names


def test_columns_beyond_int8_need_the_sums_of_rows() -> None:
    codes, scales, _ = weights_of((16, 8), "uint8", 1)
    zeros = np.array([0, 255, 128, 127, 1, 254, 7, 99], np.uint8)
    constants = {"sx": np.float32(0.1), "zx": np.uint8(9), "codes": codes, "sw": scales, "zw": zeros}
    model = model_of(
        """g (uint8[3, 16] q) => (float[3, 8] y) {
             d = DequantizeLinear (q, sx, zx)
             w = DequantizeLinear <axis = 1> (codes, sw, zw)
             y = MatMul (d, w)
           }""",
        constants,
    )
    names, refusals, module = after(model)
    assert (refusals, products_of(module), "relax.sum" in names) == ([None], [("uint8", "int8", "int32")], True)
    x = np.random.default_rng(0).integers(0, 256, (3, 16)).astype(np.uint8)
    (ours,), (reference,) = run_both(model, {"q": x})
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    depth=st.sampled_from([1, 7, 32]),
    columns=st.sampled_from([1, 11, 40]),
    data=st.sampled_from(["uint8", "int8"]),
    weights=st.sampled_from(["uint8", "int8"]),
    zeros=st.sampled_from(["none", "one", "column"]),
    dynamic=st.booleans(),
)
def test_integer_products_are_exact(
    depth: int, columns: int, data: str, weights: str, zeros: str, dynamic: bool
) -> None:
    codes, _, _ = weights_of((depth, columns), weights, None)
    rng, limits = np.random.default_rng([depth, columns]), np.iinfo(weights)
    shape = () if zeros == "one" else (columns,)
    zero = rng.integers(limits.min, limits.max + 1, shape).astype(weights)
    x_limits = np.iinfo(data)
    x = rng.integers(x_limits.min, x_limits.max + 1, (2, 3, depth)).astype(data)
    x_zero = np.array(x_limits.min + 77, data)
    constants = {"codes": codes, **({} if zeros == "none" else {"zw": zero}), **({} if dynamic else {"zx": x_zero})}
    declared = f", {data} zx" if dynamic else ""
    operands = "x, codes, zx" + (", zw" if zeros != "none" else "")
    model = model_of(
        f"g ({data}[2, 3, {depth}] x{declared}) => (int32[2, 3, {columns}] y) {{ y = MatMulInteger ({operands}) }}",
        constants,
    )
    inputs = {"x": x, **({"zx": x_zero} if dynamic else {})}
    (ours,) = compile_in_memory(model, CompileOptions(HOST))(inputs).values()
    own_zero = 0 if zeros == "none" else zero.astype(np.int64)
    want = (x.astype(np.int64) - int(x_zero)) @ (codes.astype(np.int64) - own_zero)
    np.testing.assert_array_equal(ours, want)


def test_zero_points_of_rows_are_taken_out_of_the_product() -> None:
    codes, _, _ = weights_of((12, 5), "int8", None)
    zeros = np.array([3, 200, 0, 77], np.uint8)
    model = model_of(
        "g (uint8[4, 12] x) => (int32[4, 5] y) { y = MatMulInteger (x, codes, zx) }", {"codes": codes, "zx": zeros}
    )
    _, refusals, module = after(model)
    assert (refusals, products_of(module)) == ([None], [("uint8", "int8", "int32")])
    x = np.random.default_rng(0).integers(0, 256, (4, 12)).astype(np.uint8)
    (ours,) = compile_in_memory(model, CompileOptions(HOST))({"x": x}).values()
    np.testing.assert_array_equal(ours, (x.astype(np.int64) - zeros[:, None]) @ codes.astype(np.int64))


def test_dynamically_quantized_product_is_that_of_onnxruntime() -> None:
    codes, scales, zeros = weights_of((40, 24), "uint8", 1)
    constants = {"codes": codes, "s": scales, "z": zeros, "b": np.ones(24, np.float32)}
    model = model_of(
        """g (float[n, 40] x) => (float[n, 24] y) {
             y = com.microsoft.DynamicQuantizeMatMul (x, codes, s, z, b)
           }""",
        constants,
    )
    _, refusals, module = after(model)
    assert (refusals, products_of(module)) == ([None], [("uint8", "int8", "int32")])
    x = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    (ours,), (reference,) = run_both(model, {"x": x})
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


def test_given_numbers_on_the_borders_of_codes_go_to_the_even_one() -> None:
    constants = {"sx": np.float32(2 / 255), "zx": np.uint8(128), "codes": np.eye(8, dtype=np.int8)}
    constants |= {"sw": np.float32(1), "zw": np.int8(0), "so": np.float32(2 / 255)}
    model = model_of(
        """g (float[n, 8] x) => (uint8[n, 8] y) {
             q = QuantizeLinear (x, sx, zx)
             d = DequantizeLinear (q, sx, zx)
             w = DequantizeLinear (codes, sw, zw)
             p = MatMul (d, w)
             y = QuantizeLinear (p, so, zx)
           }""",
        constants,
    )
    x = (np.arange(256, dtype=np.float32).reshape(32, 8) - np.float32(127.5)) * constants["sx"]
    (ours,), (reference,) = run_both(model, {"x": x.astype(np.float32)})
    np.testing.assert_array_equal(ours, reference)


CONVOLUTION = """
g (float[1, {channels}, 9, 9] x) => (uint8[1, 8, h, w] y) {{
  q = QuantizeLinear (x, sx, zx)
  d = DequantizeLinear (q, sx, zx)
  w = DequantizeLinear <axis = 0> (codes, sw, zw)
  c = Conv <pads = [1, 1, 1, 1], strides = [2, 1], group = {groups}> (d, w, bias)
  y = QuantizeLinear (c, sy, zy)
}}
"""


@pytest.mark.parametrize("data", ["uint8", "int8"])
@pytest.mark.parametrize(("zero", "groups"), [(0, 1), (37, 1), (37, 2)])
def test_padded_convolution_is_that_of_onnxruntime(data: str, zero: int, groups: int) -> None:
    codes, scales, zeros = weights_of((8, 4, 3, 3), "int8", 0)
    constants = {
        "sx": np.float32(0.02),
        "zx": np.array(zero, data),
        "sy": np.float32(0.4),
        "zy": np.uint8(90),
        "codes": codes,
        "sw": scales,
        "zw": zeros,
        "bias": np.linspace(-1, 1, 8, dtype=np.float32),
    }
    model = model_of(CONVOLUTION.format(channels=4 * groups, groups=groups), constants)
    names, refusals, module = after(model)
    assert (refusals, products_of(module)) == ([None], [("uint8", "int8", "int32")])
    assert ("relax.nn.pad" in names) == (zero != 0 or data == "int8")
    x = np.random.default_rng(0).standard_normal((1, 4 * groups, 9, 9)).astype(np.float32)
    (ours,), (reference,) = run_both(model, {"x": x})
    assert np.abs(ours.astype(int) - reference.astype(int)).max() <= 1


def test_moves_between_dequantization_and_product_move_codes() -> None:
    codes, scales, zeros = weights_of((12, 6), "int8", 1)
    constants = {
        "sx": np.float32(0.1),
        "zx": np.uint8(3),
        "codes": codes,
        "sw": scales,
        "zw": zeros,
        "shape": np.array([2, 12]),
    }
    model = model_of(
        """g (uint8[3, 2, 4] x) => (float[2, 6] y) {
             d = DequantizeLinear (x, sx, zx)
             t = Transpose <perm = [1, 0, 2]> (d)
             f = Reshape (t, shape)
             w = DequantizeLinear <axis = 1> (codes, sw, zw)
             y = MatMul (f, w)
           }""",
        constants,
    )
    names, refusals, module = after(model)
    assert (refusals, products_of(module)) == ([None], [("uint8", "int8", "int32")])
    assert "relax.dequantize" not in names
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 4)).astype(np.uint8)
    (ours,), (reference,) = run_both(model, {"x": x})
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_requantized_maximum_stays_in_codes() -> None:
    codes, scales, zeros = weights_of((4, 2, 1, 1), "int8", 0)
    constants = {"s": np.float32(0.1), "z": np.uint8(3), "codes": codes, "sw": scales, "zw": zeros}
    model = model_of(
        """g (uint8[1, 2, 8, 8] x) => (float[1, 4, 4, 4] y) {
             d = DequantizeLinear (x, s, z)
             m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
             q = QuantizeLinear (m, s, z)
             e = DequantizeLinear (q, s, z)
             w = DequantizeLinear <axis = 0> (codes, sw, zw)
             y = Conv (e, w)
           }""",
        constants,
    )
    names, refusals, _ = after(model)
    assert refusals == [None, None]
    assert not {"relax.round", "relax.quantize", "relax.dequantize"} & set(names)
    x = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8)).astype(np.uint8)
    (ours,), (reference,) = run_both(model, {"x": x})
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scale_axis", "weights", "target", "reason"),
    [
        (0, "codes", "x86-avx512", "the scales of the weights differ along what is summed"),
        (1, "other", "x86-avx512", "the weights are no constant integers"),
        (1, "codes", "cuda", "the target has no dot product of bytes"),
    ],
)
def test_what_stays_as_it_is_has_a_reason(scale_axis: int, weights: str, target: str, reason: str) -> None:
    codes, scales, zeros = weights_of((6, 6), "int8", 1)
    constants = {"s": np.float32(0.1), "z": np.uint8(3), "codes": codes, "sw": scales, "zw": zeros}
    model = model_of(
        f"""g (uint8[2, 6] x, float[6, 6] other) => (float[2, 6] y) {{
             d = DequantizeLinear (x, s, z)
             w = DequantizeLinear <axis = {scale_axis}> (codes, sw, zw)
             y = MatMul (d, {"w" if weights == "codes" else weights})
           }}""",
        constants,
    )
    _, refusals, module = after(model, target)
    assert (refusals, products_of(module)) == ([reason], [("float32", "float32", "float32")])
