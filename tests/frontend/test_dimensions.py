"""Names of dimensions become symbols: each its own, and an expression only where the parts are dimensions too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tvm import tirx

from optimizer.errors import InputMismatchError
from optimizer.frontend.dimensions import (
    Dimension,
    Shape,
    Symbols,
    as_expression,
    input_shapes,
    product,
    provably_equal,
    quotient,
    simplified,
)


def shapes(**declared: tuple[int | str | None, ...]) -> dict[str, Shape]:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in declared.items()]
    return input_shapes(inputs, Symbols(), {})


def test_a_name_is_one_symbol_wherever_it_stands():
    found = shapes(x=("batch", 8), y=("batch", "length"))
    assert found["x"][0].same_as(found["y"][0])
    assert not found["y"][0].same_as(found["y"][1])


def test_anonymous_dimensions_are_all_different():
    found = shapes(x=(None, None), y=(None,))
    symbols = [*found["x"], *found["y"]]
    assert len({symbol.name for symbol in symbols}) == 3


def test_a_name_with_a_dash_is_one_symbol():
    (dimension,) = shapes(x=("seq-len",))["x"]
    assert isinstance(dimension, tirx.Var)


def test_a_sum_of_dimensions_is_an_expression_of_them():
    found = shapes(x=("past",), y=("length",), mask=("past + length",))
    assert provably_equal(found["mask"][0], found["x"][0] + found["y"][0])


def test_a_sum_of_which_a_part_is_no_dimension_is_one_symbol():
    (dimension,) = shapes(x=("past",), mask=("past + other",))["mask"]
    assert isinstance(dimension, tirx.Var)


def test_override_of_an_unknown_input_names_the_known_ones():
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))]
    with pytest.raises(InputMismatchError, match="'y', which is no input; the inputs are x"):
        input_shapes(inputs, Symbols(), {"y": [1]})


def test_override_of_another_rank_is_refused():
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))]
    with pytest.raises(InputMismatchError, match="2 dimensions given"):
        input_shapes(inputs, Symbols(), {"x": [1, 2]})


def test_override_sets_integers_and_names():
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", "length"))]
    fixed, named = input_shapes(inputs, Symbols(), {"x": [4, "other"]})["x"]
    assert fixed == 4
    assert named.name == "other"


def overridden(overrides: dict[str, list[int | str]], **declared: tuple[int | str, ...]) -> dict[str, Shape]:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in declared.items()]
    return input_shapes(inputs, Symbols(), overrides)


def test_a_size_given_for_one_input_holds_for_all_that_have_its_name():
    declared = {"ids": ("batch", "length"), "mask": ("batch", "past + length"), "past": ("batch", 2, "past")}
    found = overridden({"ids": [3, 128]}, **declared)
    assert found["past"][:2] == (3, 2)
    assert found["mask"][0] == 3
    assert provably_equal(found["mask"][1], found["past"][2] + 128)
    found = overridden({"ids": [3, 128], "past": [3, 2, 4]}, **declared)
    assert found["mask"] == (3, 132)


def test_a_name_given_for_an_input_is_its_own():
    found = overridden({"x": ["rows", 8]}, x=("batch", 8), y=("batch",))
    assert [found["x"][0].name, found["y"][0].name] == ["rows", "batch"]


def test_a_shape_given_for_an_input_is_its_own():
    assert overridden({"x": [1, 8], "y": [4]}, x=("batch", 8), y=("batch",)) == {"x": (1, 8), "y": (4,)}


def test_different_sizes_of_a_name_that_a_third_input_has_are_refused():
    message = "gives 'batch' the sizes 1 and 4, and 'z' has it, too; give the shape of 'z'"
    with pytest.raises(InputMismatchError, match=message):
        overridden({"x": [1, 8], "y": [4]}, x=("batch", 8), y=("batch",), z=("batch",))


def test_quotient_cancels_sums_in_any_order():
    past, length, batch = (tirx.Var(name, "int64") for name in ("past", "length", "batch"))
    shape = (batch, 4, past + length, 8)
    assert provably_equal(quotient(shape, (length + past, 8)), batch * 4)
    assert provably_equal(quotient((batch, past * 8 + length * 8), (past + length,)), batch * 8)


def test_quotient_of_a_symbol_by_a_part_of_it():
    length = tirx.Var("length", "int64")
    assert provably_equal(quotient((length * 4, 8), (length, 16)), 2)
    assert quotient((3, 8), (0,)) == 0


SYMBOLS = [tirx.Var(name, "int64") for name in "abc"]
FACTORS = st.lists(st.one_of(st.integers(1, 12), st.sampled_from(SYMBOLS)), max_size=4)


@given(FACTORS, FACTORS)
def test_quotient_undoes_a_product(left: list[Dimension], right: list[Dimension]):
    assert provably_equal(quotient([*left, *right], right), product(left))


def test_what_is_right_for_inputs_with_elements_is_simplified_apart():
    symbols = Symbols()
    height = symbols.named("height")
    last = tirx.min(as_expression(simplified(tirx.floordiv(height - 1, tirx.IntImm("int64", 8)))), as_expression(0)) + 1
    assert not isinstance(simplified(last), int)
    assert symbols.simplified_if_nonempty(last) == 1
