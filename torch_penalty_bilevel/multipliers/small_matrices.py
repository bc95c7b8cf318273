"""Linear algebra of two or three unknowns in Python numbers.

Their arithmetic is a few dozen products; calling torch for each of them costs ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Matrix: TypeAlias = Sequence[Sequence[float]]
"""Rows."""
Vector: TypeAlias = Sequence[float]


def inner(left: Vector, right: Vector) -> float:
    """<left, right>."""
    return sum(map(float.__mul__, left, right))


def plus(x: Vector, factor: float, y: Vector) -> list[float]:
    """``x + factor * y``."""
    return [a + factor * b for a, b in zip(x, y, strict=True)]


def transposed(matrix: Matrix) -> list[Vector]:
    """M'."""
    return list(zip(*matrix, strict=True))


def times(matrix: Matrix, vector: Vector) -> list[float]:
    """M x."""
    return [inner(row, vector) for row in matrix]


def congruent(matrix: Matrix, rows: Matrix) -> list[list[float]]:
    """W M W'."""
    images = [times(matrix, row) for row in rows]  # columns of M W'
    return [[inner(row, image) for image in images] for row in rows]


def symmetric_part(matrix: Matrix) -> tuple[list[list[float]], float]:
    """(M + M') / 2, and the Frobenius norm of the rest."""
    pairs = list(zip(matrix, transposed(matrix), strict=True))
    half = [plus([a / 2 for a in row], 0.5, column) for row, column in pairs]
    rest = [plus(row, -1.0, middle) for row, middle in zip(matrix, half, strict=True)]
    return half, math.sqrt(sum(inner(row, row) for row in rest))


def unit_diagonal(matrix: Matrix) -> Matrix:
    """Scaled on both sides to a diagonal of 1: cosines from inner products; zeros stay zero."""
    squares = [matrix[i][i] for i in range(len(matrix))]
    scale = [1.0 / math.sqrt(square) if square > 0 else 0.0 for square in squares]
    return [
        [a * s * t for a, t in zip(row, scale, strict=True)]
        for row, s in zip(matrix, scale, strict=True)
    ]


def is_positive(matrix: Matrix, above: float) -> bool:
    """Are all eigenvalues of a symmetric 3 x 3 matrix > ``above``? By its leading minors."""
    (a, b, c), (_, d, e), (*_, f) = matrix
    a, d, f = a - above, d - above, f - above
    second = a * d - b * b
    return a > 0 and second > 0 and second * f > a * e * e + c * (d * c - 2 * b * e)


def whitening(matrix: Matrix) -> list[list[float]]:
    """W, lower triangular, with W M W' = 1, for a positive definite M: Cholesky's factor inverted.

    Row by row: the next unit vector, made conjugate to the rows before it.
    """
    rows: list[list[float]] = []
    for i, given in enumerate(matrix):
        row = [0.0] * len(matrix)
        row[i] = 1.0
        for before in rows:
            along = inner(before, given)
            row = [a - along * b for a, b in zip(row, before, strict=True)]
        length = math.sqrt(inner(row, given))
        rows.append([a / length for a in row])
    return rows
