"""Rows of Winograd's transforms times vectors, as expressions that share what they can."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.loops import index, load, local, store, vector, with_local
from schedules.winograd_transforms import Matrix


def combined(
    matrix: Matrix,
    lanes: int,
    element: Callable[[int, Expr], Expr],
    put: Callable[[int, Expr, Expr], Stmt],
    rows: range | None = None,
    dtype: str = "float32",
) -> Stmt:
    """Return `put` of each of the `rows` of `matrix`, or of all, times the vectors of `element`, loaded once."""
    inputs = local([len(matrix[0]), lanes], dtype, "inputs")
    wanted = range(len(matrix)) if rows is None else rows

    def fetch(number: int) -> Stmt:
        return vector(lanes, lambda v: store(inputs, element(number, v), [index(number), v]))

    def row(number: int) -> Stmt:
        def value(v: Expr) -> Expr:
            return combination(matrix, number, lambda i: load(inputs, [index(i), v]))

        return vector(lanes, lambda v: put(number, value(v), v))

    used = [i for i in range(len(matrix[0])) if any(matrix[number][i] for number in wanted)]
    return with_local([inputs], [*map(fetch, used), *map(row, wanted)])


def combination(matrix: Matrix, row: int, element: Callable[[int], Expr]) -> Expr:
    """Return a row of `matrix` times the elements.

    The points but 0 and infinity come in pairs of opposite sign. Where two rows differ by the sign of some terms, or
    two columns by that of some rows, the sums that they share are written alike, and LLVM computes them once.
    """
    coefficients = matrix[row]
    pairs = _pairs(list(zip(*matrix, strict=True)))
    if pairs:
        alone = [(c, element(i)) for i, c in enumerate(coefficients) if c and not any(i in pair for pair in pairs)]
        terms = list(alone)
        for left, right in pairs:
            if coefficients[left]:
                plus = coefficients[left] == coefficients[right]
                a, b = element(left), element(right)
                terms.append((coefficients[left], a + b if plus else a - b))
        return _weighted(terms)
    pair = next((pair for pair in _pairs(matrix) if row in pair), (row, row))
    differing = [a != b for a, b in zip(*(matrix[each] for each in pair), strict=True)]
    same = [(c, element(i)) for i, c in enumerate(coefficients) if c and not differing[i]]
    other = [(c, element(i)) for i, c in enumerate(coefficients) if c and differing[i]]
    if not same or not other:
        return _weighted(same or other)
    if other[0][0] < 0:
        return _weighted(same) - _weighted([(-c, value) for c, value in other])
    return _weighted(same) + _weighted(other)


def _pairs(lines: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Return neighbouring rows, or columns, whose elements differ in nothing but the sign of some."""
    pairs: list[tuple[int, int]] = []
    for i, (line, following) in enumerate(itertools.pairwise(lines)):
        same = all(abs(a) == abs(b) for a, b in zip(line, following, strict=True))
        if same and line != following and not any(i in pair for pair in pairs):
            pairs.append((i, i + 1))
    return pairs


def _weighted(terms: Sequence[tuple[float, Expr]]) -> Expr:
    total: Expr | None = None
    for coefficient, value in terms:
        term = value if abs(coefficient) == 1 else value * tirx.const(abs(coefficient), str(value.ty.dtype))
        if total is None:
            total = term if coefficient > 0 else -term
        else:
            total = total + term if coefficient > 0 else total - term
    assert total is not None
    return total
