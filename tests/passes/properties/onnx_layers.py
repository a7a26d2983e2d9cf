"""Growth of a graph by layers as exporters write them: convolutions, products, normalizations, attention."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tests.passes.properties.onnx_graphs import SYMBOL, Dimension, Graph, Tensor, broadcast, is_float, size

# Layers are of these dtypes: mostly the one that real models are of.
_DTYPES = ("float32", "float32", "float32", "float32", "float64", "float16", "bfloat16")


def _convolution(graph: Graph) -> None:
    """A convolution of any rank, grouped, depthwise or transposed, with what follows one in networks."""
    image = graph.pick(_is_image)
    if image is None:
        image = _image(graph)
    draw = graph.draw
    channels, rank = image.shape[1], len(image.shape) - 2
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    pads, strides, dilations, taps = (
        [draw(st.integers(low, high)) for _ in range(rank)] for low, high in ((0, 1), (1, 2), (1, 2), (1, 2))
    )
    spatial = []
    for extent, pad, stride, dilation, count in zip(image.shape[2:], pads, strides, dilations, taps, strict=True):
        reach = dilation * (count - 1) + 1
        last = (extent - 1) * stride + reach - 2 * pad if transposed else (extent + 2 * pad - reach) // stride + 1
        if last < 1 or (not transposed and extent + 2 * pad < reach):
            return
        spatial.append(last)
    shape = (image.shape[0], outputs, *spatial)
    if size(shape) > 4096:
        return
    kernel = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    operands = [image, graph.weights((*kernel, *taps), image.dtype)]
    if draw(st.booleans()):
        operands.append(graph.weights((outputs,), image.dtype))
    result = graph.node(
        "ConvTranspose" if transposed else "Conv", operands, shape, rounds=True,
        group=groups, pads=pads * 2, strides=strides, dilations=dilations, kernel_shape=taps,
    )  # fmt: skip
    for follow in draw(st.lists(st.sampled_from([_batch_norm_of, _shift_channels, _scale_channels]), max_size=2)):
        result = follow(graph, result)


def _is_image(tensor: Tensor) -> bool:
    return (
        is_float(tensor)
        and 3 <= len(tensor.shape) <= 5
        and SYMBOL not in tensor.shape[1:]
        and 0 not in tensor.shape[1:]
        and tensor.shape[1] <= 8
    )


def _image(graph: Graph) -> Tensor:
    draw = graph.draw
    spatial = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    batch = draw(st.sampled_from([SYMBOL, 1, 2]))
    return graph.input((batch, draw(st.sampled_from([1, 2, 3, 4, 6])), *spatial), draw(st.sampled_from(_DTYPES)))


def _batch_norm(graph: Graph) -> None:
    """An inference-time batch normalization on its own, and a convolution after it as often as not."""
    tensor = graph.pick(lambda t: is_float(t) and len(t.shape) > 1 and t.shape[1] not in (SYMBOL, 0))
    if tensor is not None:
        _batch_norm_of(graph, tensor)


def _batch_norm_of(graph: Graph, x: Tensor) -> Tensor:
    channels = (x.shape[1],)
    statistics = [graph.weights(channels, x.dtype, positive=index == 3) for index in range(4)]
    epsilon = graph.draw(st.sampled_from([1e-5, 1e-3]))
    return graph.node("BatchNormalization", [x, *statistics], x.shape, rounds=True, epsilon=epsilon)


def _shift_channels(graph: Graph, x: Tensor) -> Tensor:
    return graph.node("Add", [x, graph.weights(_channelwise(graph, x), x.dtype)], x.shape, rounds=True)


def _scale_channels(graph: Graph, x: Tensor) -> Tensor:
    return graph.node("Mul", [graph.weights(_channelwise(graph, x), x.dtype), x], x.shape, rounds=True)


def _channelwise(graph: Graph, x: Tensor) -> tuple[int, ...]:
    ones = (1,) * (len(x.shape) - 2)
    return graph.draw(st.sampled_from([(x.shape[1], *ones), (1, x.shape[1], *ones), (1,)]))


def _matmul(graph: Graph) -> None:
    """A product with weights or with another tensor, either of which may be a vector."""
    left = graph.pick(lambda t: is_float(t) and len(t.shape) > 0 and t.shape[-1] not in (SYMBOL, 0))
    if left is None:
        return
    depth = left.shape[-1]

    def fits(other: Tensor) -> bool:
        if other.dtype != left.dtype or not other.shape or SYMBOL in other.shape[-2:]:
            return False
        if len(other.shape) == 1:
            return other.shape[0] == depth
        return other.shape[-2] == depth and broadcast(left.shape[:-2], other.shape[:-2]) is not None

    right = graph.pick(fits) if graph.draw(st.booleans()) else None
    if right is None:
        right = graph.weights((depth, graph.draw(st.integers(1, 4))), left.dtype)
    batch = broadcast(left.shape[:-2], right.shape[:-2])
    assert batch is not None
    shape = (*batch, *left.shape[-2:-1], *right.shape[-1:]) if len(right.shape) > 1 else left.shape[:-1]
    if size(shape) <= 4096:
        result = graph.node("MatMul", [left, right], shape, rounds=True)
        if graph.draw(st.booleans()) and shape and shape[-1] != SYMBOL:
            graph.node("Add", [result, graph.weights(shape[-1:], result.dtype)], shape, rounds=True)


def _gemm(graph: Graph) -> None:
    x = graph.pick(lambda t: is_float(t) and len(t.shape) == 2 and SYMBOL not in t.shape[1:] and t.shape[1] != 0)
    if x is None:
        return
    draw = graph.draw
    columns, transposed = draw(st.integers(1, 4)), draw(st.booleans())
    weights = graph.weights((columns, x.shape[1]) if transposed else (x.shape[1], columns), x.dtype)
    shape = (x.shape[0], columns)
    bias = (
        [graph.weights(draw(st.sampled_from([(columns,), (1, columns), (1,), ()])), x.dtype)]
        if draw(st.booleans())
        else []
    )
    scale = draw(st.sampled_from([1.0, 0.5, -2.0]))
    graph.node("Gemm", [x, weights, *bias], shape, rounds=True, transB=int(transposed), alpha=scale, beta=1.0)


def _normalization(graph: Graph) -> None:
    """LayerNormalization or InstanceNormalization as ONNX has them."""
    x = graph.pick(lambda t: is_float(t) and len(t.shape) > 1 and t.shape[-1] not in (SYMBOL, 0))
    if x is None or not graph.has_elements(x):
        return
    if len(x.shape) > 2 and SYMBOL not in x.shape[1:] and graph.draw(st.booleans()):
        parts = [graph.weights((x.shape[1],), x.dtype) for _ in range(2)]
        graph.node("InstanceNormalization", [x, *parts], x.shape, rounds=True, epsilon=1e-3)
        return
    parts = [graph.weights((x.shape[-1],), x.dtype) for _ in range(graph.draw(st.integers(1, 2)))]
    graph.node("LayerNormalization", [x, *parts], x.shape, rounds=True, axis=-1, epsilon=1e-3)


def _attention(graph: Graph) -> None:
    """Attention with its projections, over few shapes: the function that it becomes is compiled to be run."""
    draw = graph.draw
    x = graph.input((draw(st.sampled_from([SYMBOL, 2])), 3, 4), "float32")
    heads, width = draw(st.sampled_from([(1, 4), (2, 2)]))
    own = (x.shape[0], 3, heads, width)
    split = graph.constant(np.array([0, 0, heads, width], "int64"))
    queries, keys, values = (
        graph.node(
            "Transpose", [graph.node("Reshape", [_projected(graph, x), split], own)], _permuted(own, order), perm=order
        )
        for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
    )
    scores = _float_node(graph, "MatMul", queries, keys, shape=(x.shape[0], heads, 3, 3))
    scores = _float_node(graph, draw(st.sampled_from(["Mul", "Div"])), scores, graph.scalar(0.5, "float32"))
    if draw(st.booleans()):
        scores = _float_node(graph, "Add", scores, graph.constant(np.triu(np.full((3, 3), -1e4, "float32"), 1)))
    weights = _float_node(graph, "Softmax", scores, axis=-1)
    context = _float_node(graph, "MatMul", weights, values, shape=(x.shape[0], heads, 3, width))
    merged = graph.node("Transpose", [context], own, perm=(0, 2, 1, 3))
    graph.node("Reshape", [merged, graph.constant(np.array([0, 0, 4], "int64"))], x.shape)


def _projected(graph: Graph, x: Tensor) -> Tensor:
    return _float_node(graph, "MatMul", x, graph.weights((4, 4), x.dtype), shape=x.shape)


def _permuted(shape: tuple[Dimension, ...], order: tuple[int, ...]) -> tuple[Dimension, ...]:
    return tuple(shape[axis] for axis in order)


def _formula(graph: Graph) -> None:
    """A normalization, activation or softmax as exporters write it out."""
    tensor = graph.pick(lambda t: t.dtype == "float32" and len(t.shape) > 1 and t.shape[-1] not in (SYMBOL, 0))
    if tensor is None or SYMBOL in tensor.shape[1:] or not graph.has_elements(tensor):
        return
    graph.draw(st.sampled_from([_layer_norm, _rms_norm, _gelu, _silu, _softmax]))(graph, tensor)


def _layer_norm(graph: Graph, x: Tensor) -> None:
    mean = _float_node(graph, "ReduceMean", x, shape=(*x.shape[:-1], 1), axes=[-1])
    centered = _float_node(graph, "Sub", x, mean)
    _divide_by_root(graph, centered, centered)
    if graph.draw(st.booleans()):
        scale = graph.constant(np.linspace(0.5, 2, x.shape[-1], dtype="float32"))
        scaled = _float_node(graph, "Mul", graph.tensors[-1], scale)
        _float_node(graph, "Add", scaled, scale)


def _rms_norm(graph: Graph, x: Tensor) -> None:
    _divide_by_root(graph, x, x)


def _divide_by_root(graph: Graph, x: Tensor, squared: Tensor) -> None:
    if graph.draw(st.booleans()):
        square = _float_node(graph, "Mul", squared, squared)
    else:
        square = _float_node(graph, "Pow", squared, graph.scalar(2.0, "float32"))
    variance = _float_node(graph, "ReduceMean", square, shape=(*x.shape[:-1], 1), axes=[-1])
    root = _float_node(graph, "Sqrt", _float_node(graph, "Add", variance, graph.scalar(0.125, "float32")))
    _float_node(graph, "Div", x, root)


def _gelu(graph: Graph, x: Tensor) -> None:
    scaled = _float_node(graph, "Div", x, graph.scalar(float(np.sqrt(np.float32(2))), "float32"))
    bell = _float_node(graph, "Add", _float_node(graph, "Erf", scaled), graph.scalar(1.0, "float32"))
    _float_node(graph, "Mul", _float_node(graph, "Mul", x, bell), graph.scalar(0.5, "float32"))


def _silu(graph: Graph, x: Tensor) -> None:
    _float_node(graph, "Mul", x, _float_node(graph, "Sigmoid", x))


def _softmax(graph: Graph, x: Tensor) -> None:
    maximum = _float_node(graph, "ReduceMax", x, shape=(*x.shape[:-1], 1), axes=[-1])
    exponential = _float_node(graph, "Exp", _float_node(graph, "Sub", x, maximum))
    sums = graph.node(
        "ReduceSum", [exponential, graph.constant(np.array([-1], "int64"))], (*x.shape[:-1], 1), rounds=True
    )
    _float_node(graph, "Div", exponential, sums)


def _float_node(
    graph: Graph, operator: str, *inputs: Tensor, shape: tuple[Dimension, ...] | None = None, **attributes: object
) -> Tensor:
    result = shape or inputs[0].shape
    for other in inputs[1:]:
        result = broadcast(result, other.shape) or result
    return graph.node(operator, list(inputs), result, rounds=True, **attributes)


CONVOLUTIONS = (_convolution, _batch_norm)
LAYERS = (_convolution, *CONVOLUTIONS, _matmul, _matmul, _gemm, _normalization, _formula, _formula)
RARE_LAYERS = (_attention,)
