"""Generated ONNX models.

Dimensions are up to 8, 0 and 1 among them, ranks up to 5; the first dimension of some inputs is symbolic. Initializers
are shared, hold NaN, infinities and both zeros, and may be outputs. Axes are negative as often as not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from tests.passes.properties.onnx_graphs import FLOATS, INTEGERS, SYMBOL, Draw, Generated, Graph, generated, values
from tests.passes.properties.onnx_layers import CONVOLUTIONS, LAYERS, RARE_LAYERS
from tests.passes.properties.onnx_operators import OPERATORS

_GROWTH = (*OPERATORS * 2, *LAYERS, *RARE_LAYERS)
CONVOLUTIONAL = (*CONVOLUTIONS * 8, *OPERATORS)


@st.composite
def models(draw: Draw, most_steps: int = 14, growth: Sequence[Callable[[Graph], None]] = _GROWTH) -> Generated:
    """Draw a model with arrays for its inputs, of operators and layers that `growth` adds."""
    graph = Graph(draw, draw(st.sampled_from([1, 2, 3, 0])))
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(["float32"] * 6 + [*FLOATS, *INTEGERS, "bool"]))
        shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 0, 1, 2]), max_size=5)))
        graph.input((SYMBOL, *shape[1:]) if shape and draw(st.booleans()) else shape, dtype)
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=3)))
        graph.tensors.append(graph.constant(values(draw, shape, draw(st.sampled_from([*FLOATS, "int64", "bool"])))))
    for _ in range(draw(st.sampled_from([1, 4, 8, most_steps]))):
        draw(st.sampled_from(growth))(graph)
    return generated(graph)
