r"""A correction of the multiplier in the span of where it has been, at no further product.

Letters: q the multiplier, w = H q its product, s = grad_v f, a = s + w; b_i the directions q,
q - q_-1 and q_-1 - q_-2 of the latest three multipliers, w_i = H b_i; mu the shift, L >= ||H||.

.. math::
    c_E = -(B'HB)^{-1}B'a, \qquad c_R = -(B'HHB)^{-1}B'Ha, \qquad
    c = \text{gain}\,(\rho\, c_E + (1 - \rho)\, c_R)

.. math:: a_g = a + HBc, \qquad q \leftarrow q + Bc - a_g / L

c_E is least in energy q'Hq/2 + s'q: Galerkin's condition, conjugate gradients. c_R is least in
||a + HBc||: minimal residuals. Energy goes far along flat directions, where it is right and
residuals are slow. Where f has to choose within argmin g, a part s_0 of s lies in the kernel of H.
No multiplier reaches it, the energy falls along it for ever, and c_E pays for that fall with errors
in all that H does reach, and J with it. ||s_0|| <= ||a||, so the relative certificate bounds its
share:

.. math:: \rho = \tfrac34 \max(0, 1 - \lVert a\rVert / \lVert s\rVert)

Never the whole, as a small s_0 hides behind a small certificate for long. Either alone is worse on
the digits or where H is singular (``benchmarks/multipliers``: rules "energy" and "residual").

B'HB is made symmetric in an orthonormal basis of span B. What was not symmetric is error: images
that are old, or of other batches. Directions in which B'HB curves by less than 1e-3 L, or than
twice the norm of that error, are left to the last term, the plain step; for c_R those whose images
are shorter than 1e-4 L or that error. On a system that stands still c_E alone is the method of
conjugate gradients cut short, one product late: H acts on what the plain step added only in the
evaluation after it. Differences of multipliers and not the multipliers themselves, which are nearly
parallel: so the inner products of float32 vectors tell the directions apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..evaluation import Subspace
from ..tensors import Tensors, axpy, clones, gram
from .small_matrices import (
    Matrix,
    Vector,
    congruent,
    inner,
    is_positive,
    plus,
    symmetric_part,
    times,
    transposed,
    unit_diagonal,
    whitening,
)

# Of L. Energy falls along what is flatter as along the kernel of H. The residual does not see
# a kernel, so it may look further.
_LEAST_BY_ENERGY, _LEAST_BY_RESIDUAL = 1e-3, 1e-4
_NOISE = 2.0
PARALLEL = 1e-5
"""Squared sine between directions that count as one: products in float32."""


class Past(NamedTuple):
    """The multiplier one lower step ago, its move until then, and H times each."""

    multiplier: Tensors
    product: Tensors
    move: Tensors
    move_product: Tensors

    def span(self, multiplier: Tensors, product: Tensors, *slopes: Tensors) -> Subspace:
        """With the latest multiplier and its product.

        ``slopes``: a; where v is corrected also r, and how v has moved since the evaluation before.
        """
        product = _like(product, multiplier)
        basis = multiplier, axpy(-1.0, self.multiplier, multiplier), self.move
        images = product, axpy(-1.0, self.product, product), self.move_product
        rest = [_like(slope, multiplier) for slope in slopes]
        return Subspace(basis, images, gram((*basis, *images, *rest)))


def _like(vectors: Tensors, multiplier: Tensors) -> Tensors:
    """Dense, as the multiplier is, and in its dtype."""
    return tuple(
        (t if t.layout == torch.strided else t.to_dense()).to(q.dtype)
        for t, q in zip(vectors, multiplier, strict=True)
    )


class Products(NamedTuple):
    """Inner products of directions, images and a, for H + mu I and a + mu q."""

    basis: Matrix
    """B'B."""
    mixed: Matrix
    """B'HB."""
    images: Matrix
    """(HB)'HB."""
    slopes: Vector
    """B'a."""
    image_slopes: Vector
    """(HB)'a."""
    residual_square: float
    """||a||^2."""
    are_finite: bool
    lower_slopes: Vector
    """B'r; empty where v is not corrected, and so are the next two."""
    lower_images: Vector
    """(HB)'d, d how v has moved since the evaluation before."""
    lower_squares: Vector
    """||r||^2 and ||d||^2."""

    @classmethod
    def of(cls, inner_products: tuple[float, ...], shift: float) -> Products:
        """From those of ``Past.span``, row by row."""
        size = math.isqrt(len(inner_products))
        rows = [inner_products[i : i + size] for i in range(0, size * size, size)]
        # Squares overflow before the vectors do.
        are_finite = all(map(math.isfinite, inner_products))
        found = cls(
            basis=[row[:3] for row in rows[:3]],
            mixed=[row[3:6] for row in rows[:3]],
            images=[row[3:6] for row in rows[3:6]],
            slopes=[row[6] for row in rows[:3]],
            image_slopes=[row[6] for row in rows[3:6]],
            residual_square=rows[6][6],
            are_finite=are_finite,
            lower_slopes=[row[7] for row in rows[:3]] if size > 7 else [],
            lower_images=[row[8] for row in rows[3:6]] if size > 7 else [],
            lower_squares=[rows[7][7], rows[8][8]] if size > 7 else [],
        )
        return found._shifted(shift) if shift else found

    def _shifted(self, mu: float) -> Products:
        basis, mixed, images, slopes, image_slopes, square, are_finite, *of_lower = self
        both = map(plus, mixed, [1.0] * 3, transposed(mixed))
        images = [plus(image, mu, row) for image, row in zip(images, both, strict=True)]
        first = basis[0]  # <b_i, q>
        return Products(
            basis,
            [plus(row, mu, b) for row, b in zip(mixed, basis, strict=True)],
            [plus(row, mu * mu, b) for row, b in zip(images, basis, strict=True)],
            plus(slopes, mu, first),
            plus(image_slopes, mu, plus(plus(slopes, 1.0, mixed[0]), mu, first)),
            square + mu * (2 * slopes[0] + mu * first[0]),
            are_finite,
            *of_lower,
        )


