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

The gain is judged by a forecast. With the w_i at hand it is known what B'a should be at the next
evaluation if the system stood still. N and D are averages over about ten lower steps of the squared
error of that forecast and of the squared B'a before it, both in the span that is still remembered
and over ||a_before||^2 + ||a_now||^2, so that no change of units outlives them:

.. math:: \text{gain} = \max(0, 1 - N / D)

Where v stands still the gain is 1; where batches or fast moves make the forecast worthless it is 0,
and what is left is the plain step. It starts at 0, with N = D: trust has to be earned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation import Subspace
from ..tensors import Tensors, axpy, clones, gram
from .averages import average

_MEMORY = 0.9
_LEAST_CURVATURE = 1e-3  # of L
# N = D at first, as much as a wrong forecast adds in ten steps. Without, a few lucky forecasts in
# the first steps of a noisy run throw nu far out along flat directions, from where it needs
# thousands of steps back (MNIST hyper-cleaning: 0.9 to 1.5 points of accuracy).
_DOUBT = 0.3
_NOISE = 2.0
# Where the gain stays below 5 % (batches), the correction is tried in 10 lower steps of 100 only:
# the inner products would cost a tenth to a third of a step for nothing.
_WORTH, _PATIENCE, _TRIAL, _TRIAL_EVERY = 0.05, 20, 10, 100
_PARALLEL = 1e-5  # squared sine between directions that count as one: products in float32


@dataclass(frozen=True)
class Forecast:
    """What the correction expects of the next evaluation, and how past expectations came true."""

    missed: float = _DOUBT
    """N."""
    at_stake: float = _DOUBT
    """D."""
    gain: float = 0.0
    """What share of the correction is made."""
    along_multiplier: float = 0.0
    """<q, a> as expected."""
    along_move: float = 0.0
    """<q - q_-1, a> as expected."""
    along_multiplier_before: float = 0.0
    """<q, a> at the evaluation before."""
    along_move_before: float = 0.0
    """<q - q_-1, a> there."""
    square_before: float = 0.0
    """||a||^2 there."""
    was_made: bool = False
    """Was there a forecast for this evaluation?"""
    idle: int = 0
    """Lower steps since the gain was last worth having."""

    def is_due(self, steps: int) -> bool:
        """Is the next evaluation, the ``steps``-th from 0, to be corrected or forecast?"""
        return self.idle < _PATIENCE or steps % _TRIAL_EVERY >= _TRIAL_EVERY - _TRIAL

    def resting(self) -> Forecast:
        """After a lower step without."""
        return replace(self, was_made=False, idle=self.idle + 1)


NOTHING_FORECAST = Forecast()


class Past(NamedTuple):
    """The multiplier one lower step ago, its move until then, and H times each."""

    multiplier: Tensors
    product: Tensors
    move: Tensors
    move_product: Tensors

    def span(self, multiplier: Tensors, product: Tensors, adjoint_residual: Tensors) -> Subspace:
        """With the latest multiplier and its product."""
        product = _like(product, multiplier)
        basis = multiplier, axpy(-1.0, self.multiplier, multiplier), self.move
        images = product, axpy(-1.0, self.product, product), self.move_product
        residual = _like(adjoint_residual, multiplier)
        return Subspace(basis, images, gram((*basis, *images, residual)))


def _like(vectors: Tensors, multiplier: Tensors) -> Tensors:
    """Dense, as the multiplier is, and in its dtype."""
    return tuple(
        (t if t.layout == torch.strided else t.to_dense()).to(q.dtype)
        for t, q in zip(vectors, multiplier, strict=True)
    )


class Products(NamedTuple):
    """Inner products of directions, images and a, for H + mu I and a + mu q."""

    basis: Tensor
    """B'B."""
    mixed: Tensor
    """B'HB."""
    images: Tensor
    """(HB)'HB."""
    slopes: Tensor
    """B'a."""
    image_slopes: Tensor
    """(HB)'a."""
    residual_square: float
    """||a||^2."""
    are_finite: bool

    @classmethod
    def of(cls, inner_products: tuple[float, ...], shift: float) -> Products:
        """From those of ``Past.span``, row by row."""
        numbers = torch.tensor(inner_products, dtype=torch.float64).reshape(7, 7)
        basis, mixed, images = numbers[:3, :3], numbers[:3, 3:6], numbers[3:6, 3:6]
        slopes, image_slopes, square = numbers[:3, 6], numbers[3:6, 6], numbers[6, 6]
        if shift:
            square = square + shift * (2 * slopes[0] + shift * basis[0, 0])
            image_slopes = image_slopes + shift * (slopes + mixed[0] + shift * basis[0])
            slopes = slopes + shift * basis[0]
            images = images + shift * (mixed + mixed.T + shift * basis)
            mixed = mixed + shift * basis
        # Squares overflow before the vectors do.
        are_finite = all(map(math.isfinite, inner_products))
        return cls(basis, mixed, images, slopes, image_slopes, float(square), are_finite)


