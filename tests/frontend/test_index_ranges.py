"""Which inputs are known to choose elements, and how many there are."""

from __future__ import annotations

import pytest
from onnx import parser

from optimizer.frontend.importer import import_model
from optimizer.package.entry_points import IndexRange


def ranges(inputs: str, body: str, outputs: str = "float[k] y") -> tuple[IndexRange, ...]:
    """Return the ranges of a graph whose nodes are called after their first outputs; `t` and `u` are tables."""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
        g ({inputs}, float[5, 4] t, float[3, 4] u, float[rows, 4] v) => ({outputs}) {{ {body} }}""")
    for node in model.graph.node:
        node.name = node.output[0]
    return import_model(model).index_ranges


@pytest.mark.parametrize(
    ("body", "maximum"),
    [
        ("y = Gather (t, i)", 4),
        ("y = Gather <axis = 1> (t, i)", 3),
        ("c = Cast <to = 6> (i) s = Identity (c) y = Gather (t, s)", 4),
        ("shape = Constant <value_ints = [-1, 1]> () s = Reshape (i, shape) y = Gather (t, s)", 4),
        ("a = Gather (t, i) b = Gather (u, i) y = Add (a, b)", 2),
        ("a = Gather (u, i) b = Gather (t, i) y = Add (a, b)", 2),
    ],
)
def test_an_input_that_chooses_has_the_range_of_the_smallest_axis(body: str, maximum: int) -> None:
    (found,) = ranges("int64[n] i", body, "float[n, k] y")
    assert (found.input, found.minimum, found.maximum) == ("i", -maximum - 1, maximum)


def test_the_node_that_chooses_is_named() -> None:
    (found,) = ranges("int64[n] i", "a = Gather (t, i) b = Gather (u, i) y = Add (a, b)", "float[n, 4] y")
    assert found.node == "b"


def test_indices_of_elements_choose_along_their_axis() -> None:
    assert ranges("int64[5, 2] i", "y = GatherElements <axis = 1> (t, i)", "float[5, 2] y")[0].maximum == 3


@pytest.mark.parametrize(
    "body",
    [
        "two = Constant <value = int64 {2}> () j = Add (i, two) y = Gather (t, j)",
        "zero = Constant <value = int64 {0}> () m = Less (i, zero) j = Where (m, zero, i) y = Gather (t, j)",
        "y = Gather (v, i)",
        "b = Constant <value_ints = [0]> () e = Constant <value_ints = [1]> () j = Slice (i, b, e) y = Gather (t, j)",
    ],
)
def test_what_the_data_or_arithmetic_decide_has_no_range(body: str) -> None:
    assert ranges("int64[n] i", body, "float[k, 4] y") == ()


def test_a_branch_that_some_calls_do_not_take_says_nothing() -> None:
    body = """y = If (c) <
        then_branch = a () => (float[k, 4] p) { p = Gather (u, i) },
        else_branch = b () => (float[k, 4] q) { q = Gather (t, i) }>"""
    assert ranges("int64[n] i, bool c", body, "float[n, 4] y") == ()


def test_embeddings_of_words_count_none_from_the_end() -> None:
    body = "y = com.microsoft.EmbedLayerNormalization (i, , t, u, , g, g)"
    (found,) = ranges("int32[1, 2] i, float[4] g", body, "float[1, 2, 4] y")
    assert (found.minimum, found.maximum) == (0, 4)
