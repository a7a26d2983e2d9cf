"""Ways to choose scales and zero points of a matrix without any data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from passes.quantization.grouping import Array, codes_of, errors_of, in_groups, inverse, range_scales, storable
from passes.quantization.scheme import SCALE_DTYPES, QuantizedMatrix, Scheme, SchemeError

# Elements that are quantized at a time, which bounds the memory of temporaries.
CHUNK_ELEMENTS = 1 << 21

# Fractions of the range that clipping tries; beyond 1 the extreme element moves off the last code.
SHRINKS = tuple(np.linspace(0.6, 1.1, 21, dtype=np.float32).tolist())
REFITS = 2

# Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023: the norm's exponent, the
# weight of the splitting's penalty and its growth, as in their reference settings.
HQQ_EXPONENT = 0.7
HQQ_PENALTY = 10.0
HQQ_GROWTH = 1.01
HQQ_STEPS = 20

Parameters = tuple[Array, Array]
Parts = tuple[NDArray[np.uint8], Array, Array]
Method = Callable[[Array, Scheme], Parameters]


def round_to_nearest(groups: Array, scheme: Scheme) -> Parameters:
    """Span each group's range: no element is clipped."""
    return range_scales(groups, scheme)


def minimum_error(groups: Array, scheme: Scheme) -> Parameters:
    """Minimize the squared error of each group over clipped ranges, each refitted to its codes.

    For fixed codes q the best scale is a least-squares solution: of w = s * (q - z) for a symmetric scheme, and of
    w = s * q + b with z = -b / s otherwise. Codes and fit alternate from every clipped range; neither step adds error
    but for the rounding of scales, and the best that occurred is kept.
    """
    start_scales, start_zeros = range_scales(groups, scheme)
    best_scales, best_zeros = start_scales, start_zeros
    least = _squared_error(groups, best_scales, best_zeros, scheme)
    for shrink in SHRINKS:
        scales = storable(start_scales * np.float32(shrink), scheme)
        zeros = start_zeros if scheme.symmetric else _middle_of_range(groups, scales, scheme)
        for _ in range(REFITS + 1):
            error = _squared_error(groups, scales, zeros, scheme)
            better = error < least
            least = np.where(better, error, least)
            best_scales, best_zeros = np.where(better, scales, best_scales), np.where(better, zeros, best_zeros)
            scales, zeros = _refitted(groups, scales, zeros, scheme)
    return best_scales, best_zeros


def half_quadratic(groups: Array, scheme: Scheme) -> Parameters:
    """Choose zero points that minimize the sum of |error| ** 0.7 of each group (HQQ), with the scales of the range.

    The norm below 1 forgives outliers. Half-quadratic splitting: e = shrink(w - dequantized) is the part of the error
    that is given up, z = mean(q - (w - e) / s) fits the rest, while the penalty on the difference grows.
    """
    if scheme.symmetric:
        raise SchemeError("HQQ chooses zero points; take a scheme that is not symmetric")
    scales, zeros = range_scales(groups, scheme)
    penalty = HQQ_PENALTY
    best, least = zeros, np.full(zeros.shape, np.inf, np.float32)
    for _ in range(HQQ_STEPS):
        codes = codes_of(groups, scales, zeros, scheme)
        error = errors_of(groups, codes, scales, zeros)
        total = (np.abs(error) ** HQQ_EXPONENT).sum(-1)
        better = total < least
        best, least = np.where(better, zeros, best), np.where(better, total, least)
        given_up = _shrink(error, penalty)
        fitted = (codes - (groups - given_up) * inverse(scales)[..., None]).mean(-1)
        zeros = storable(np.where(scales == 0, zeros, fitted), scheme)
        penalty *= HQQ_GROWTH
    return scales, best


METHODS: dict[str, Method] = {"rtn": round_to_nearest, "minimum-error": minimum_error, "hqq": half_quadratic}


