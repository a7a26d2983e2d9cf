"""Dimension expressions mean what Python means, and nothing else is evaluated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.package.dimensions import evaluate, symbols

EXPRESSIONS = st.recursive(
    st.sampled_from(["past", "sequence", "0", "1", "17"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
        st.builds("-({})".format, inner),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.integers(0, 100), st.integers(0, 100))
def test_value_is_that_of_python(expression: str, past: int, sequence: int) -> None:
    values = {"past": past, "sequence": sequence}
    try:
        expected = eval(expression, {"min": min, "max": max}, values)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression, values)
        return
    assert evaluate(expression, values) == expected


def test_symbols_are_names_but_not_functions() -> None:
    assert symbols("min(past, 3) + sequence") == {"past", "sequence"}
    assert symbols("4") == frozenset()


@pytest.mark.parametrize("expression", ["", "a.b", "f(a)", "a if b else c", "True", "1.5", "a ** b", "[a]", "min(a)"])
def test_other_syntax_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expression|holds more"):
        symbols(expression)


@given(st.text(max_size=250))
def test_arbitrary_text_raises_nothing_but_value_error(text: str) -> None:
    try:
        symbols(text)
    except ValueError:
        return
