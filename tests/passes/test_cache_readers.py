"""Which axes of a cache products sum over, whichever side of the product it stands on."""

from __future__ import annotations

import pytest
from tvm import relax
from tvm.relax import op

from passes.base import Dataflow
from passes.cache_readers import summed_axes
from tests.passes.graph import Body, graph

# A cache [batch, heads, tokens, width], [2, 3, 5, 4].
_CACHE = (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("body", "other", "axes"),
    [
        (lambda cache, x: op.matmul(x, cache), (2, 3, 7, 5), {2}),
        (op.matmul, (2, 3, 4, 7), {3}),
        (lambda cache, x: op.matmul(x, op.permute_dims(cache, [0, 1, 3, 2])), (2, 3, 7, 4), {3}),
        (lambda cache, x: op.matmul(op.permute_dims(cache, [0, 1, 3, 2]), x), (2, 3, 5, 7), {2}),
        (lambda cache, x: op.matmul(x, op.reshape(cache, (6, 5, 4))), (6, 7, 5), {2}),
        (lambda cache, x: op.matmul(x, op.multiply(cache, relax.const(0.5))), (2, 3, 7, 5), {2}),
        (lambda cache, x: op.matmul(x, op.astype(op.astype(cache, "float16"), "float32")), (2, 3, 7, 5), {2}),
        (lambda cache, x: [op.matmul(x, cache), op.matmul(cache, x)], (2, 3, 4, 5), {2, 3}),
        (lambda cache, x: op.matmul(x, op.exp(cache)), (2, 3, 7, 5), set()),
        (lambda cache, x: op.matmul(x, op.multiply(op.ones((1,), "float32"), cache)), (2, 3, 7, 5), set()),
        (op.multiply, _CACHE, set()),
        (lambda cache, x: op.matmul(x, op.permute_dims(x, [1, 0])), (7, 5), set()),
    ],
)
def test_the_axes_that_products_sum_over(body: Body, other: tuple[int, ...], axes: set[int]) -> None:
    function = graph(body, _CACHE, other)["main"]
    assert summed_axes(function, Dataflow(function), function.params[0]) == axes


def test_a_cache_that_is_repeated_by_a_product_with_more_heads_is_not_followed() -> None:
    function = graph(lambda cache, x: op.matmul(x, op.multiply(cache, x)), (2, 1, 4, 4), (2, 3, 4, 4))["main"]
    assert summed_axes(function, Dataflow(function), function.params[0]) == set()
