"""Values for inputs that say sizes: random ones seldom fit the data that they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx import helper

from optimizer.certificate.inferred_shapes import inferred_shapes

Sizes = tuple[int, ...]


def size_values(model: onnx.ModelProto, shapes: Mapping[str, Sizes]) -> dict[str, Sequence[float]]:
    """Return the values of the inputs that operators take sizes from, given all inputs' shapes in a run.

    These are the shape of a Reshape, the parts of a Split, scales, sizes and region of a Resize, image and block of a
    Col2Im, where the shape of the operator's data is known.
    """
    nodes = [node for node in model.graph.node if node.op_type in _FITTING and node.domain in ("", "ai.onnx")]
    if not any(name in shapes for node in nodes for name in node.input[1:]):
        return {}
    known = inferred_shapes(model, shapes)
    values: dict[str, Sequence[float]] = {}
    for node in nodes:
        data = tuple(size for size in known.get(node.input[0], ()) if size is not None)
        if not data or len(data) != len(known[node.input[0]]):
            continue
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        for name, fitting in zip(node.input[1:], _FITTING[node.op_type], strict=False):
            if name in shapes:
                values[name] = fitting(data, math.prod(shapes[name]), attributes)
    return values


def _shape(data: Sizes, count: int, _: Mapping[str, object]) -> Sequence[float]:
    return [math.prod(data), *[1] * (count - 1)] if count else []


def _parts(data: Sizes, count: int, attributes: Mapping[str, object]) -> Sequence[float]:
    axis = attributes.get("axis", 0)
    assert isinstance(axis, int)
    part = data[axis] // count
    return [data[axis] - part * (count - 1), *[part] * (count - 1)]


def _region(data: Sizes, count: int, _: Mapping[str, object]) -> Sequence[float]:
    return [*[0.0] * len(data), *[1.0] * len(data)][:count]


def _scales(data: Sizes, count: int, attributes: Mapping[str, object]) -> Sequence[float]:
    return [2.0 if axis in _images(len(data), count) or "axes" in attributes else 1.0 for axis in range(count)]


def _sizes(data: Sizes, count: int, attributes: Mapping[str, object]) -> Sequence[float]:
    if "axes" in attributes:
        axes = attributes["axes"]
        assert isinstance(axes, list)
        return [2 * data[axis] for axis in axes]
    return [2 * size if axis in _images(len(data), count) else size for axis, size in enumerate(data)]


def _images(rank: int, count: int) -> range:
    # Batch and channels stay as they are.
    return range(min(2, rank - 1), count)


def _image(data: Sizes, count: int, attributes: Mapping[str, object]) -> Sequence[float]:
    """Return the image of which a window of one pixel has as many places as the data have columns, in one row."""
    strides = _integers(attributes, "strides", [1] * count)
    pads = _integers(attributes, "pads", [0] * 2 * count)
    places = [*[1] * (count - 1), data[-1]]
    return [(places[a] - 1) * strides[a] + 1 - pads[a] - pads[count + a] for a in range(count)]


def _block(_: Sizes, count: int, __: Mapping[str, object]) -> Sequence[float]:
    return [1] * count


def _integers(attributes: Mapping[str, object], name: str, default: list[int]) -> list[int]:
    given = attributes.get(name, default)
    assert isinstance(given, list)
    return given


# By operator, what fits each operand after the first, given the data's shape, the operand's length and the attributes.
_FITTING: dict[str, Sequence[Callable[[Sizes, int, Mapping[str, object]], Sequence[float]]]] = {
    "Reshape": (_shape,),
    "Split": (_parts,),
    "Resize": (_region, _scales, _sizes),
    "Col2Im": (_image, _block),
}
