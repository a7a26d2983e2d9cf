from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.compile import find_target
from optimizer.frontend.importer import import_model
from optimizer.lowering import fuse
from passes import pipeline
from schedules.division import Division, division_of

_AVX2 = find_target("x86-avx2")
_BLOCK = _AVX2.layouts.channel_block
_FEW, _MANY = 2 * _BLOCK, 8 * _BLOCK


class _Layers:
    """A model of convolutions, written down layer by layer; each is named after its result."""

    def __init__(self, channels: int, size: int) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._input = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])

    def convolution(self, result: str, source: str, inputs: int, outputs: int) -> _Layers:
        return self._layer(result, source, (outputs, inputs, 1, 1), 1)

    def depthwise(self, result: str, source: str, channels: int, kernel: int = 3) -> _Layers:
        return self._layer(result, source, (channels, 1, kernel, kernel), channels)

    def node(self, operator: str, result: str, *sources: str) -> _Layers:
        self._nodes.append(helper.make_node(operator, sources, [result], name=result))
        return self

    def _layer(self, result: str, source: str, shape: tuple[int, ...], groups: int) -> _Layers:
        weights = np.full(shape, 1 / shape[1], np.float32)
        self._weights.append(numpy_helper.from_array(weights, f"{result}.w"))
        pads = [shape[-1] // 2] * 4
        sources = [source, f"{result}.w"]
        self._nodes.append(helper.make_node("Conv", sources, [result], name=result, group=groups, pads=pads))
        return self

    def by_image(self) -> set[str]:
        """Return the layers that are told to divide by parts of the image, where the account says the same."""
        output = helper.make_tensor_value_info(self._nodes[-1].output[0], TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "layers", [self._input], [output], self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        passes = pipeline.parse(f"{pipeline.DEFAULT},block-channels{{block={_BLOCK}}}")
        fused = fuse(pipeline.run(import_model(model).module, passes)[0], _AVX2)
        nodes = {node for site in fused.fusion["divide-work"] for node in site.nodes}
        told = [f for f in fused.module.functions.values() if division_of(f) is Division.IMAGE]
        assert bool(told) == bool(nodes)
        return nodes


def test_layers_between_products_of_large_images_divide_by_the_image() -> None:
    layers = _Layers(_FEW, 28).convolution("up", "x", _FEW, _MANY).depthwise("d", "up", _MANY)
    assert layers.convolution("down", "d", _MANY, _FEW).by_image() >= {"up", "d", "down"}


def test_chains_of_depthwise_layers_divide_by_channels() -> None:
    assert _Layers(_MANY, 28).depthwise("d", "x", _MANY).depthwise("e", "d", _MANY).by_image() == set()


@pytest.mark.parametrize("reader", ["GlobalMaxPool", "GlobalAveragePool"])
def test_a_single_depthwise_layer_divides_by_channels(reader: str) -> None:
    assert _Layers(_MANY, 28).depthwise("d", "x", _MANY).node(reader, "m", "d").by_image() == set()


def test_layers_with_large_weights_divide_by_channels() -> None:
    layers = _Layers(_MANY, 3).convolution("up", "x", _MANY, 4 * _MANY).depthwise("d", "up", 4 * _MANY)
    assert layers.convolution("down", "d", 4 * _MANY, _MANY).by_image() == set()


def test_what_scales_channels_divides_as_the_layers_around_it() -> None:
    layers = _Layers(_FEW, 28).convolution("up", "x", _FEW, _MANY).depthwise("d", "up", _MANY)
    layers = (
        layers.node("GlobalAveragePool", "m", "d").convolution("s", "m", _MANY, _MANY).node("Mul", "scaled", "d", "s")
    )
    found = layers.convolution("down", "scaled", _MANY, _FEW).by_image()
    assert found >= {"up", "d", "scaled", "down"}
    assert "m" not in found


def test_equal_layers_divide_as_their_neighbours_do() -> None:
    layers = _Layers(_FEW, 28).convolution("up", "x", _FEW, _MANY).depthwise("d", "up", _MANY)
    layers = layers.convolution("down", "d", _MANY, _FEW).convolution("again", "down", _FEW, _MANY)
    layers = layers.node("GlobalMaxPool", "m", "again").convolution("grown", "m", _MANY, _MANY)
    found = layers.node("Mul", "scaled", "again", "grown").depthwise("e", "scaled", _MANY).depthwise("f", "e", _MANY)
    assert {"up", "d", "down"} <= found.by_image()
    assert "f" not in found.by_image()
