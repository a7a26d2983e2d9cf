"""How large the integers of an input may be: less than the dimension that they index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import numpy_helper

from optimizer.certificate.inferred_shapes import Shape, inferred_shapes

_PASSED_ON = frozenset({
    "Cast", "Concat", "Dropout", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_ARITHMETIC = frozenset({"Add", "Clip", "CumSum", "Div", "Max", "Min", "Mod", "Mul", "ReduceMax", "ReduceSum", "Sub"})


def index_bounds(model: onnx.ModelProto) -> dict[str, int]:
    """Return, for each graph input whose integers select elements of some axis, the size of the smallest such axis.

    Follows the input through operators that move or cast it. Arithmetic on the way halves the bound: "position + 2"
    must still be within the table.
    """
    shapes = inferred_shapes(model)
    consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in _nodes(model.graph):
        for operand, name in enumerate(node.input):
            consumers.setdefault(name, []).append((node, operand))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    bounds: dict[str, int] = {}
    for value in model.graph.input:
        found = list(_uses(value.name, consumers, shapes, constants))
        if found:
            bounds[value.name] = max(1, min(found))
    return bounds


def _uses(
    name: str,
    consumers: Mapping[str, list[tuple[onnx.NodeProto, int]]],
    shapes: Mapping[str, Shape],
    constants: Mapping[str, onnx.TensorProto],
) -> Iterator[int]:
    """Yield the size of each axis that the value indexes, directly or after operators that pass it on."""
    pending, seen = [(name, 1)], {name}
    while pending:
        current, divisor = pending.pop()
        for node, operand in consumers.get(current, ()):
            bound = _bound(node, operand, shapes, constants)
            if bound is not None:
                yield bound // divisor
            elif node.op_type in _PASSED_ON or node.op_type in _ARITHMETIC or (node.op_type, operand) == ("Gather", 0):
                factor = 2 if node.op_type in _ARITHMETIC else 1
                new = [output for output in node.output if output and output not in seen]
                seen.update(new)
                pending += [(output, divisor * factor) for output in new]


def _bound(
    node: onnx.NodeProto, operand: int, shapes: Mapping[str, Shape], constants: Mapping[str, onnx.TensorProto]
) -> int | None:
    """Return the size of the axis that the node's operand indexes, or None if it does not index or nothing is known."""
    match node.op_type, operand:
        case (("Gather" | "GatherElements" | "ScatterElements" | "Scatter"), 1):
            return _axis_size(shapes.get(node.input[0]), _attribute(node, "axis", 0))
        case "GatherBlockQuantized", 1:
            return _axis_size(shapes.get(node.input[0]), _attribute(node, "gather_axis", 0))
        case (("GatherND" | "ScatterND"), 1):
            known = [size for size in shapes.get(node.input[0], ()) if size is not None]
            return min(known, default=None)
        case "OneHot", 0:
            depth = constants.get(node.input[1])
            return None if depth is None else int(numpy_helper.to_array(depth).item())
        case "EmbedLayerNormalization", (0 | 1):
            return _axis_size(shapes.get(node.input[2 if operand == 0 else 4]), 0)
        case "RotaryEmbedding", 1 if node.domain == "com.microsoft":
            return _axis_size(shapes.get(node.input[2]), 0)
        case "RotaryEmbedding", 3:
            return _axis_size(shapes.get(node.input[1]), 0)
        case "TensorScatter", 2:
            return 1
        case "RoiAlign", 2:
            return _axis_size(shapes.get(node.input[0]), 0)
        case (("GRU" | "LSTM" | "RNN"), 4):
            return _axis_size(shapes.get(node.input[0]), 0)
        case "ReverseSequence", 1:
            return _axis_size(shapes.get(node.input[0]), _attribute(node, "time_axis", 0))
    return None


def _axis_size(shape: Shape | None, axis: int) -> int | None:
    return shape[axis] if shape and -len(shape) <= axis < len(shape) else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the graph and of all its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(subgraph)
