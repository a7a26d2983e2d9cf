"""Control flow whose course is only known at run time, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized
from tests.frontend.comparison import assert_close, theirs

HEADER = '<ir_version: 10, opset_import: ["" : 18]>'


def compare(text: str, *feeds: dict[str, np.ndarray]) -> None:
    """Compile the model once and compare every run with onnxruntime."""
    model = parser.parse_model(HEADER + text)
    onnx.checker.check_model(model)
    run, reference = unoptimized(import_model(model)), theirs(model)
    for feed in feeds:
        assert_close(run(feed), reference(feed))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_branches_of_different_shapes_are_chosen_at_run_time():
    text = """
    g (bool c, float[n, 4] x) => (float[m, k] y) {
      y = If (c) <
        then_branch = t () => (float[n, 4] a) { a = Add(x, x) },
        else_branch = e () => (float[n, 8] b) { b = Concat <axis = 1> (x, x) }
      >
    }"""
    x = numbers(3, 4)
    compare(text, {"c": np.array(True), "x": x}, {"c": np.array(False), "x": x})


def test_branches_of_different_rank_are_refused():
    text = """
    g (bool c, float[n, 4] x) => (float y) {
      y = If (c) <
        then_branch = t () => (float[n, 4] a) { a = Add(x, x) },
        else_branch = e () => (float z) { z = ReduceSum <keepdims = 0> (x) }
      >
    }"""
    model = parser.parse_model(HEADER + text)
    with pytest.raises(UnsupportedModelError, match="rank"):
        import_model(model)


LOOP = """
    g (int64 trips, bool c, float[n, 4] x, float[4] w) => (float[n, 4] y, float[k, n, 4] rows) {
      y, rows = Loop (trips, c, x) <
        body = b (int64 i, bool going, float[n, 4] v) => (bool next, float[n, 4] after, float[n, 4] row) {
          next = Identity(going)
          f = Cast <to = 1> (i)
          s = Mul(v, w)
          after = Add(s, f)
          row = Sub(after, x)
        }
      >
    }"""


def test_loop_of_a_run_time_trip_count_collects_rows():
    feeds = [
        {"trips": np.array(trips), "c": np.array(condition), "x": numbers(n, 4), "w": numbers(4)}
        for trips, condition, n in ((5, True, 3), (1, True, 2), (0, True, 2), (7, False, 1))
    ]
    model = parser.parse_model(HEADER + LOOP)
    run = unoptimized(import_model(model))
    for feed in feeds:
        value, rows = feed["x"], []
        for index in range(int(feed["trips"]) if feed["c"] else 0):
            value = value * feed["w"] + np.float32(index)
            rows.append(value - feed["x"])
        outputs = run(feed)
        np.testing.assert_allclose(outputs["y"], value, rtol=1e-6)
        np.testing.assert_allclose(outputs["rows"], np.reshape(rows, (len(rows), *value.shape)), rtol=1e-5, atol=1e-6)


def test_while_loop_stops_on_its_condition_after_many_iterations():
    text = """
    g (int64 limit) => (int64 y) {
      start = Constant <value = int64 {0}> ()
      one = Constant <value = int64 {1}> ()
      yes = Less(start, limit)
      y = Loop ("", yes, start) <
        body = b (int64 i, bool going, int64 v) => (bool next, int64 after) {
          after = Add(v, one)
          next = Less(after, limit)
        }
      >
    }"""
    run = unoptimized(import_model(parser.parse_model(HEADER + text)))
    assert run({"limit": np.array(20000)})["y"] == 20000
    assert run({"limit": np.array(-1)})["y"] == 0


def test_loop_carries_a_growing_value():
    text = """
    g (int64 trips, float[n, 2] x) => (float[m, 2] y) {
      yes = Constant <value = bool {1}> ()
      y = Loop (trips, yes, x) <
        body = b (int64 i, bool going, float[m, 2] v) => (bool next, float[k, 2] after) {
          next = Identity(going)
          after = Concat <axis = 0> (v, x)
        }
      >
    }"""
    compare(text, *({"trips": np.array(trips), "x": numbers(n, 2)} for trips, n in ((0, 3), (1, 2), (6, 2))))


def test_nested_loops_see_the_values_around_them():
    text = """
    g (int64 outer, int64 inner, float[n] x) => (float[n] y) {
      yes = Constant <value = bool {1}> ()
      y = Loop (outer, yes, x) <
        body = b (int64 i, bool going, float[n] v) => (bool next, float[n] after) {
          next = Identity(going)
          after = Loop (inner, going, v) <
            body = d (int64 j, bool inner_going, float[n] u) => (bool inner_next, float[n] w) {
              inner_next = Identity(inner_going)
              ij = Add(i, j)
              f = Cast <to = 1> (ij)
              s = Add(u, f)
              w = Add(s, x)
            }
          >
        }
      >
    }"""
    compare(text, *({"outer": np.array(a), "inner": np.array(b), "x": numbers(3)} for a, b in ((2, 3), (4, 0))))


def test_loop_of_a_constant_trip_count_is_unrolled():
    text = """
    g (float[n] x) => (float[n] y, float[3, n] rows) {
      trips = Constant <value = int64 {3}> ()
      y, rows = Loop (trips, "", x) <
        body = b (int64 i, bool going, float[n] v) => (bool next, float[n] after, float[n] row) {
          next = Identity(going)
          f = Cast <to = 1> (i)
          after = Mul(v, f)
          row = Add(v, f)
        }
      >
    }"""
    model = parser.parse_model(HEADER + text)
    assert not [f for f in import_model(model).module.functions_items() if "loop" in f[0].name_hint]
    compare(text, {"x": numbers(4)})


@pytest.mark.parametrize("length", ["3", "t", "40"])
def test_scan_in_both_directions_along_any_axis(length: str):
    text = f"""
    g (float[n] s, float[n, {length}] x, float[{length}, n] z) => (float[n] y, float[n, k] sums, float[m, n] last) {{
      y, sums, last = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [0, 1],
        scan_output_axes = [1, 0], scan_output_directions = [0, 1],
        body = b (float[n] v, float[n] a, float[n] c) => (float[n] after, float[n] total, float[n] row) {{
          p = Add(v, a)
          after = Mul(p, c)
          total = Identity(after)
          row = Sub(after, a)
        }}
      > (s, x, z)
    }}"""
    steps = int(length) if length.isdigit() else 5
    compare(text, {"s": numbers(2), "x": numbers(2, steps), "z": numbers(steps, 2)})


PRODUCTS = """
    g (bool c, float[n, k] x, float[j, 2] z) => (float[n, 2] y) {{
      {outside}
      y = If (c) <
        then_branch = t () => (float[n, 2] a) {{ {inside} }},
        else_branch = e () => (float[n, 2] b) {{ b = Neg({negated}) }}
      >
    }}"""


@pytest.mark.parametrize(
    "text",
    [
        PRODUCTS.format(outside="p = MatMul(x, z)", inside="a = Exp(p)", negated="p"),
        PRODUCTS.format(outside="", inside="p = MatMul(x, z) a = Exp(p)", negated="x"),
    ],
    ids=["before a branch", "inside of a branch"],
)
def test_dimensions_that_must_be_equal_are_compared_when_the_module_runs(text: str):
    run = unoptimized(import_model(parser.parse_model(HEADER + text)))
    x, z = numbers(3, 2), numbers(2, 2)
    np.testing.assert_allclose(run({"c": np.array(True), "x": x, "z": z})["y"], np.exp(x @ z), rtol=1e-5)
    with pytest.raises(Exception, match="match_cast"):
        run({"c": np.array(True), "x": x, "z": numbers(4, 2)})
