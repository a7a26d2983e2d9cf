"""Evaluation at compile time of nodes whose inputs are all constant, by the ONNX reference evaluator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from optimizer.frontend.node import Node, UnsupportedNodeError
from optimizer.frontend.value import NARROW_TYPES, ConstantValue

# A result may be this much larger than the inputs (fp16 -> fp32 and int4 -> fp32 widen) ...
_GROWTH = 8
# ... or this small in any case.
_SMALL_BYTES = 64 * 1024
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
# Operators whose result can be far larger than their inputs, with the input that gives the size.
_GROWING = {"Expand": 1, "ConstantOfShape": 0, "Tile": 1, "Range": 1}


def evaluate(node: Node) -> list[ConstantValue] | None:
    """Return the outputs of a node whose inputs are all constant, or None if it is to be left to the module.

    What would grow the constants without a gain (an Expand of a scalar to a large tensor) is left alone, and so are
    quantized matrices and filters, whose products are computed from the integers.
    """
    constants = _constant_inputs(node)
    if constants is None or node.domain != "" or node.operator in _RANDOM or _grows_too_much(node, constants):
        return None
    if node.operator == "DequantizeLinear" and constants[0] is not None and constants[0].ndim >= 2:
        return None
    if any(attribute.HasField("g") for attribute in node.proto.attribute):
        return None
    try:
        results = _run(node, constants)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return None  # the reference evaluator lacks the case; the converter decides
    if not all(isinstance(result, (np.ndarray, np.generic)) for result in results):
        return None
    arrays = [np.asarray(result) for result in results]
    if any(array.dtype.kind in "OUS" for array in arrays):
        return None
    given = sum(array.nbytes for array in constants if array is not None)
    if sum(array.nbytes for array in arrays) > max(_SMALL_BYTES, _GROWTH * given):
        return None
    return [ConstantValue(array) for array in arrays]


def constant_node(node: Node) -> np.ndarray:
    """Return the value of a Constant node."""
    if node.has_attribute("value"):
        return node.tensor("value")
    if node.has_attribute("value_float"):
        return np.array(node.float("value_float"), np.float32)
    if node.has_attribute("value_floats"):
        return np.array(node.floats("value_floats"), np.float32)
    if node.has_attribute("value_int"):
        return np.array(node.integer("value_int"), np.int64)
    if node.has_attribute("value_ints"):
        return np.array(node.integers("value_ints"), np.int64)
    if node.has_attribute("sparse_value"):
        return dense_array(next(a for a in node.proto.attribute if a.name == "sparse_value").sparse_tensor)
    raise UnsupportedNodeError("constants of strings are not supported")


def dense_array(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """Return a sparse tensor in dense form."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.ravel()[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _constant_inputs(node: Node) -> list[np.ndarray | None] | None:
    """Return the inputs in their ONNX types (None for one not given), or None if one is not constant."""
    arrays: list[np.ndarray | None] = []
    for value in node.inputs:
        if value is None:
            arrays.append(None)
        elif isinstance(value, ConstantValue):
            narrow = value.narrow_type
            arrays.append(value.constant.astype(NARROW_TYPES[narrow][0]) if narrow else value.constant)
        else:
            return None
    return arrays if any(array is not None for array in arrays) else None


def _grows_too_much(node: Node, constants: Sequence[np.ndarray | None]) -> bool:
    size_input = _GROWING.get(node.operator)
    if size_input is None or size_input >= len(constants):
        return False
    sizes = constants[size_input]
    if sizes is None or sizes.dtype.kind not in "iu":
        return False
    if node.operator == "Range":
        return int(sizes) * 8 > _SMALL_BYTES
    start = 1 if node.operator != "Tile" or constants[0] is None else constants[0].size
    given = sum(array.nbytes for array in constants if array is not None)
    return start * math.prod(int(size) for size in sizes.ravel()) > max(_SMALL_BYTES, _GROWTH * given)


def _run(node: Node, constants: Sequence[np.ndarray | None]) -> Sequence[object]:
    names = [name if array is not None else "" for name, array in zip(node.proto.input, constants, strict=True)]
    feeds = {name: array for name, array in zip(names, constants, strict=True) if array is not None}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.proto.output if name]
    graph = helper.make_graph([node.proto], "constant", inputs, outputs)
    opset = helper.make_opsetid(node.domain, node.version)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        results = iter(ReferenceEvaluator(helper.make_model(graph, opset_imports=[opset])).run(None, feeds))
    return [next(results) if name else np.zeros(0, ml_dtypes.bfloat16) for name in node.proto.output]
