"""Inputs made for a model are ones that it accepts, and the same each time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.parser import parse_model

from optimizer.certificate import make_inputs
from optimizer.certificate.graph_inputs import completed, graph_inputs, settings
from optimizer.certificate.index_bounds import index_bounds
from optimizer.errors import CertificateError
from tests.models.catalog import MODELS, ExportedModel


def model(signature: str, body: str, *initializers: onnx.TensorProto, domains: str = "") -> onnx.ModelProto:
    """Parse a model in ONNX's text form."""
    parsed = parse_model(
        f'<ir_version: 10, opset_import: ["" : 21{domains}]> g ({signature}) => (float y) {{ {body} }}'
    )
    parsed.graph.initializer.extend(initializers)
    return parsed


def table(rows: int, name: str = "table") -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros((rows, 4), np.float32), name)


def test_equal_seeds_give_equal_inputs() -> None:
    subject = model("float[n, 3] x, int64[n] i", "g = Gather(table, i) y = Add(x, x)", table(9))
    first, second, other = (make_inputs(subject, seed) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert not np.array_equal(first["x"], other["x"])


@pytest.mark.parametrize(
    ("body", "bound"),
    [
        ("y = Gather(table, i)", 7),
        ("y = Gather<axis = 1>(table, i)", 4),
        ("j = Cast<to = 6>(i) k = Reshape(j, s) y = Gather(table, k)", 7),
        ("j = Add(i, i) y = Gather(table, j)", 3),
        ("y = GatherElements<axis = -1>(table, i)", 4),
        ("y = GatherND(table, i)", 4),
        ("t = Transpose<perm = [1, 0]>(table) y = Gather(t, i)", 4),
        ("c = Gather(table, i) d = Gather<axis = 1>(table, i) y = Add(c, d)", 4),
        ("j = Reshape(i, s) y = RoiAlign(table, table, j)", 7),
        ("j = Cast<to = 6>(i) y = LSTM<hidden_size = 2>(table, table, table, table, j)", 7),
        ("y = ReverseSequence<time_axis = 1, batch_axis = 0>(table, i)", 4),
    ],
)
def test_integers_stay_within_what_they_index(body: str, bound: int) -> None:
    subject = model("int64[rows, 2] i, int64[2] s", body, table(7))
    assert index_bounds(subject)["i"] == bound
    values = make_inputs(subject, 0, {"rows": 400})["i"]
    assert values.min() >= 0
    assert values.max() == bound - 1


def test_indices_used_in_a_subgraph_are_bounded() -> None:
    body = (
        "y = If (c) <then_branch = t () => (float z) { z = Gather(table, i) },"
        " else_branch = e () => (float w) { w = Identity(table) }>"
    )
    assert index_bounds(model("bool c, int64[3] i", body, table(5)))["i"] == 5


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "BOOL", "INT8", "UINT8", "INT4", "UINT4"])
def test_each_element_type_gets_its_dtype(kind: str) -> None:
    info = onnx.helper.make_tensor_value_info("x", getattr(TensorProto, kind), [4, 100])
    subject = onnx.helper.make_model(onnx.helper.make_graph([], "g", [info], []))
    array = make_inputs(subject, 0)["x"]
    assert array.dtype == onnx.helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    assert len(np.unique(array.astype(np.float64))) >= min(2 ** (array.dtype.itemsize * 8) // 2, 16) or kind == "BOOL"


def test_masks_are_ones_and_padding_is_at_the_end_of_the_first_row() -> None:
    subject = model("int64[batch, sequence] attention_mask", "y = Cast<to = 1>(attention_mask)")
    values = {"batch": 2, "sequence": 3}
    assert make_inputs(subject, 0, values)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert make_inputs(subject, 0, values, padded=True)["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_positions_count_on_from_the_past() -> None:
    subject = model(
        "int64[batch, sequence] position_ids, float[batch, past_sequence] past", "y = Cast<to = 1>(position_ids)"
    )
    values = {"batch": 2, "sequence": 3, "past_sequence": 4}
    assert make_inputs(subject, 0, values)["position_ids"].tolist() == [[4, 5, 6], [4, 5, 6]]


def test_four_bit_inputs_cover_their_range() -> None:
    info = onnx.helper.make_tensor_value_info("x", TensorProto.INT4, [1000])
    subject = onnx.helper.make_model(onnx.helper.make_graph([], "g", [info], []))
    array = make_inputs(subject, 0)["x"]
    assert array.dtype == ml_dtypes.int4
    assert {int(value) for value in array} == set(range(-8, 8))


def settings_of(signature: str, run: int = 0) -> dict[str, int]:
    return next(settings(graph_inputs(model(signature, "y = Cast<to = 1>(x)")), run))


def test_total_is_past_plus_sequence() -> None:
    signature = (
        "float[batch, past_sequence, 4] x, int64[batch, sequence] ids, int64[batch, total_sequence] attention_mask"
    )
    for run in (0, 1):
        values = settings_of(signature, run)
        assert values["total_sequence"] == values["past_sequence"] + values["sequence"]
    assert settings_of(signature, 1)["past_sequence"] == 0


def test_totals_cover_the_past_or_the_sequence_alone_unless_they_are_given() -> None:
    subject = model("float[batch, past_len] x, int64[batch, seq] i, int64[batch, total_len] m", "y = Identity(x)")
    inputs = graph_inputs(subject)
    assert [each["total_len"] for each in completed(inputs, {"past_len": 9}, lambda _: 4)] == [13, 4]
    assert {each["total_len"] for each in completed(inputs, {"total_len": 20}, lambda _: 4)} == {20}
    assert [each["batch"] for each in completed(inputs, {"batch": 3}, lambda _: 4)] == [3, 3]


def test_expressions_of_other_dimensions_follow_them() -> None:
    info = [
        onnx.helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", "seq"]),
        onnx.helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", "past"]),
        onnx.helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", "past + seq"]),
        onnx.helper.make_tensor_value_info("d", TensorProto.FLOAT, ["enc-len"]),
    ]
    subject = onnx.helper.make_model(onnx.helper.make_graph([], "g", info, []))
    values = next(settings(graph_inputs(subject), 0))
    assert values.keys() == {"batch", "seq", "past", "enc-len"}
    shapes = {name: array.shape for name, array in make_inputs(subject, 0, values).items()}
    assert shapes["c"][1] == shapes["a"][1] + shapes["b"][1]


def test_runs_use_different_sizes() -> None:
    first, second = (settings_of("float[batch, 3, height, width] x", run) for run in (0, 1))
    assert all(first[name] != second[name] for name in first)


def test_dimensions_without_names_are_symbols_of_their_own() -> None:
    info = onnx.helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, 3, None, None])
    subject = onnx.helper.make_model(onnx.helper.make_graph([], "g", [info], []))
    assert next(settings(graph_inputs(subject), 0)) == {"image.0": 2, "image.2": 64, "image.3": 96}


