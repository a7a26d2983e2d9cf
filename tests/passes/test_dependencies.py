from __future__ import annotations

from itertools import product

import networkx
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from passes.dependencies import Dependencies
from passes.provenance import Bindings

_TENSOR = relax.TensorType((2,), "float32")

# Each binding adds two of the values before it; -1 is the function's input.
_GRAPHS = st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9)), min_size=1, max_size=10).map(
    lambda edges: [(min(a, i - 1), min(b, i - 1)) for i, (a, b) in enumerate(edges)]
)


def _sums(edges: list[tuple[int, int]]) -> tuple[Dependencies, list[relax.Var]]:
    builder = relax.BlockBuilder()
    x = relax.Var("x", _TENSOR)
    values: list[relax.Var] = []
    with builder.function("main", [x]):
        with builder.dataflow():
            for left, right in edges:
                operands = [x if index < 0 else values[index] for index in (left, right)]
                values.append(builder.emit(relax.op.add(*operands)))
            output = builder.emit_output(values[-1])
        builder.emit_func_output(output)
    function = builder.get()["main"]
    return Dependencies(function), list(Bindings(function).values)[: len(edges)]


def _is_convex_by_paths(graph: networkx.DiGraph[relax.Var], group: set[relax.Var]) -> bool:
    """Look at every path between any two members."""
    return all(
        set(path) <= group
        for a, b in product(group, group)
        if a != b
        for path in networkx.all_simple_paths(graph, a, b)
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_GRAPHS, st.sets(st.integers(0, 9)))
def test_convex_groups_are_those_that_no_path_leaves_and_enters_again(
    edges: list[tuple[int, int]], chosen: set[int]
) -> None:
    dependencies, values = _sums(edges)
    group = {values[index] for index in chosen if index < len(values)}
    assert dependencies.is_convex(group) == _is_convex_by_paths(dependencies.graph, group)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_GRAPHS)
def test_producers_and_readers_are_the_two_ends_of_the_same_edges(edges: list[tuple[int, int]]) -> None:
    dependencies, values = _sums(edges)
    for index, var in enumerate(values):
        assert dependencies.producers(var) == [values[i] for i in sorted({*edges[index]} - {-1})]
        for reader in dependencies.readers(var):
            assert var in dependencies.producers(reader)


def test_the_binding_on_the_way_back_is_named() -> None:
    dependencies, (first, between, last) = _sums([(-1, -1), (0, 0), (0, 1)])
    assert dependencies.reentry([first, last]) == between
    assert dependencies.reentry([first, between, last]) is None


def test_outputs_of_a_group_are_read_outside_or_returned() -> None:
    dependencies, (first, second, last) = _sums([(-1, -1), (0, 0), (0, 1)])
    assert dependencies.outputs([first, second]) == [first, second]
    assert dependencies.outputs([second, last]) == [last]
    assert dependencies.is_result(last)
    assert not dependencies.is_result(second)
