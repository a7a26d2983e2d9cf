"""Caches as ONNX's own operators keep them, in the place of those that exporters write with Concat."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import TensorProto, helper

_ROOM, _TOKENS, _STARTS = "room", 2, "write_indices"


def appended_by_attention(model: onnx.ModelProto) -> None:
    """Have Attention append to its caches itself (opset 23)."""
    graph, producers = model.graph, {name: node for node in model.graph.node for name in node.output}
    appends = _appends(model)
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        parts = [producers[name] for name in node.input[1:3]]
        if not all(part.output[0] in appends for part in parts):
            raise ValueError("Attention does not read the caches as they are")
        mask = node.input[3] if len(node.input) > 3 else ""
        pasts, new, presents = zip(*((*part.input, part.output[0]) for part in parts), strict=True)
        node.input[:] = [node.input[0], *new, mask, *pasts]
        node.output[:] = [node.output[0], *presents]
        for part in parts:
            graph.node.remove(part)


def scattered(model: onnx.ModelProto) -> None:
    """Have TensorScatter write to caches that have room for all tokens from the start (opset 24).

    The mask has to say of each query what it sees.
    """
    graph, appends = model.graph, _appends(model)
    for append in appends.values():
        write = helper.make_node("TensorScatter", [*append.input, _STARTS], append.output, axis=_TOKENS)
        append.CopyFrom(write)
    names = {name for append in appends.values() for name in (append.input[0], append.output[0])}
    for value in (*graph.input, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if value.name in names:
            dimensions[_TOKENS].dim_param = _ROOM
        elif value.name == "attention_mask":
            dimensions[-1].dim_param = _ROOM
    graph.input.append(helper.make_tensor_value_info(_STARTS, TensorProto.INT64, ["batch"]))
    del graph.value_info[:]


CACHES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "in Attention": appended_by_attention,
    "scattered": scattered,
}


def _appends(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return each Concat that makes a present of a past, by what it makes."""
    given = {value.name for value in model.graph.input}
    returned = {value.name for value in model.graph.output}
    found = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Concat" and node.input[0] in given and node.output[0] in returned
    }
    if not found:
        raise ValueError("no Concat appends to a cache")
    return found