def test_given_shapes_replace_declared_ones() -> None:
    subject = model("float[batch, 3] x", "y = Identity(x)")
    assert make_inputs(subject, 0, shapes={"x": (4, 3)})["x"].shape == (4, 3)


def test_input_that_is_no_tensor_is_named() -> None:
    info = onnx.helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)
    subject = onnx.helper.make_model(onnx.helper.make_graph([], "g", [info], []))
    with pytest.raises(CertificateError, match="input 'list' is not a tensor"):
        make_inputs(subject, 0)


@pytest.mark.parametrize("exported", MODELS, ids=lambda exported: exported.path.stem)
def test_onnxruntime_accepts_the_first_inputs_for_real_architectures(exported: ExportedModel) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    subject = onnx.load(exported.path)
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    for run in (0, 1):
        values = next(settings(graph_inputs(subject), run))
        outputs = session.run(None, make_inputs(subject, run, values, padded=run > 0))
        assert all(np.isfinite(output).all() for output in outputs)


@pytest.mark.parametrize(
    ("operands", "body"),
    [
        ("int64[2] s", "y = Reshape(x, s)"),
        ("int64[2] s", "a, b = Split<axis = 1>(x, s) y = Concat<axis = 1>(a, b)"),
        ("int64[4] s", 'y = Resize<mode = "linear">(x, , , s)'),
        ("float[4] s", "y = Resize(x, , s)"),
        ("float[8] r, float[4] s", 'y = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, r, s)'),
        ("float[2] s", "y = Resize<axes = [2, 3]>(x, , s)"),
        ("int64[2] s", "y = Resize<axes = [3, 2]>(x, , , s)"),
        ("int64[2] i, int64[2] b", "c = Reshape(x, three) y = Col2Im<strides = [1, 2], dilations = [3, 1]>(c, i, b)"),
    ],
)
def test_inputs_that_say_sizes_fit_the_data(operands: str, body: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    three = numpy_helper.from_array(np.array([2, 5, 7 * 4], np.int64), "three")
    subject = model(f"float[2, 5, 7, 4] x, {operands}", body, three)
    session = onnxruntime.InferenceSession(subject.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, make_inputs(subject, 0))
    assert np.asarray(result).size >= 2 * 5 * 7 * 4
