"""The steps that all methods share: groups of a matrix, scales of the range, codes for given scales."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from passes.quantization.scheme import SCALE_DTYPES, Scheme, SchemeError

Array = NDArray[np.floating]


def in_groups(matrix: NDArray[np.generic], scheme: Scheme) -> Array:
    """Return [N, K] as float32 [N, G, group]; the last group is filled up with zeros."""
    size = scheme.group_of(matrix.shape[1])
    padded = np.pad(matrix.astype(np.float32), [(0, 0), (0, -matrix.shape[1] % size)])
    return padded.reshape(len(matrix), -1, size)


def storable(scales: Array, scheme: Scheme) -> Array:
    """Return scales as the scheme's type can hold them; raises SchemeError for one beyond its range."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(SCALE_DTYPES[scheme.scale_dtype]).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise SchemeError(f"a weight is not finite or too large for {scheme.scale_dtype} scales; choose float32")
    return rounded


def range_scales(groups: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Return scales and zero points [N, G] that span each group's range.

    Symmetric: the element of largest magnitude, with its sign, becomes code 0, which lies one step further out than
    the last code (llama.cpp's Q4_0). Else the range, extended to hold zero, is cut into levels - 1 steps, and zero is
    a code (Jacob et al., Quantization and Training of Neural Networks, 2018, section 2.1).
    """
    if scheme.symmetric:
        position = np.abs(groups).argmax(-1)[..., None]
        extreme = np.take_along_axis(groups, position, -1)[..., 0]
        return storable(extreme / -scheme.middle, scheme), np.full(extreme.shape, scheme.middle, np.float32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = storable((high - low) / (scheme.levels - 1), scheme)
    return scales, np.rint(-low * inverse(scales))


def inverse(scales: Array) -> Array:
    """Return 1 / scale, and 0 for the scale 0 of a group whose elements all become zero."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def codes_of(groups: Array, scales: Array, zero_points: Array, scheme: Scheme) -> Array:
    """Return the codes nearest to each element, as whole float32 numbers [N, G, group]."""
    steps = groups * inverse(scales)[..., None] + zero_points[..., None]
    return np.clip(np.rint(steps), 0, scheme.levels - 1)


def errors_of(groups: Array, codes: Array, scales: Array, zero_points: Array) -> Array:
    """Return what dequantization lacks of each element: w - (code - zero point) * scale."""
    return groups - (codes - zero_points[..., None]) * scales[..., None]
