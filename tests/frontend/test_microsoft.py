"""The other operators of com.microsoft against onnxruntime on small random inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from tests.frontend.comparison import assert_same, node_model, ours

RANDOM = np.random.default_rng(3)
ABSENT = np.zeros(0)


def draw(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RANDOM.normal(size=shape).astype(dtype)


def unsigned(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape).astype(np.uint8)


def signed(*shape: int) -> np.ndarray:
    return RANDOM.integers(-128, 128, shape).astype(np.int8)


def scale(value: float = 0.02) -> np.ndarray:
    return np.array(value, np.float32)


def zero(value: int, dtype: str = "uint8") -> np.ndarray:
    return np.array(value, dtype)


class TestMatMulNBits:
    """Weights of 2, 4 and 8 bits, N and K that fill no block, zero points packed, as floats, or by default."""

    def inputs(self, columns: int, inner: int, block: int, bits: int, dtype: str = "float32") -> dict[str, np.ndarray]:
        blocks = -(-inner // block)
        return {
            "data": draw(2, 3, inner, dtype=dtype),
            "weights": unsigned(columns, blocks, block * bits // 8),
            "scales": (draw(columns, blocks) * 0.1).astype(dtype),
        }

    def check(self, inputs: dict[str, np.ndarray], block: int, bits: int, *, constant: bool = True) -> None:
        fixed = [name for name in inputs if name != "data" and not name.startswith("_")] if constant else []
        sizes = {"N": inputs["weights"].shape[0], "K": inputs["data"].shape[2], "bits": bits, "block_size": block}
        assert_same("MatMulNBits", inputs, ["output"], constants=fixed, **sizes)

    @pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, 32), (8, 32)])
    def test_packed_zero_points(self, bits: int, block: int):
        inputs = self.inputs(7, 80, block, bits)
        blocks = inputs["scales"].shape[1]
        self.check({**inputs, "zero_points": unsigned(7, -(-blocks * bits // 8))}, block, bits)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_default_zero_points(self, bits: int):
        self.check(self.inputs(8, 64, 32, bits), 32, bits)

    def test_zero_points_as_floats_and_a_bias(self):
        inputs = {**self.inputs(7, 80, 32, 4), "zero_points": draw(7, 3) * 3, "_groups": ABSENT, "bias": draw(7)}
        self.check(inputs, 32, 4)

    def test_groups_by_index(self):
        groups = RANDOM.integers(0, 3, 80).astype(np.int32)
        self.check({**self.inputs(7, 80, 32, 4), "_zero_points": ABSENT, "groups": groups}, 32, 4)

    def test_packed_zero_points_with_groups_are_refused(self):
        inputs = {**self.inputs(7, 64, 32, 4), "zero_points": unsigned(7, 1), "groups": np.zeros(64, np.int32)}
        model = node_model("MatMulNBits", inputs, ["output"], N=7, K=64, bits=4, block_size=32)
        with pytest.raises(UnsupportedModelError, match="g_idx"):
            import_model(model)

    def test_weights_that_are_no_constants(self):
        self.check({**self.inputs(7, 80, 32, 4), "zero_points": unsigned(7, 2)}, 32, 4, constant=False)

    @settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    @given(
        # onnxruntime computes no product of 8 bits with zero points in floats.
        st.sampled_from([(4, "none"), (4, "packed"), (4, "floats"), (8, "none"), (8, "packed")]),
        st.sampled_from([16, 32, 64, 128, 256]),
        st.sampled_from([1, 7, 13, 32]),
        st.integers(1, 300),
        st.booleans(),
    )
    def test_any_sizes(self, form: tuple[int, str], block: int, columns: int, inner: int, bias: bool):
        bits, zero_points = form
        inputs = self.inputs(columns, inner, block, bits)
        blocks = inputs["scales"].shape[1]
        if zero_points == "packed":
            inputs["zero_points"] = unsigned(columns, -(-blocks * bits // 8))
        elif zero_points == "floats":
            inputs["zero_points"] = draw(columns, blocks) * 3
        if bias:
            absent = {} if zero_points != "none" else {"_zero_points": ABSENT}
            inputs |= {**absent, "_groups": ABSENT, "bias": draw(columns)}
        self.check(inputs, block, bits)

    def test_half_precision(self):
        self.check(self.inputs(8, 64, 32, 4, "float16"), 32, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_gather_block_quantized_of_bytes(bits: int, with_zero_points: bool):
    inputs = {"data": unsigned(10, 64 * bits // 8), "indices": np.array([[1, 2, 9], [0, -1, 3]]), "scales": draw(10, 4)}
    if with_zero_points:
        inputs["zero_points"] = unsigned(10, 4 * bits // 8)
    constants = [name for name in inputs if name != "indices"]
    axes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16, "bits": bits}
    assert_same("GatherBlockQuantized", inputs, ["output"], constants=constants, **axes)


@pytest.mark.parametrize(("gather_axis", "quantize_axis"), [(0, 1), (1, 0)])
def test_gather_block_quantized_of_int4(gather_axis: int, quantize_axis: int):
    shape, blocks = ((10, 48), (10, 3)) if quantize_axis else ((48, 10), (3, 10))
    data, zero_points = (RANDOM.integers(-8, 8, size).astype(ml_dtypes.int4) for size in (shape, blocks))
    inputs = {"data": data, "indices": np.array([[3, 1]]), "scales": draw(*blocks), "zero_points": zero_points}
    axes = {"gather_axis": gather_axis, "quantize_axis": quantize_axis, "block_size": 16}
    assert_same("GatherBlockQuantized", inputs, ["output"], constants=["data", "scales", "zero_points"], **axes)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(("int4", 4), [0, 1, 2], 16, (9, 9), False, True, "float32")
@given(
    form=st.sampled_from([("uint8", 2), ("uint8", 4), ("uint8", 8), ("int4", 4), ("uint4", 4)]),
    axes=st.permutations(range(3)),
    block=st.sampled_from([16, 32, 64, 128]),
    sizes=st.tuples(st.integers(1, 13), st.integers(1, 40)),
    is_symmetric=st.booleans(),
    is_constant=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_gather_block_quantized_of_any_form_is_a_row_of_what_numpy_dequantizes(
    form: tuple[str, int],
    axes: list[int],
    block: int,
    sizes: tuple[int, int],
    is_symmetric: bool,
    is_constant: bool,
    dtype: str,
):
    kind, bits = form
    gather, quantize, _ = axes if kind != "uint8" else (0, 2, 1)  # bytes hold consecutive integers of a block
    shape = [2, 2, 2]
    shape[gather], shape[quantize] = sizes[0], 4 * sizes[1]
    per_block = [-(-size // block) if axis == quantize else size for axis, size in enumerate(shape)]
    lowest = -8 if kind == "int4" else 0
    values, zeros = (RANDOM.integers(lowest, lowest + (1 << bits), size) for size in (shape, per_block))
    if is_symmetric:
        zeros = np.full(per_block, 1 << (bits - 1) if kind == "uint8" else 0)
    scales = draw(*per_block, dtype=dtype)
    wide_scales, wide_zeros = (
        np.repeat(each, block, quantize).take(range(shape[quantize]), quantize) for each in (scales, zeros)
    )
    indices = RANDOM.integers(-shape[gather], shape[gather], (2, 3))
    expected = ((values - wide_zeros).astype(dtype) * wide_scales).take(indices, gather)

    def stored(integers: np.ndarray) -> np.ndarray:
        return packed(integers, bits) if kind == "uint8" else integers.astype(getattr(ml_dtypes, kind))

    inputs = {"data": stored(values), "indices": indices, "scales": scales}
    if not is_symmetric:
        inputs["zero_points"] = stored(zeros)
    constants = [name for name in inputs if name != "indices" and (is_constant or name != "scales")]
    axes_of = {"gather_axis": gather, "quantize_axis": quantize, "block_size": block, "bits": bits}
    model = node_model("GatherBlockQuantized", inputs, ["output"], constants=constants, **axes_of)
    given = {value.name: inputs[value.name] for value in model.graph.input}
    np.testing.assert_array_equal(ours(model)(given)["output"], expected)


def packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Return the bytes of unsigned integers along the last axis, low bits first."""
    per_byte = 8 // bits
    padding = -integers.shape[-1] % per_byte
    padded = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, padding)])
    apart = padded.reshape(*padded.shape[:-1], -1, per_byte) << (np.arange(per_byte) * bits)
    return apart.sum(-1).astype(np.uint8)