def quantize(matrix: NDArray[np.generic], scheme: Scheme, method: str = "rtn") -> QuantizedMatrix:
    """Return a float matrix [N, K] quantized by one of METHODS.

    Rows do not depend on each other. Raises SchemeError for an unknown method, and where the scales' type overflows.
    """
    if method not in METHODS:
        raise SchemeError(f"unknown method '{method}'; choose one of {', '.join(METHODS)}")
    choose = METHODS[method]

    def quantized(rows: NDArray[np.generic]) -> Parts:
        groups = in_groups(rows, scheme)
        scales, zeros = choose(groups, scheme)
        codes = codes_of(groups, scales, zeros, scheme)
        return codes.astype(np.uint8).reshape(len(rows), -1), scales, zeros

    return as_matrix(in_row_chunks(matrix, quantized), matrix.shape[1], scheme)


def in_row_chunks(matrix: NDArray[np.generic], quantized: Callable[[NDArray[np.generic]], Parts]) -> Parts:
    """Return what `quantized` gives for rows of a matrix [N, K], some at a time: codes [N, K], the rest [N, G]."""
    rows = max(1, CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    parts = [quantized(matrix[first : first + rows]) for first in range(0, len(matrix), rows)]
    codes = np.concatenate([codes for codes, _, _ in parts])
    return codes, np.concatenate([scales for _, scales, _ in parts]), np.concatenate([zeros for _, _, zeros in parts])


def as_matrix(parts: Parts, inputs: int, scheme: Scheme) -> QuantizedMatrix:
    """Return codes [N, G * group], scales and zero points [N, G] as a quantized matrix of `inputs` columns."""
    codes, scales, zeros = parts
    whole = scheme.symmetric or np.array_equal(zeros, np.clip(np.rint(zeros), 0, scheme.levels - 1))
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    zero_points = None if scheme.symmetric else zeros.astype(np.uint8 if whole else dtype)
    return QuantizedMatrix(scheme.bits, scheme.group_of(inputs), inputs, codes, scales.astype(dtype), zero_points)


def _squared_error(groups: Array, scales: Array, zeros: Array, scheme: Scheme) -> Array:
    error = errors_of(groups, codes_of(groups, scales, zeros, scheme), scales, zeros)
    return np.einsum("ngk,ngk->ng", error, error)


def _middle_of_range(groups: Array, scales: Array, scheme: Scheme) -> Array:
    """Return zero points that put the middle of each group's range into the middle of the codes."""
    middle = (groups.min(-1) + groups.max(-1)) / 2
    return storable((scheme.levels - 1) / 2 - middle * inverse(scales), scheme)


def _refitted(groups: Array, scales: Array, zeros: Array, scheme: Scheme) -> Parameters:
    """Return the least-squares scales (and zero points) for the codes that the given ones lead to."""
    codes = codes_of(groups, scales, zeros, scheme)
    if scheme.symmetric:
        steps = codes - zeros[..., None]
        slope = np.einsum("ngk,ngk->ng", steps, groups)
        norm = np.einsum("ngk,ngk->ng", steps, steps)
        fitted = np.divide(slope, norm, out=scales.copy(), where=norm != 0)
        return storable(fitted, scheme), zeros
    centered = codes - codes.mean(-1, keepdims=True)
    slope, norm = np.einsum("ngk,ngk->ng", centered, groups), np.einsum("ngk,ngk->ng", centered, centered)
    fitted = storable(np.divide(slope, norm, out=scales.copy(), where=norm != 0), scheme)
    offset = codes.mean(-1) - groups.mean(-1) * inverse(fitted)
    return fitted, storable(np.where(fitted == 0, zeros, offset), scheme)


def _shrink(error: Array, penalty: float) -> Array:
    """Return the proximal step of the norm with exponent p: sign(x) * max(|x| - |x| ** (p - 1) / penalty, 0)."""
    magnitude = np.abs(error)
    with np.errstate(divide="ignore"):
        return np.sign(error) * np.maximum(magnitude - magnitude ** (HQQ_EXPONENT - 1) / penalty, 0)
