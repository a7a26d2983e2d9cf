"""Standard ONNX operators as building blocks: a fused operator is imported as the operators that it fuses."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import helper

from optimizer.frontend.node import Node
from optimizer.frontend.value import Value

OPSET = 24  # whose meaning the building blocks have
Attribute = int | float | str | Sequence[int]


def standard(node: Node, operator: str, *inputs: Value | None, **attributes: Attribute) -> Value:
    """Emit a standard operator with one output in the place of `node`; None stands for an input not given."""
    return standard_outputs(node, operator, inputs, 1, **attributes)[0]


def standard_outputs(
    node: Node, operator: str, inputs: Sequence[Value | None], count: int, **attributes: Attribute
) -> list[Value]:
    """Emit a standard operator with `count` outputs in the place of `node`."""
    names = [f"{node.output_hint}_{operator.lower()}_{index}" for index in range(count)]
    arguments = [f"input_{index}" if value is not None else "" for index, value in enumerate(inputs)]
    proto = helper.make_node(operator, arguments, names)
    proto.attribute.extend(helper.make_attribute(name, value) for name, value in sorted(attributes.items()))
    results = node.graph.convert(Node(proto, OPSET, inputs, node.graph))
    return [result for result in results if isinstance(result, Value)]


def as_standard(node: Node, operator: str, **attributes: Attribute) -> Value:
    """Emit the standard operator that `node` is another name of, with the node's inputs."""
    return standard(node, operator, *(node.optional_input(index) for index in range(len(node.inputs))), **attributes)