ROWS, BIAS = draw(2, 3, 8), draw(8)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("Gelu", {"x": ROWS}, {}),
        ("BiasGelu", {"x": ROWS, "bias": BIAS}, {}),
        ("FastGelu", {"x": ROWS}, {}),
        ("FastGelu", {"x": ROWS, "bias": BIAS}, {}),
        ("FastGelu", {"x": ROWS.astype(np.float16)}, {}),
        ("QuickGelu", {"x": ROWS}, {"alpha": 1.3}),
        ("QuickGelu", {"x": ROWS.astype(np.float16)}, {}),
    ],
)
def test_activations(operator: str, inputs: dict[str, np.ndarray], attributes: dict[str, float]):
    assert_same(operator, inputs, ["output"], **attributes)


def test_bias_split_gelu_is_the_first_half_times_gelu_of_the_second():
    inputs = {"x": ROWS, "bias": BIAS}
    first, second = np.split(ROWS + BIAS, 2, axis=-1)
    gelu = ours(node_model("Gelu", {"x": second}, ["output"]))({"x": second})["output"]
    result = ours(node_model("BiasSplitGelu", inputs, ["output"]))(inputs)["output"]
    np.testing.assert_allclose(result, first * gelu, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("skip_shape", [(2, 3, 8), (1, 3, 8), (3, 8)])
def test_skip_layer_normalization(dtype: str, skip_shape: tuple[int, ...]):
    inputs = {"x": ROWS, "skip": draw(*skip_shape), "gamma": draw(8), "beta": draw(8), "bias": BIAS}
    inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    assert_same("SkipLayerNormalization", inputs, ["output", "", "", "sum"])


def test_skip_layer_normalization_gives_mean_and_deviation():
    inputs = {"x": ROWS, "skip": draw(2, 3, 8), "gamma": draw(8)}
    assert_same("SkipLayerNormalization", inputs, ["output", "mean", "inverse_deviation"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_skip_simplified_layer_normalization(dtype: str):
    inputs = {"x": ROWS, "skip": draw(2, 3, 8), "gamma": draw(8), "bias": BIAS}
    inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    assert_same("SkipSimplifiedLayerNormalization", inputs, ["output", "", "", "sum"])


def test_simplified_layer_normalization_of_the_default_domain():
    inputs = {"x": ROWS, "gamma": draw(8)}
    assert_same("SimplifiedLayerNormalization", inputs, ["output"], domain="", axis=-1, epsilon=1e-5)


@pytest.mark.parametrize("case", ["plain", "mask", "positions", "no_segments"])
def test_embed_layer_normalization(case: str):
    inputs = {
        "words": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
        "segments": np.array([[0, 0, 1], [1, 0, 1]], np.int32),
        "word_table": draw(6, 8),
        "position_table": draw(5, 8),
        "segment_table": draw(2, 8),
        "gamma": draw(8),
        "beta": draw(8),
    }
    outputs = ["output", "mask_index"]
    if case == "mask":
        inputs["mask"] = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    if case == "positions":
        inputs |= {"_mask": ABSENT, "positions": np.array([[2, 3, 4], [1, 0, 1]], np.int32)}
        outputs.append("sum")
    if case == "no_segments":
        inputs = {f"_{name}" if name.startswith("segment") else name: array for name, array in inputs.items()}
    assert_same("EmbedLayerNormalization", inputs, outputs)


@pytest.mark.parametrize(
    ("left", "right", "attributes"),
    [
        ((2, 3, 5, 4), (2, 3, 4, 6), {"alpha": 0.5}),
        ((2, 3, 4, 5), (2, 3, 6, 4), {"transA": 1, "transB": 1}),
        ((5, 2, 3, 4), (2, 3, 4, 6), {"transBatchA": 1}),
        ((2, 3, 5, 4), (6, 2, 3, 4), {"transBatchB": 1, "transB": 1}),
        ((4, 2, 3, 5), (2, 3, 4, 6), {"transBatchA": 1, "transA": 1}),
    ],
)
def test_fused_matmul(left: tuple[int, ...], right: tuple[int, ...], attributes: dict[str, float]):
    assert_same("FusedMatMul", {"a": draw(*left), "b": draw(*right)}, ["output"], **attributes)


def test_fused_gemm():
    attributes = {"transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "LeakyRelu", "activation_alpha": 0.2}
    assert_same("FusedGemm", {"a": draw(3, 4), "b": draw(5, 4), "c": draw(5)}, ["output"], **attributes)


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [("Relu", []), ("LeakyRelu", [0.3]), ("Clip", [-1.0, 1.0]), ("HardSigmoid", [0.2, 0.4]), ("Tanh", [])],
)
def test_fused_conv(activation: str, parameters: list[float]):
    inputs = {"x": draw(1, 3, 6, 6), "weights": draw(4, 3, 3, 3), "bias": draw(4), "sum": draw(1, 4, 6, 6)}
    given = {"activation_params": parameters} if parameters else {}
    assert_same("FusedConv", inputs, ["output"], pads=[1, 1, 1, 1], activation=activation, **given)


@pytest.mark.parametrize("per_column", [False, True])
def test_integer_products_in_floats(per_column: bool):
    weights = {
        "b": unsigned(8, 4) if per_column else signed(8, 4),
        "b_scale": np.abs(draw(4)) if per_column else scale(0.03),
        "b_zero": unsigned(4) if per_column else zero(3, "int8"),
    }
    dynamic = {"a": draw(2, 3, 8), **weights, "bias": draw(4)}
    assert_same("DynamicQuantizeMatMul", dynamic, ["output"], constants=list(weights))
    quantized = {"a": unsigned(2, 3, 8), "b": weights["b"], "a_scale": scale(), "b_scale": weights["b_scale"]}
    quantized |= {"a_zero": zero(100), "b_zero": weights["b_zero"], "bias": draw(4)}
    assert_same("MatMulIntegerToFloat", quantized, ["output"], constants=list(weights))


def test_products_of_16_bit_integers():
    a, b = (RANDOM.integers(-999, 999, shape).astype(np.int16) for shape in ((3, 4), (4, 5)))
    assert_same("MatMulInteger16", {"a": a, "b": b}, ["output"])


A8 = {"a": unsigned(1, 2, 6, 6), "a_scale": scale(), "a_zero": zero(120)}
B8 = {"b": unsigned(6), "b_scale": scale(0.03), "b_zero": zero(99)}
Y8 = {"y_scale": scale(0.05), "y_zero": zero(128)}
POOL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("QLinearAdd", {**A8, **B8, **Y8}, {}),
        ("QLinearMul", {**A8, **B8, **Y8}, {}),
        ("QLinearSigmoid", {**A8, "y_scale": scale(1 / 256), "y_zero": zero(0)}, {}),
        ("QLinearLeakyRelu", {**A8, **Y8}, {"alpha": 0.2}),
        (
            "QLinearConcat",
            {**Y8, **A8, "b": unsigned(1, 5, 6, 6), "b_scale": scale(0.04), "b_zero": zero(9)},
            {"axis": 1},
        ),
        ("QLinearWhere", {"c": RANDOM.integers(0, 2, (6, 6)).astype(bool), **A8, **B8, **Y8}, {}),
        ("QLinearAveragePool", {**A8, **Y8}, {**POOL, "strides": [2, 2]}),
        ("QLinearAveragePool", {**A8, **Y8}, {**POOL, "count_include_pad": 1}),
        ("QLinearGlobalAveragePool", {**A8, **Y8}, {}),
        ("QLinearGlobalAveragePool", {**A8, **Y8}, {"channels_last": 1}),
        ("QuantizeLinear", {"x": draw(2, 3), "scale": np.abs(draw(3)), "zero": unsigned(3)}, {"axis": 1}),
        (
            "DequantizeLinear",
            {"x": unsigned(2, 3).astype(np.uint16), "scale": scale(), "zero": zero(333, "uint16")},
            {},
        ),
        ("NhwcMaxPool", {"x": unsigned(1, 6, 6, 2)}, {**POOL, "strides": [2, 2]}),
        ("Trilu", {"x": draw(3, 4)}, {"upper": 0}),
    ],
)
def test_quantized_operators(operator: str, inputs: dict[str, np.ndarray], attributes: dict[str, object]):
    assert_same(operator, inputs, ["output"], **attributes)


@pytest.mark.parametrize("with_output_scale", [False, True])
def test_quantized_gemm(with_output_scale: bool):
    inputs = {"a": unsigned(3, 4), "a_scale": scale(), "a_zero": zero(120)}
    inputs |= {"b": unsigned(5, 4), "b_scale": np.abs(draw(5)), "b_zero": unsigned(5)}
    inputs["c"] = RANDOM.integers(-99, 99, 5).astype(np.int32)
    if with_output_scale:
        inputs |= {"y_scale": scale(5.0), "y_zero": zero(128)}
    assert_same("QGemm", inputs, ["output"], constants=["b", "b_scale", "b_zero"], transB=1, alpha=0.7)