def judged(forecast: Forecast, products: Products) -> Forecast:
    """With the gain that the latest evaluation leaves it."""
    unit = forecast.square_before + products.residual_square
    if not forecast.was_made or not unit > 0:
        return replace(forecast, idle=forecast.idle + 1)
    # q_-1 = q - (q - q_-1), and the move until then is the last direction.
    (qq, qm, qp), (_, mm, mp), (*_, pp) = products.basis.tolist()
    first, second, third = products.slopes.tolist()
    metric = qq - 2 * qm + mm, qp - mp, pp
    error = _square(metric, first - second - forecast.along_multiplier, third - forecast.along_move)
    before = _square(metric, forecast.along_multiplier_before, forecast.along_move_before)
    missed = average(forecast.missed, error / unit, _MEMORY)
    at_stake = average(forecast.at_stake, before / unit, _MEMORY)
    gain = max(0.0, 1.0 - missed / at_stake) if at_stake > 0 else 0.0
    idle = 0 if gain > _WORTH else forecast.idle + 1
    return replace(forecast, missed=missed, at_stake=at_stake, gain=gain, idle=idle)


def correction(products: Products, bound: float, gain: float) -> Tensor:
    """The coefficients c of B c, (3,)."""
    if gain == 0:
        return torch.zeros_like(products.slopes)
    lengths = products.basis.diagonal()
    scale = torch.where(lengths > 0, lengths, torch.inf).rsqrt()
    metric = products.basis * scale * scale[:, None]
    squares, vectors = torch.linalg.eigh(metric)
    kept = squares > _PARALLEL
    basis = scale[:, None] * vectors[:, kept] / squares[kept].sqrt()
    curvature = basis.T @ products.mixed @ basis
    error = float(torch.linalg.matrix_norm(curvature - curvature.T)) / 2
    eigenvalues, rotation = torch.linalg.eigh((curvature + curvature.T) / 2)
    kept = eigenvalues > max(_LEAST_CURVATURE * bound, _NOISE * error)
    basis = basis @ rotation[:, kept]
    return -gain * (basis / eigenvalues[kept]) @ (basis.T @ products.slopes)


def expecting(
    forecast: Forecast, products: Products, coefficients: Tensor, step: float
) -> Forecast:
    """Of B'a once q has moved by B c - step * a_g."""
    after = products.slopes + products.mixed @ coefficients
    bent = products.image_slopes + products.images @ coefficients
    multiplier, move, _ = (after - step * bent).tolist()
    multiplier_before, move_before, _ = products.slopes.tolist()
    return replace(
        forecast,
        along_multiplier=multiplier,
        along_move=move,
        along_multiplier_before=multiplier_before,
        along_move_before=move_before,
        square_before=products.residual_square,
        was_made=True,
    )


def corrected(
    multiplier: Tensors, subspace: Subspace, coefficients: Tensor, step: float, shift: float
) -> Tensors:
    """Q + B c - step * (H + shift) B c."""
    if not coefficients.any():
        return multiplier
    result = clones(multiplier)
    vectors = zip(coefficients.tolist(), subspace.basis, subspace.images, strict=True)
    for number, direction, image in vectors:
        torch._foreach_add_(result, direction, alpha=number * (1.0 - step * shift))
        torch._foreach_add_(result, image, alpha=-step * number)
    return result


def _square(metric: tuple[float, float, float], first: float, second: float) -> float:
    """||P a||^2, P the projection on the span of two vectors.

    Args:
        metric: the inner products of the vectors: first with itself, first with second, second.
        first: that of a with the first.
        second: with the second.
    """
    aa, ab, bb = metric
    if not aa > 0:
        return second * second / bb if bb > 0 else 0.0
    along, rest = first * first / aa, bb - ab * ab / aa
    if not rest > _PARALLEL * bb:
        return along
    return along + (second - ab / aa * first) ** 2 / rest
