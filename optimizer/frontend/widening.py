"""Models of 16-bit floats as models that compute in fp32 throughout, with the same inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# The attributes by which operators name the type of a result: Cast; EyeLike and random numbers; (De)QuantizeLinear.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def widened(model: onnx.ModelProto, base_directory: str = "") -> onnx.ModelProto:
    """Return a model whose constants and arithmetic are fp32 where those of `model` are fp16 or bf16.

    Graph inputs and outputs keep their types and names; they are cast at once, and at last. `base_directory` is where
    external data lie. A model without such types is returned as it is.
    """
    if not any(_mentions_narrow(part) for part in _graphs(model.graph)):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if _is_narrow(value) and value.name not in initializers]
    outputs = [value for value in graph.output if _is_narrow(value)]
    declared = {value.name: value.type.tensor_type.elem_type for value in (*inputs, *outputs)}
    names = {value.name: _unused(f"{value.name}_fp32", graph) for value in (*inputs, *outputs)}
    for part in _graphs(graph):
        _widen(part, base_directory)
        _rename(part, names)
    casts = [
        helper.make_node("Cast", [v.name], [names[v.name]], f"widen {v.name}", to=TensorProto.FLOAT) for v in inputs
    ]
    nodes = [*casts, *graph.node]
    given = {value.name for value in inputs}
    for value in outputs:
        if value.name not in given:
            kind = declared[value.name]
            nodes.append(helper.make_node("Cast", [names[value.name]], [value.name], f"narrow {value.name}", to=kind))
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.name in declared:
            value.type.tensor_type.elem_type = declared[value.name]
    return result


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the subgraphs of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(subgraph)


def _is_narrow(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in _NARROW


def _mentions_narrow(graph: onnx.GraphProto) -> bool:
    """Return whether an input, an initializer or an attribute of a graph is of a 16-bit float type."""
    tensors = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors += [tensor for a in attributes for tensor in (*a.tensors, a.t)]
    named = any(a.name in _TYPE_ATTRIBUTES and a.i in _NARROW for a in attributes)
    return named or any(map(_is_narrow, graph.input)) or any(tensor.data_type in _NARROW for tensor in tensors)


def _unused(name: str, graph: onnx.GraphProto) -> str:
    """Return `name`, with underscores behind it if it is taken."""
    taken = {output for part in _graphs(graph) for node in part.node for output in node.output}
    taken |= {value.name for part in _graphs(graph) for value in (*part.input, *part.initializer)}
    while name in taken:
        name += "_"
    return name


def _widen(graph: onnx.GraphProto, base_directory: str) -> None:
    """Make fp32 of every type and constant of a graph, but for those in its subgraphs."""
    for tensor in graph.initializer:
        _widen_tensor(tensor, base_directory)
    for sparse in graph.sparse_initializer:
        _widen_tensor(sparse.values, base_directory)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _is_narrow(value):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
                _widen_tensor(tensor, base_directory)


def _widen_tensor(tensor: onnx.TensorProto, base_directory: str) -> None:
    if tensor.data_type in _NARROW:
        array = numpy_helper.to_array(tensor, base_directory)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Put other names in the place of some that nodes read and write, or that initializers have."""
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        for field in (node.input, node.output):
            renamed = [names.get(name, name) for name in field]
            del field[:]
            field.extend(renamed)
