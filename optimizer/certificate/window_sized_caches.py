"""Caches of onnxruntime's GroupQueryAttention that hold the newest tokens of a sliding window alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from optimizer.certificate.comparison import Outputs

_INPUTS, _OUTPUTS = (3, 4), (1, 2)


def windows(model: onnx.ModelProto) -> dict[str, int]:
    """Return the values that are such caches, as they come and as they go, with the window that they have room for."""
    return {name: window for node, window in _nodes(model) for name in (*_named(node.input, _INPUTS), *_presents(node))}


def defined(model: onnx.ModelProto, outputs: Outputs, tokens: int) -> Outputs:
    """Return outputs without the places of such caches that no token lies in; the first `tokens` have one each."""
    presents = {name for node, _ in _nodes(model) for name in _presents(node)}
    return {name: each[:, :, :tokens] if name in presents else each for name, each in outputs.items()}


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            attributes = {each.name: each.i for each in node.attribute}
            if attributes.get("sliding_window_cache"):
                yield node, attributes.get("local_window_size", 0)


def _presents(node: onnx.NodeProto) -> list[str]:
    return _named(node.output, _OUTPUTS)


def _named(names: Iterable[str], places: tuple[int, int]) -> list[str]:
    return [name for place, name in enumerate(names) if place in places and name]
