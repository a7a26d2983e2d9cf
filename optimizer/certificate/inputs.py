"""Inputs for a model: random where anything goes, meaningful where a model asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer.certificate.graph_inputs import GraphInput, evaluate, graph_inputs, past_and_sequence, settings
from optimizer.certificate.index_bounds import index_bounds
from optimizer.certificate.size_values import size_values

Array = NDArray[np.generic]

_UNBOUNDED_INDEX = 8
"""Integers of 32 or 64 bits that nothing is known of stay below this: they may be counts or sizes."""
_NARROW_RANGES = {"int4": (-8, 8), "uint4": (0, 16)}


def make_inputs(
    model: onnx.ModelProto,
    seed: int,
    symbol_values: Mapping[str, int] | None = None,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    padded: bool = False,
) -> dict[str, Array]:
    """Return an array for each input of the graph; equal arguments give equal arrays.

    Floats are standard normal in their dtype. Integers are below the size of the axis that they index, and say sizes
    that the data have where an operator takes them (`size_values`). Masks are ones,
    with `padded` the last position of the first row zero. Positions count on from the past. `symbol_values` gives the
    symbolic dimensions (by default those of `graph_inputs.settings`), `shapes` overrides declared shapes by input name.
    """
    inputs = graph_inputs(model, shapes)
    values = dict(symbol_values) if symbol_values is not None else next(settings(inputs, 0))
    bounds = index_bounds(model)
    generator = np.random.default_rng(seed)
    past, sequence = past_and_sequence(inputs, values)
    arrays: dict[str, Array] = {}
    all_shapes = {each.name: tuple(evaluate(dim, values) for dim in each.dims) for each in inputs}
    sizes = size_values(model, all_shapes)
    for each in inputs:
        shape = all_shapes[each.name]
        if each.name in sizes:
            arrays[each.name] = np.reshape(np.asarray(sizes[each.name], _numpy_dtype(each)), shape)
            continue
        fixed = _meaningful(each, shape, past, sequence, bounds.get(each.name), padded=padded)
        arrays[each.name] = _random(each, shape, generator, bounds.get(each.name)) if fixed is None else fixed
    return arrays


def _meaningful(
    each: GraphInput, shape: tuple[int, ...], past: int, sequence: int, bound: int | None, *, padded: bool
) -> Array | None:
    """Return the values that an input must have by its name, or None where random ones will do."""
    dtype = _numpy_dtype(each)
    if dtype.kind not in "iub":
        return None
    name = each.name.lower()
    if "mask" in name:
        mask = np.ones(shape, dtype)
        if padded and mask.ndim and mask.size and mask.shape[-1] > 1:
            mask[(0,) * (mask.ndim - 1) + (-1,)] = 0
        return mask
    if "seqlens_k" in name:
        return np.full(shape, past + sequence - 1, dtype)
    if "total_seq" in name:
        return np.full(shape, past + sequence, dtype)
    if "position" in name and shape:
        positions = past + np.arange(shape[-1])
        return np.broadcast_to(positions % bound if bound else positions, shape).astype(dtype)
    return None


def _random(each: GraphInput, shape: tuple[int, ...], generator: np.random.Generator, bound: int | None) -> Array:
    dtype = _numpy_dtype(each)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.name in _NARROW_RANGES:
        return generator.integers(*_NARROW_RANGES[dtype.name], shape).astype(dtype)
    if dtype.kind in "iu":
        low, high = (0, bound or _UNBOUNDED_INDEX)
        if bound is None and dtype.itemsize < 4:
            low, high = np.iinfo(dtype.name).min, np.iinfo(dtype.name).max + 1
        return generator.integers(low, high, shape).astype(dtype)
    return np.asarray(generator.standard_normal(shape)).astype(dtype)


def _numpy_dtype(each: GraphInput) -> np.dtype[np.generic]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(each.element_type))
