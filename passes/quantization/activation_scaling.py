"""AWQ: columns of weights that meet large inputs are enlarged before they are rounded, and the inputs made smaller.

Lin et al., AWQ, 2023, section 3.2: with x the inputs' magnitude per column, the factors are s = x ** alpha, alpha from
a grid over [0, 1] by the error of the outputs. Magnitudes here are root mean squares, which the second moments give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from passes.quantization.error_feedback import output_error
from passes.quantization.fitted import FittedMatrix
from passes.quantization.grouping import Array
from passes.quantization.methods import quantize
from passes.quantization.scheme import Scheme

EXPONENTS = tuple(step / 10 for step in range(11))
_SMALLEST = 1e-4


def scale_columns(matrices: Sequence[NDArray[np.generic]], moments: Array, scheme: Scheme) -> list[FittedMatrix]:
    """Return matrices [N, K] quantized with one set of factors: they read the same inputs, of second moments [K, K].

    Of all exponents the one whose outputs have the least squared error is taken; 0 leaves the columns as they are.
    Raises SchemeError where the scales' type overflows.
    """
    best: list[FittedMatrix] = []
    least = np.inf
    for exponent in EXPONENTS:
        factors = _factors(moments, exponent)
        fitted = [quantize(matrix.astype(np.float32) * factors, scheme, "minimum-error") for matrix in matrices]
        pairs = zip(matrices, fitted, strict=True)
        error = sum(output_error(matrix, each.dequantized() / factors, moments) for matrix, each in pairs)
        if error < least:
            inputs = None if exponent == 0 else (1 / factors).astype(np.float32)
            best, least = [FittedMatrix(each, inputs) for each in fitted], error
    return best


def _factors(moments: Array, exponent: float) -> Array:
    """Return factors around 1: their geometric middle is that of the largest and the smallest."""
    magnitude = np.sqrt(np.diag(moments).astype(np.float64))
    magnitude = np.maximum(magnitude / (magnitude.mean() or 1), _SMALLEST)
    factors = magnitude**exponent
    return (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
