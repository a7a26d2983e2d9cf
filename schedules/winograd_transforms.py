"""The transforms of Winograd's minimal filtering F(m, 3): m outputs of a filter of 3 taps in m + 2 multiplications.

With y = A [(G g) * (B d)], where d are m + 2 neighbouring inputs and g the taps, and both axes of an image treated so,
m x m outputs of a 3x3 filter take (m + 2)^2 multiplications instead of 9 m^2. (Lavin and Gray, Fast Algorithms for
Convolutional Neural Networks, CVPR 2016; the matrices by Toom and Cook: Barabasz, Anderson, Soodhalter and Gregg, Error
Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, ACM TOMS 46(4), 2020.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

TAPS = 3
Matrix = tuple[tuple[float, ...], ...]

# The points at which the polynomials are evaluated, beside infinity. Those for m = 4 have the least amplification among
# pairs of short binary fractions: 8.2, where the usual (0, 1, -1, 2, -2) have 31.
_POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}


@dataclass(frozen=True)
class Transforms:
    """B (`data`), G (`weights`) and A (`outputs`) of F(`tile`, 3); those of data and outputs are exact in fp32."""

    tile: int
    data: Matrix
    weights: Matrix
    outputs: Matrix

    @property
    def window(self) -> int:
        """The number of inputs along an axis, and of multiplications."""
        return self.tile + TAPS - 1

    @property
    def amplification(self) -> float:
        """How many times larger errors become than those of the sums of products themselves, for random data.

        An element of the products has the variance of its data's and its weights' transform, and all of them are added
        up, in both axes, where the direct sum has that of the taps.
        """

        def norm(row: Sequence[float]) -> float:
            return sum(value * value for value in row)

        scales = [norm(g) * norm(b) for g, b in zip(self.weights, self.data, strict=True)]
        # The root of the variance's growth, squared for two axes.
        return max(sum(a * a * s for a, s in zip(row, scales, strict=True)) for row in self.outputs) / TAPS


SIZES = tuple(sorted(_POINTS))


@cache
def transforms(tile: int) -> Transforms:
    """Return the transforms of F(`tile`, 3), one of `SIZES`."""
    points = _POINTS[tile]
    window = tile + TAPS - 1
    weights, data = [], []
    for number, point in enumerate(points):
        others = [other for position, other in enumerate(points) if position != number]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        weights.append([point**power / scale for power in range(TAPS)])
        data.append([*_expanded(others), Fraction(0)])
    weights.append([*[Fraction(0)] * (TAPS - 1), Fraction(1)])
    data.append(_expanded(points))
    outputs = [[point**power for point in points] + [Fraction(power == tile - 1)] for power in range(tile)]
    assert all(len(row) == window for row in (*data, *outputs))
    return Transforms(tile, _floats(data), _floats(weights), _floats(outputs))


def _expanded(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), the constant one first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _floats(matrix: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in matrix)
