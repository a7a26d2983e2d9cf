"""The shapes of a model's values, as far as they follow from those of its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import onnx
from onnx import external_data_helper, helper, shape_inference

_INFERENCE_LIMIT = 512 << 20
"""Bytes of model, without its weights, up to which shapes are inferred; inference copies the model twice."""
_SMALL_BYTES = 4096
"""Initializers up to this size may hold shapes, which inference reads."""

Shape = tuple[int | None, ...]


def inferred_shapes(model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None) -> dict[str, Shape]:
    """Return the known shapes of values; None stands for a size that is not known.

    `given` are the shapes of inputs in one run, in the place of those that the model declares.
    """
    graph = model.graph
    light = _without_weights(model)
    declared = {value.name: value for value in light.graph.input}
    for name, shape in (given or {}).items():
        kind = declared[name].type.tensor_type.elem_type
        declared[name].CopyFrom(helper.make_tensor_value_info(name, kind, shape))
    if light.ByteSize() <= _INFERENCE_LIMIT:
        with contextlib.suppress(shape_inference.InferenceError):  # the declared shapes are still of use
            graph = shape_inference.infer_shapes(light).graph
    shapes: dict[str, Shape] = {}
    for value in (*graph.value_info, *graph.input):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                shapes[node.output[0]] = tuple(attribute.t.dims)
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with inputs in the place of large initializers: inference copies all that it is given, twice."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES and not external_data_helper.uses_external_data(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light