def orthonormal(basis: Matrix) -> Matrix:
    """Rows x_i with <B x_i, B x_j> = 1 where i = j, else 0; parallel directions count as one."""
    unit = unit_diagonal(basis)
    if is_positive(unit, PARALLEL):
        return whitening(basis)
    scale = [1.0 / math.sqrt(basis[i][i]) if basis[i][i] > 0 else 0.0 for i in range(3)]
    rows = _by_eigenvectors(unit, PARALLEL)
    return [[a * s for a, s in zip(row, scale, strict=True)] for row in rows]


def conjugate(matrix: Matrix, above: float, rows: Matrix) -> Matrix:
    """Combinations of ``rows`` that make M the identity, where its eigenvalues are > ``above``."""
    whole = len(matrix) == 3 and is_positive(matrix, above)
    columns = transposed(rows)
    found = whitening(matrix) if whole else _by_eigenvectors(matrix, above)
    return [times(columns, weights) for weights in found]


def _by_eigenvectors(matrix: Matrix, above: float) -> Matrix:
    if not matrix:
        return []
    eigenvalues, vectors = torch.linalg.eigh(torch.tensor(matrix, dtype=torch.float64))
    kept = eigenvalues > above
    rows: list[list[float]] = (vectors[:, kept] / eigenvalues[kept].sqrt()).T.tolist()
    return rows


def seen(products: Products) -> tuple[Matrix, Matrix, float]:
    """An orthonormal basis, B'HB in it, and the curvature below which that may be noise."""
    rows = orthonormal(products.basis)
    curvature, error = symmetric_part(congruent(products.mixed, rows))
    return rows, curvature, _NOISE * error


def correction(products: Products, bound: float, gain: float, reach: float) -> list[float]:
    """The coefficients c of B c, three, that the multiplier moves by.

    Args:
        products: of B, HB and a.
        bound: L.
        gain: of both.
        reach: the weight of c_E; the rest is that of c_R.
    """
    if gain == 0:
        return [0.0, 0.0, 0.0]
    rows, curvature, noise = seen(products)
    energy = conjugate(curvature, max(_LEAST_BY_ENERGY * bound, noise), rows)
    squares, least = congruent(products.images, rows), max(_LEAST_BY_RESIDUAL * bound, noise)
    residual = conjugate(squares, least**2, rows)
    found = descended(energy, products.slopes, gain * reach)
    return plus(found, 1.0, descended(residual, products.image_slopes, gain * (1.0 - reach)))


def descended(rows: Matrix, slopes: Vector, gain: float) -> list[float]:
    """To the minimum in the span of conjugate directions, times ``gain``."""
    found = [0.0, 0.0, 0.0]
    for row in rows:
        found = plus(found, -gain * inner(row, slopes), row)
    return found


def corrected(
    multiplier: Tensors, subspace: Subspace, coefficients: Vector, step: float, shift: float
) -> Tensors:
    """Q + B c - step * (H + shift) B c."""
    if not any(coefficients):
        return multiplier
    result = clones(multiplier)
    vectors = zip(coefficients, subspace.basis, subspace.images, strict=True)
    for number, direction, image in vectors:
        torch._foreach_add_(result, direction, alpha=number * (1.0 - step * shift))
        torch._foreach_add_(result, image, alpha=-step * number)
    return result
