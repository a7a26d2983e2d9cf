"""Weights fitted to the inputs that they are multiplied with: GPTQ, then coordinate descent over codes and scales.

With the second moments H = sum over tokens of x x^T of a product's inputs, the squared error of its outputs is, for
each row w of the matrix and its rounded form v, (w - v) H (w - v)^T: rows do not depend on each other.

- Frantar et al., GPTQ, 2022, sections 2 and 3 and algorithm 1: columns are rounded in order; what rounding one of them
  adds is taken up by those that are still to come, by the Cholesky factor U of the inverse of H. Scales of a group are
  chosen when its first column is due, of the weights as they are then. H gets a share of its mean diagonal as damping
  (section 3.3).
- Behdin et al., QuantEase, 2023, section 3: every code in turn is set to the best one for all others as they are, which
  never adds error. Before that each group's scale and zero point are refitted to its codes by least squares under H.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from passes.quantization.grouping import Array, inverse, storable
from passes.quantization.methods import Parameters, Parts, as_matrix, in_row_chunks, minimum_error
from passes.quantization.scheme import QuantizedMatrix, Scheme

# Five times that of GPTQ: some thousand tokens leave more of H to chance than its 128 texts of 2048 do.
DAMPING = 0.05
SWEEPS = 4
# The weight of columns that fill up the last group: they multiply nothing.
_NOTHING = 1e-6
# Columns whose feedback is gathered before it goes to all later ones, as in GPTQ, section 3.3.
BLOCK = 128


def fit_to_inputs(
    matrix: NDArray[np.generic], moments: Array, scheme: Scheme, *, damping: float = DAMPING, sweeps: int = SWEEPS
) -> QuantizedMatrix:
    """Return a float matrix [N, K] quantized for inputs with second moments [K, K] (a sum over tokens, any scale).

    The squared error of outputs over those inputs is at most that of GPTQ alone, which `sweeps` = 0 gives. Raises
    SchemeError where the scales' type overflows.
    """
    size = scheme.group_of(matrix.shape[1])
    second = _damped(moments, -(-matrix.shape[1] // size) * size, damping)
    upper = _feedback(second)

    def fit(rows: NDArray[np.generic]) -> Parts:
        turned = np.zeros((len(second), len(rows)), np.float32)
        turned[: rows.shape[1]] = rows.T
        fitted = _Fit(turned, second, scheme, size)
        fitted.round_with_feedback(upper)
        for _ in range(sweeps):
            fitted.descend()
        return fitted.result()

    return as_matrix(in_row_chunks(matrix, fit), matrix.shape[1], scheme)


def output_error(matrix: NDArray[np.generic], rounded: NDArray[np.generic], moments: Array) -> float:
    """Return the squared error of the outputs of a rounded matrix [N, K] over inputs with second moments [K, K]."""
    error = matrix.astype(np.float32) - rounded.astype(np.float32)
    return float(np.einsum("nk,nk->", error @ moments.astype(np.float32), error))


def _damped(moments: Array, size: int, damping: float) -> Array:
    """Return moments of `size` inputs, those past K being independent, in units of their mean, with damping."""
    diagonal = np.diag(moments).astype(np.float64)
    mean = float(diagonal.mean()) or 1.0
    second = np.zeros((size, size), np.float32)
    second[: len(moments), : len(moments)] = moments / mean
    places = np.arange(size)
    second[places, places] += np.float32(damping)
    second[places[len(moments) :], places[len(moments) :]] = _NOTHING
    return second


def _feedback(second: Array) -> Array:
    """Return the upper Cholesky factor of the inverse of H, each row divided by its diagonal element.

    H = L L^T of the reversed order gives the inverse's factor without inverting H: with J the reversal and
    J H J = L L^T, the inverse of H is U^T U for U = J L^-1 J, which is upper triangular.
    """
    lower = np.linalg.cholesky(second[::-1, ::-1].astype(np.float64))
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return np.ascontiguousarray(upper / np.diag(upper)[:, None], np.float32)


class _Fit:
    """The fit of some rows; arrays are turned, [K, N] and [G, N], so that a column's codes lie together."""

    def __init__(self, weights: Array, second: Array, scheme: Scheme, size: int) -> None:
        self._weights = weights
        self._second = second
        self._scheme = scheme
        self._size = size
        self._codes = np.zeros_like(weights)
        self._scales = np.zeros((len(weights) // size, weights.shape[1]), np.float32)
        self._zeros = np.zeros_like(self._scales)

    def result(self) -> Parts:
        """Return codes [N, K], scales and zero points [N, G]."""
        return np.ascontiguousarray(self._codes.T.astype(np.uint8)), self._scales.T, self._zeros.T

    def round_with_feedback(self, upper: Array) -> None:
        """Choose scales and codes, each column's error being taken up by later ones (GPTQ)."""
        left = self._weights.copy()
        block = max(BLOCK, self._size)
        for first in range(0, len(left), block):
            last = min(first + block, len(left))
            errors = np.zeros((last - first, left.shape[1]), np.float32)
            for column in range(first, last):
                group, place = divmod(column, self._size)
                if place == 0:
                    self._scales[group], self._zeros[group] = self._parameters(left[column : column + self._size])
                rounded = self._round(column, left[column], group)
                errors[column - first] = left[column] - rounded
                left[column + 1 : last] -= upper[column, column + 1 : last, None] * errors[column - first]
            left[last:] -= upper[first:last, last:].T @ errors

    def _parameters(self, columns: Array) -> Parameters:
        scales, zeros = minimum_error(np.ascontiguousarray(columns.T)[:, None], self._scheme)
        return scales[:, 0], zeros[:, 0]

    def _round(self, column: int, wanted: Array, group: int) -> Array:
        """Set the codes of a column to the nearest of what is wanted, and return what they stand for."""
        steps = wanted * inverse(self._scales[group]) + self._zeros[group]
        self._codes[column] = np.clip(np.rint(steps), 0, self._scheme.levels - 1)
        return (self._codes[column] - self._zeros[group]) * self._scales[group]

    def _values(self, group: int) -> Array:
        return (self._codes[self._columns(group)] - self._zeros[group]) * self._scales[group]

    def _columns(self, group: int) -> slice:
        return slice(group * self._size, (group + 1) * self._size)

    def descend(self) -> None:
        """Refit each group's scale and zero point, and set each of its codes to the best one, groups in order."""
        groups = range(len(self._scales))
        error = self._weights - np.concatenate([self._values(group) for group in groups])
        residual = self._second @ error
        changes = np.zeros_like(residual)
        settled = 0  # columns whose changes later ones have been told of
        block = max(BLOCK, self._size)
        for group in groups:
            columns = self._columns(group)
            inner = np.ascontiguousarray(self._second[columns, columns])
            before = self._values(group)
            local = (
                residual[columns] - self._second[columns, settled : columns.start] @ changes[settled : columns.start]
            )
            self._refit(group, local, inner)
            local -= inner @ (self._values(group) - before)
            for place, column in enumerate(range(columns.start, columns.stop)):
                value = (self._codes[column] - self._zeros[group]) * self._scales[group]
                change = self._round(column, value + local[place] / inner[place, place], group) - value
                local -= inner[:, place, None] * change
            changes[columns] = self._values(group) - before
            if columns.stop - settled >= block:  # what lies before is settled until the next sweep
                told = slice(settled, columns.stop)
                residual[columns.stop :] -= self._second[columns.stop :, told] @ changes[told]
                settled = columns.stop

    def _refit(self, group: int, local: Array, inner: Array) -> None:
        """Set a group's scale (and zero point) to the best for its codes, where that does not add error.

        `local` is the part of H (w - v) that belongs to the group. For a change d of its values the error changes by
        d inner d - 2 d local, with d = a * codes + b (b = 0 for a symmetric scheme) a problem of least squares.
        """
        codes, scales, zeros = self._codes[self._columns(group)], self._scales[group], self._zeros[group]
        before = self._values(group)
        centered = codes - (zeros if self._scheme.symmetric else codes.mean(0))
        fitted, offset = _least_squares(centered, local, inner, shifted=not self._scheme.symmetric)
        new_scales = storable(scales + fitted, self._scheme)
        new_zeros = zeros
        if not self._scheme.symmetric:
            # v = scale * (code - zero), and the sum of it and a * (code - mean) + b in the same form.
            constant = scales * zeros + fitted * codes.mean(0) - offset
            new_zeros = storable(np.where(new_scales == 0, zeros, constant * inverse(new_scales)), self._scheme)
        change = (codes - new_zeros) * new_scales - before
        added = np.einsum("kn,kn->n", inner @ change - 2 * local, change)
        better = added < 0
        self._scales[group] = np.where(better, new_scales, scales)
        self._zeros[group] = np.where(better, new_zeros, zeros)


def _least_squares(steps: Array, local: Array, inner: Array, *, shifted: bool) -> Parameters:
    """Return a and b per row that minimize d inner d - 2 d local for d = a * steps + b; b = 0 unless `shifted`."""
    spread = inner @ steps
    aa, la = np.einsum("kn,kn->n", spread, steps), np.einsum("kn,kn->n", local, steps)
    if not shifted:
        return np.divide(la, aa, out=np.zeros_like(la), where=aa > 0), np.zeros_like(la)
    ab, lb, bb = spread.sum(0), local.sum(0), float(inner.sum())
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-6 * aa * bb
    divisor = np.where(sound, determinant, 1)
    return np.where(sound, (la * bb - lb * ab) / divisor, 0), np.where(sound, (lb * aa - la * ab) / divisor, 0)
