"""The transforms of Winograd's minimal filtering F(m, 3): m outputs of a filter of 3 taps in m + 2 multiplications.

With y = A [(G g) * (B d)], where d are m + 2 neighbouring inputs and g the taps, and both axes of an image treated so,
m x m outputs of a 3x3 filter take (m + 2)^2 multiplications instead of 9 m^2. (Lavin and Gray, Fast Algorithms for
Convolutional Neural Networks, CVPR 2016; the matrices by Toom and Cook: Barabasz, Anderson, Soodhalter and Gregg, Error
Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, ACM TOMS 46(4), 2020.)

With a stride of 2 the first and the last tap filter the inputs at even places, which takes m + 1 multiplications by
F(m, 2), and the one between them those at odd places, which takes m: 2 m + 1, as many as there are inputs.

Of integers all three matrices are of integers, and what they give is a multiple of the result, exactly (`scale`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

TAPS = 3
Matrix = tuple[tuple[float, ...], ...]
Rows = list[list[Fraction]]

# The points at which the polynomials are evaluated, beside infinity, by stride and m. Those of four and more have the
# least amplification among pairs of short binary fractions: 8.2 for F(4, 3), where the usual (0, 1, -1, 2, -2) have 31.
_POINTS: dict[int, dict[int, tuple[Fraction, ...]]] = {
    1: {
        2: (Fraction(0), Fraction(1), Fraction(-1)),
        3: (Fraction(3, 8), Fraction(-3, 8), Fraction(5, 4), Fraction(-5, 4)),
        4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
    },
    2: {
        2: (Fraction(0), Fraction(1)),
        3: (Fraction(0), Fraction(1), Fraction(-1)),
        4: (Fraction(3, 8), Fraction(-3, 8), Fraction(5, 4), Fraction(-5, 4)),
    },
}
# Those of integers, in whose order F(m, 3) takes as many as it needs, and F(m, 2).
_INTEGERS = tuple(map(Fraction, (0, 1, -1, 2, -2)))
# The sum of a row's magnitudes in the weights' transform, whose square times 128 words hold.
_LARGEST_SUM = 15


@dataclass(frozen=True)
class Transforms:
    """B (`data`), G (`weights`) and A (`outputs`) of F(`tile`, 3); those of data and outputs are exact in fp32.

    Each axis makes the result `scale` times as large.
    """

    tile: int
    stride: int
    data: Matrix
    weights: Matrix
    outputs: Matrix
    scale: int = 1

    @property
    def window(self) -> int:
        """The number of inputs along an axis, and of multiplications."""
        return len(self.data)

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


# The values of m by stride.
SIZES = {stride: tuple(sorted(points)) for stride, points in _POINTS.items()}


@cache
def transforms(tile: int, stride: int = 1) -> Transforms:
    """Return the transforms of F(`tile`, 3), one of `SIZES` of the stride."""
    data, weights, outputs = _matrices(_POINTS[stride][tile], tile, stride)
    return Transforms(tile, stride, _floats(data), _floats(weights), _floats(outputs))


@cache
def integer_transforms(tile: int, stride: int = 1) -> Transforms:
    """Return the transforms of F(`tile`, 3) whose matrices are of integers, so small that words hold what they give.

    Words hold the transforms of bytes: the magnitudes of a row of B add up to 10 at most, those of one of G to 15. The
    weights' transform takes what it can of the factors, so that the outputs' transform seldom multiplies.
    """
    data, weights, outputs = _matrices(_INTEGERS[: tile + (stride == 1)], tile, stride)
    denominators = [math.lcm(*(value.denominator for value in row)) for row in weights]
    scale = math.lcm(*denominators)
    factors = [
        max(
            factor
            for factor in range(denominator, scale + 1, denominator)
            if scale % factor == 0 and factor * sum(map(abs, row)) <= _LARGEST_SUM
        )
        for row, denominator in zip(weights, denominators, strict=True)
    ]
    weights = [[value * factor for value in row] for row, factor in zip(weights, factors, strict=True)]
    outputs = [[value * scale / factor for value, factor in zip(row, factors, strict=True)] for row in outputs]
    return Transforms(tile, stride, _floats(data), _floats(weights), _floats(outputs), scale)


def _matrices(points: Sequence[Fraction], tile: int, stride: int) -> tuple[Rows, Rows, Rows]:
    """Return B, G and A of F(`tile`, 3) with a stride of 1 or 2."""
    if stride == 1:
        return _toom_cook(points, tile, TAPS)
    data, weights, outputs = _toom_cook(points, tile, TAPS - 1)
    inputs, one = 2 * tile + 1, Fraction(1)
    odd = [_spread([one], [place], inputs) for place in range(1, inputs, 2)]
    return (
        [_spread(row, range(0, inputs, 2), inputs) for row in data] + odd,
        [_spread(row, (0, 2), TAPS) for row in weights] + [_spread([one], [1], TAPS)] * tile,
        [[*row, *_spread([one], [number], tile)] for number, row in enumerate(outputs)],
    )


def _toom_cook(points: Sequence[Fraction], tile: int, taps: int) -> tuple[Rows, Rows, Rows]:
    """Return B, G and A of F(`tile`, `taps`)."""
    weights, data = [], []
    for number, point in enumerate(points):
        others = [other for position, other in enumerate(points) if position != number]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        weights.append([point**power / scale for power in range(taps)])
        data.append([*_expanded(others), Fraction(0)])
    weights.append([*[Fraction(0)] * (taps - 1), Fraction(1)])
    data.append(_expanded(points))
    outputs = [[point**power for point in points] + [Fraction(power == tile - 1)] for power in range(tile)]
    window = tile + taps - 1
    assert all(len(row) == window for row in (*data, *outputs))
    return data, weights, outputs


def _spread(row: Sequence[Fraction], places: Sequence[int], length: int) -> list[Fraction]:
    """Return `length` coefficients: those of `row` at `places`, zeros elsewhere."""
    known = dict(zip(places, row, strict=True))
    return [known.get(place, Fraction(0)) for place in range(length)]


def _expanded(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), the constant one first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _floats(matrix: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in matrix)
