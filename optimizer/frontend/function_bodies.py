"""Operators without a converter of their own, expanded into the function body that their ONNX schema gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import defs, helper

from optimizer.frontend.dimensions import static_shape
from optimizer.frontend.node import Node
from optimizer.frontend.value import AnyValue, Value, numpy_dtype


def expand(node: Node) -> list[AnyValue | None] | None:
    """Import the schema's function body of `node` in its place; return its outputs, or None if there is no body."""
    function = _schema_function(node)
    if function is None:
        return None
    attributes = {attribute.name: attribute for attribute in node.proto.attribute}
    for name, declared in defs.get_schema(node.operator, node.version, node.domain).attributes.items():
        if name not in attributes and declared.default_value.name:
            attributes[name] = declared.default_value
    return node.graph.import_function(function, attributes, node.inputs)


def bound_nodes(
    function: onnx.FunctionProto, attributes: Mapping[str, onnx.AttributeProto]
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a function body with references to its attributes replaced by their values."""
    for original in function.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        kept = [bound for bound in (_bound(a, attributes) for a in node.attribute) if bound is not None]
        del node.attribute[:]
        node.attribute.extend(kept)
        yield node


def _bound(attribute: onnx.AttributeProto, attributes: Mapping[str, onnx.AttributeProto]) -> onnx.AttributeProto | None:
    if not attribute.ref_attr_name:
        return attribute
    given = attributes.get(attribute.ref_attr_name)
    if given is None:
        return None
    bound = onnx.AttributeProto()
    bound.CopyFrom(given)
    bound.name = attribute.name
    return bound


def has_body(domain: str, operator: str, version: int) -> bool:
    """Return whether an operator's schema has a function body, if only for some types."""
    try:
        schema: Any = defs.get_schema(operator, version, domain)
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _schema_function(node: Node) -> onnx.FunctionProto | None:
    try:
        # The extension module's type stub leaves out what concerns functions.
        schema: Any = defs.get_schema(node.operator, node.version, node.domain)
    except defs.SchemaError:
        return None
    if schema.has_context_dependent_function:
        types = [_type_proto(value).SerializeToString() for value in node.inputs]
        body = schema.get_context_dependent_function(node.proto.SerializeToString(), types)
        return onnx.FunctionProto.FromString(body) if body else None
    return schema.function_body if schema.has_function else None


def _type_proto(value: AnyValue | None) -> onnx.TypeProto:
    if not isinstance(value, Value):
        return onnx.TypeProto()
    element_type = value.narrow_type or helper.np_dtype_to_tensor_dtype(numpy_dtype(value.dtype))
    return helper.make_tensor_type_proto(element_type, static_shape(value.shape) or [None] * value.rank)
