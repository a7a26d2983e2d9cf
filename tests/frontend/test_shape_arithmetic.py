"""Shape arithmetic of exporters disappears from the module, and symbols stay symbols."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser
from tvm import relax

from optimizer.frontend.dimensions import simplified
from optimizer.frontend.importer import ImportedModel, import_model
from optimizer.reference import unoptimized


def imported(body: str, inputs: str = "float[batch, length, 8] x", outputs: str = "y") -> ImportedModel:
    declared = ", ".join(f"float[d{index}] {name}" for index, name in enumerate(outputs.split()))
    text = f'<ir_version: 10, opset_import: ["": 18]> g ({inputs}) => ({declared}) {{ {body} }}'
    return import_model(parser.parse_model(text))


def shape_of(model: ImportedModel) -> list[str]:
    return [str(simplified(dimension)) for dimension in model.module["main"].ret_ty.shape.values]


def tensor_operators(model: ImportedModel) -> list[str]:
    (block,) = model.module["main"].body.blocks
    calls = [binding.value for binding in block.bindings if isinstance(binding.value, relax.Call)]
    return [call.op.name.removeprefix("relax.") for call in calls if hasattr(call.op, "name")]


def test_reshape_by_computed_dimensions_keeps_their_symbols():
    model = imported("""
        s = Shape (x)
        zero = Constant <value = int64[1] {0}> ()
        first = Gather <axis = 0> (s, zero)
        rest = Constant <value = int64[3] {-1, 2, 4}> ()
        target = Concat <axis = 0> (first, rest)
        y = Reshape (x, target)
    """)
    assert shape_of(model) == ["batch", "length", "2", "4"]
    assert tensor_operators(model) == ["reshape"]


def test_expand_by_where_of_minus_one_is_decided():
    model = imported(
        """
        s = Shape (x)
        three = Constant <value = int64[1] {3}> ()
        ones = ConstantOfShape <value = int64[1] {1}> (three)
        minus = Constant <value = int64 {-1}> ()
        unset = Mul (ones, minus)
        is_unset = Equal (s, unset)
        target = Where (is_unset, ones, s)
        y = Expand (w, target)
        """,
        "float[batch, length, 8] x, float[1, 1, 8] w",
    )
    assert shape_of(model) == ["batch", "length", "8"]
    assert tensor_operators(model) == ["broadcast_to"]


def test_causal_mask_is_an_expression_of_the_length():
    model = imported("""
        one = Constant <value = int64 {1}> ()
        zero = Constant <value = int64 {0}> ()
        s = Shape (x)
        length = Gather <axis = 0> (s, one)
        places = Range (zero, length, one)
        axis0 = Constant <value = int64[1] {0}> ()
        axis1 = Constant <value = int64[1] {1}> ()
        rows = Unsqueeze (places, axis1)
        columns = Unsqueeze (places, axis0)
        seen = LessOrEqual (columns, rows)
        y = Cast <to = 1> (seen)
    """)
    assert shape_of(model) == ["length", "length"]
    result = unoptimized(model)({"x": np.zeros((1, 4, 8), np.float32)})["y"]
    np.testing.assert_array_equal(result, np.tril(np.ones((4, 4), np.float32)))


def test_range_between_dimensions_has_their_difference_for_length():
    model = imported(
        """
        one = Constant <value = int64 {1}> ()
        axis = Constant <value = int64 {0}> ()
        old_shape = Shape (p)
        past = Gather <axis = 0> (old_shape, axis)
        new_shape = Shape (x)
        new = Gather <axis = 0> (new_shape, axis)
        total = Add (past, new)
        places = Range (past, total, one)
        y = Cast <to = 1> (places)
        """,
        "float[length] x, float[past] p",
    )
    assert shape_of(model) == ["length"]
    arrays = {"x": np.zeros(3, np.float32), "p": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(unoptimized(model)(arrays)["y"], [2, 3, 4])


@pytest.mark.parametrize("divisor", [2, 8])
def test_division_of_dimensions_is_a_floor(divisor: int):
    model = imported(f"""
        s = Shape <start = 1, end = 2> (x)
        divisor = Constant <value = int64[1] {{{divisor}}}> ()
        part = Div (s, divisor)
        y = ConstantOfShape (part)
    """)
    assert shape_of(model) == [f"length // T.int64({divisor})"]


def test_last_row_of_a_convolution_is_one_row():
    model = imported(
        """
        c = Conv <strides = [2]> (x, w)
        start = Constant <value = int64[1] {-1}> ()
        end = Constant <value = int64[1] {9223372036854775807}> ()
        axis = Constant <value = int64[1] {2}> ()
        y = Slice (c, start, end, axis)
        """,
        "float[batch, 4, length] x, float[4, 4, 1] w",
    )
    assert shape_of(model)[2] == "1"
    weights = np.eye(4, dtype=np.float32)[:, :, None]
    data = np.arange(20, dtype=np.float32).reshape(1, 4, 5)
    np.testing.assert_array_equal(unoptimized(model)({"x": data, "w": weights})["y"], data[:, :, -1:])


def test_a_shape_given_as_data_is_bound_when_the_module_runs():
    model = imported("y = Reshape (x, target)", "float[batch, length, 8] x, int64[2] target")
    run = unoptimized(model)
    data = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    for target in ((6, 8), (-1, 4), (0, 24)):
        wanted = {"x": data, "target": np.array(target)}
        np.testing.assert_array_equal(run(wanted)["y"], data.reshape(target if target[0] else (2, 24)))
