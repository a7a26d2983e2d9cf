from __future__ import annotations

import re

import numpy as np
import pytest
import tvm.ir
from tvm import relax
from tvm.relax import op

from passes.base import Dataflow
from passes.expression_patterns import MOST_ELEMENTS, Pattern, is_uniform, uniform_value
from tests.passes.graph import Body, graph


def _c(value: float | list, dtype: str = "float32") -> relax.Expr:
    return relax.const(np.asarray(value, dtype), dtype)


def _matches(pattern: Pattern, body: Body, count: int = 1) -> list[dict[str, str]]:
    """Return for each match which input, or else which kind of expression, each name stands for."""
    function = graph(body, *[(2, 3)] * count)["main"]
    dataflow = Dataflow(function)
    names = {parameter: parameter.name for parameter in function.params}

    def label(expr: relax.Expr) -> str:
        if isinstance(expr, relax.Var) and expr in names:
            return names[expr]
        producer = dataflow.producer(expr)
        return producer.op.name.removeprefix("relax.") if isinstance(producer, tvm.ir.Call) else "constant"

    found = pattern.matches(function.body.body, dataflow)
    return [{name: label(part) for name, part in parts.items()} for parts in found]


@pytest.mark.parametrize(
    ("text", "body", "expected"),
    [
        ("x + y", op.add, [{"x": "x0", "y": "x1"}, {"x": "x1", "y": "x0"}]),
        ("x - y", op.subtract, [{"x": "x0", "y": "x1"}]),
        ("x ** 2", lambda x, _: op.power(x, _c(2.0)), [{"x": "x0"}]),
        ("2 / x", lambda x, _: op.divide(_c([2.0]), x), [{"x": "x0"}]),
        ("-x", lambda x, _: op.negative(x), [{"x": "x0"}]),
        ("x * -1", lambda x, _: op.multiply(_c(-1.0), x), [{"x": "x0"}]),
        ("x * x", lambda x, _: op.multiply(x, x), [{"x": "x0"}] * 2),
        ("x * x", op.multiply, []),
        ("(s := exp(x)) / sum(s)", lambda x, _: op.divide(e := _emit(op.exp(x)), op.sum(e)), [{"x": "x0", "s": "exp"}]),
        ("(s := exp(x)) / sum(s)", lambda x, _: op.divide(op.exp(x), op.sum(op.exp(x))), []),
        ("relu(x)", lambda x, _: op.nn.relu(x), [{"x": "x0"}]),
        ("relu(x)", lambda x, _: op.exp(x), []),
        ("where(c, x, y)", lambda x, y: op.where(op.isnan(x), x, y), [{"c": "isnan", "x": "x0", "y": "x1"}]),
        ("maximum(x, 0)", lambda x, _: op.maximum(_c(0.0), x), [{"x": "x0"}]),
        ("minimum(x, 0)", lambda x, _: op.minimum(x, _c(1.0)), []),
        ("(x + c) * c", lambda x, _: op.multiply(op.add(x, _c(3.0)), _c(3.0)), [{"x": "x0", "c": "constant"}]),
        ("(x - c) / c", lambda x, _: op.divide(op.subtract(x, _c(3.0)), _c(4.0)), []),
    ],
)  # fmt: skip
def test_a_pattern_matches_what_it_says(text: str, body: Body, expected: list[dict[str, str]]) -> None:
    assert _matches(Pattern(text), body, 2) == expected


def _emit(value: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(value)


def test_a_call_with_more_operands_than_the_pattern_does_not_match() -> None:
    assert _matches(Pattern("exp(x, y)"), op.exp) == []
    assert _matches(Pattern("maximum(x)"), op.maximum, 2) == []


@pytest.mark.parametrize("text", ["x @ y", "f.g(x)", "not x", "+x"])
def test_what_a_pattern_may_not_contain(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^a pattern may not contain {re.escape(text)}$"):
        _matches(Pattern(text), op.exp)


def test_the_operator_of_a_pattern_and_its_names() -> None:
    pattern = Pattern("(y := x * rsqrt(mean(x) + e))")
    assert pattern.operator == "relax.multiply"
    assert pattern.names() == {"x", "e", "y"}
    assert Pattern("gelu(x)").operator == "relax.nn.gelu"


def test_a_pattern_builds_the_expression_with_numbers_of_a_dtype() -> None:
    def built(x: relax.Expr) -> relax.Expr:
        return Pattern("silu(x) * 0.5 - -x").build({"x": x}, "float16")

    def expected(x: relax.Expr) -> relax.Expr:
        return op.subtract(op.multiply(op.nn.silu(x), _c(0.5, "float16")), op.negative(x))

    tvm.ir.assert_structural_equal(graph(built, (2,), dtype="float16"), graph(expected, (2,), dtype="float16"))


@pytest.mark.parametrize(
    ("constant", "number", "exact", "inexact"),
    [
        (_c([2.0, 2.0]), 2.0, True, True),
        (_c([2.0, 3.0]), 2.0, False, False),
        (_c(0.0), 0.0, True, True),
        (_c(-0.0), 0.0, False, True),
        (_c(0.0), -0.0, False, True),
        (_c(float(np.nextafter(np.float32(2), 3))), 2.0, False, True),
        (_c(2.0 + 4e-6), 2.0, False, False),
        (_c(np.float16(0.3333).item(), "float16"), 1 / 3, False, True),
        (_c(np.nan), np.nan, False, False),
        (_c(np.inf), np.inf, True, True),
        (_c(3, "int32"), 3.0, True, True),
        (_c(3, "int32"), 4.0, False, False),
        (_c(0, "int32"), 0.0, True, True),
        (_c(0, "int32"), -0.0, False, False),
        (_c(True, "bool"), 1.0, True, True),
        (_c(np.zeros((0, 2)).tolist()), 0.0, False, False),
        (_c(np.ones(MOST_ELEMENTS).tolist()), 1.0, True, True),
        (_c(np.ones(MOST_ELEMENTS + 1).tolist()), 1.0, False, False),
    ],
)
def test_constants_of_one_number(constant: relax.Expr, number: float, exact: bool, inexact: bool) -> None:
    assert is_uniform(constant, number) is exact
    assert is_uniform(constant, number, exact=False) is inexact


def test_what_is_no_constant_has_no_number() -> None:
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    assert not is_uniform(x, 1.0)
    assert not is_uniform(relax.Tuple([x]), 1.0)
    assert uniform_value(x) is None


def test_the_number_that_all_elements_are() -> None:
    assert uniform_value(_c([[0.5, 0.5]])) == 0.5
    assert uniform_value(_c([0.5, 1.5])) is None
    assert uniform_value(_c([])) is None
    assert uniform_value(_c(7, "int8")) == 7.0
    assert uniform_value(_c(np.ones(MOST_ELEMENTS).tolist())) == 1.0
    assert uniform_value(_c(np.ones(MOST_ELEMENTS + 1).tolist())) is None
