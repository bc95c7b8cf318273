r"""A Galerkin correction of the multiplier in the span of where it has been, at no further product.

Letters: q the multiplier, w = H q its product, s = grad_v f, a = s + w; b_i the directions q,
q - q_-1 and q_-1 - q_-2 of the latest three multipliers, w_i = H b_i; mu the shift, L >= ||H||.

.. math::
    c = -\text{gain}\,(B'HB)^{-1}B'a, \qquad
    a_g = a + HBc, \qquad q \leftarrow q + Bc - a_g / L

B'HB is made symmetric in an orthonormal basis of span B. What was not symmetric is error: images
that are old, or of other batches. Directions in which B'HB curves by less than 1e-3 L, or
than twice the norm of that error, are left to the last term, the plain step. On a system that
stands still this is the method of conjugate gradients cut short, one product late: H acts
on what the plain step added only in the evaluation after it. Differences of multipliers and not the
multipliers themselves, which are nearly parallel: so the inner products of float32 vectors tell
the directions apart.

The same matrix serves v, whose residual is r = grad_v g and on which the same H acts:
v <- v - gain B (B'HB)^{-1} B'r. The directions are those in which the multiplier is slow, the flat
ones of H, and v is slow in the same. Differences of v would be directions of its own, but what they
see of H passes through the lower rule's momentum and the changes of u (they diverge).
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

_LEAST_CURVATURE = 1e-3  # of L
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
        """With the latest multiplier and its product; ``slopes``: a, and r where v is corrected."""
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
    lower_slopes: Vector
    """B'r; empty where v is not corrected."""
    are_finite: bool

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
            lower_slopes=[number for row in rows[:3] for number in row[7:]],
            are_finite=are_finite,
        )
        return found._shifted(shift) if shift else found

    def _shifted(self, mu: float) -> Products:
        basis, mixed, images, slopes, image_slopes, square, lower_slopes, are_finite = self
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
            lower_slopes,
            are_finite,
        )


def conjugate_directions(products: Products, bound: float) -> Matrix:
    """Rows x_i with <B x_i, H B x_j> = 1 where i = j, else 0; only what curves enough to believe.

    Then (B'HB)^{-1} is the sum of x_i x_i'.
    """
    if not is_positive(unit_diagonal(products.basis), PARALLEL):
        return _some_conjugate_directions(products, bound)
    rows = whitening(products.basis)
    curvature, error = symmetric_part(congruent(products.mixed, rows))
    if not is_positive(curvature, max(_LEAST_CURVATURE * bound, _NOISE * error)):
        return _some_conjugate_directions(products, bound)
    columns = transposed(rows)
    return [times(columns, row) for row in whitening(curvature)]


def _some_conjugate_directions(products: Products, bound: float) -> Matrix:
    """Where some directions are parallel, flat, or curve downwards: by eigenvectors."""
    basis, mixed = torch.tensor((products.basis, products.mixed), dtype=torch.float64)
    lengths = basis.diagonal()
    scale = torch.where(lengths > 0, lengths, torch.inf).rsqrt()
    squares, vectors = torch.linalg.eigh(basis * scale * scale[:, None])
    kept = squares > PARALLEL
    orthonormal = scale[:, None] * vectors[:, kept] / squares[kept].sqrt()
    curvature = orthonormal.T @ mixed @ orthonormal
    error = float(torch.linalg.matrix_norm(curvature - curvature.T)) / 2
    eigenvalues, rotation = torch.linalg.eigh((curvature + curvature.T) / 2)
    kept = eigenvalues > max(_LEAST_CURVATURE * bound, _NOISE * error)
    directions = orthonormal @ rotation[:, kept] / eigenvalues[kept].sqrt()
    rows: list[list[float]] = directions.T.tolist()
    return rows


def correction(products: Products, bound: float, gain: float) -> list[float]:
    """The coefficients c of B c, three, that the multiplier moves by."""
    return _galerkin(products, products.slopes, bound, gain)


def lower_correction(products: Products, bound: float, gain: float) -> list[float]:
    """Those that v moves by: its residual is r, and the same H acts on it."""
    return _galerkin(products, products.lower_slopes, bound, gain)


def _galerkin(products: Products, slopes: Vector, bound: float, gain: float) -> list[float]:
    found = [0.0, 0.0, 0.0]
    if gain > 0:
        for row in conjugate_directions(products, bound):
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
