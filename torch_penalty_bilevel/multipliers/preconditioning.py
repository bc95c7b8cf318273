r"""The multiplier in the units of a preconditioner P that the user has.

Letters: q the multiplier, H = d2g/dv2, s = grad_v f, a = s + H q. P is symmetric, positive definite
and roughly like H, such as its diagonal; in its units

.. math::
    \hat q = P^{1/2} q, \qquad \hat a = P^{-1/2} a, \qquad \hat H = P^{-1/2} H P^{-1/2},
    \qquad \hat a = P^{-1/2} s + \hat H \hat q

is the same equation: a = 0 where a-hat = 0, whatever P is. ``LeastSquares`` moves q-hat as it moves
q otherwise, so that the plain step is q <- q - P^{-1} a / L with L the bound of H-hat, and its
speed depends on the condition number of H-hat. The certificate stays ||a||, and with it the share
of energy in the correction; v follows its rule as before, and the guard against negative curvature
adds mu P to H in the place of mu I.

P may change between lower steps, slowly or now and then, never within one. nu itself is kept, so
the plain step knows nothing of it; the correction looks back over the change by two steps, and
its forecasts tell what that is worth.
A checkpoint does not hold P: give the same one to the rule that goes on. In float32 an
ill-conditioned P limits what the certificate reaches: about the rounding, 1e-7, times the condition
number of P^1/2, 1e5 where that of P is 1e10.

Where the unknowns have the scales of raw columns, the diagonal of H is all that is needed:

>>> import torch
>>> from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity
>>> scales = torch.logspace(-3, 3, 7)  # H = diag(scales), condition number 1e6
>>> def diagonal(vectors, power):
...     return tuple(scales**power * vector for vector in vectors)
>>> def certificate(**options):
...     u, v = torch.zeros(7, requires_grad=True), torch.zeros(7, requires_grad=True)
...     optimizer = PenaltyBilevelOptimizer(
...         [u], [v], lower_lr=1e-3, penalty=Stationarity(LeastSquares(**options))
...     )
...     for _ in range(20):
...         optimizer.lower_step(
...             lambda: (v - 1).sum(), lambda: (scales * (v - u).square()).sum() / 2
...         )
...     return float(optimizer.metrics.relative_certificate)
>>> certificate() > 0.5
True
>>> certificate(preconditioner=diagonal) < 1e-6
True

With Kronecker factors A and G of a layer's curvature, whose parameter is a matrix, and their
eigenvectors, P^power V is

    A_values, A_vectors = torch.linalg.eigh(A + damping * torch.eye(len(A)))  # G likewise
    lambda vectors, power: (
        G_vectors * G_values**power @ G_vectors.T @ vectors[0]
        @ (A_vectors * A_values**power @ A_vectors.T),
    )
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..evaluation import Evaluation, Norms, Subspace
from ..tensors import Tensors, axpy, clones, dense, gram, norm
from .least_squares_state import LeastSquaresState

Preconditioner: TypeAlias = Callable[[Tensors, float], Tensors]
"""(vectors, power) -> P^power times them, tensor by tensor shaped alike; power is 1/2 or -1/2."""

_MISFIT = 0.01
"""Of ||P^1/2 q|| ||P^-1/2 H q||: far above rounding, also of factors that are badly conditioned."""
_LOST = 0.1
"""Of a vector on its way there and back: rounding in float32 is 1e-2 of it where P has condition
1e10, as every entry is that of its inverse times the largest."""
_PAIR = (
    "preconditioner(vectors, 0.5) and preconditioner(vectors, -0.5) do not belong to one symmetric"
)
_REMEDY = "keep its diagonal or its eigenvalues above zero, as by a damping"
_NOT_POSITIVE = (
    "preconditioner(vectors, power) returned numbers that are not finite, or whose squares are "
    f"not; P must be symmetric positive definite: {_REMEDY}"
)


class Units:
    """Into the units of P and back.

    Args:
        preconditioner: the user's.
    """

    def __init__(self, preconditioner: Preconditioner) -> None:
        self.preconditioner = preconditioner

    @classmethod
    def of(cls, preconditioner: Preconditioner | None, ridge: float) -> Units | None:
        """Those of what the user gave, None without.

        Raises:
            TypeError: it cannot be called.
            ValueError: with a ridge.
        """
        if preconditioner is None:
            return None
        if not callable(preconditioner):
            raise TypeError(
                "preconditioner must be callable as preconditioner(vectors, power), or None; got "
                f"{type(preconditioner).__name__}"
            )
        if ridge > 0:
            raise ValueError(
                f"ridge must be 0 with a preconditioner, got {ridge}: it is a share of ||H||, and "
                "only ||P^-1/2 H P^-1/2|| is known; put an L2 term into the lower loss"
            )
        return cls(preconditioner)

    def raised(self, vectors: Tensors) -> Tensors:
        """P^1/2 times ``vectors``, in at least float32."""
        return self._times(vectors, 0.5)

    def lowered(self, vectors: Tensors) -> Tensors:
        """P^-1/2 times ``vectors``, in at least float32."""
        return self._times(vectors, -0.5)

    def direction(self, inside: Tensors) -> Tensors:
        """P^-1/2 times a direction in these units, along which the curvature is probed."""
        return self._there(inside)

    def driving(self, vectors: Tensors) -> Tensors:
        """P^-1/2 times r or grad_v f, in steps that probe.

        Raises:
            ValueError: P^1/2 does not lead back: where P takes a part of them to zero the
                multiplier never has one.
        """
        result, whole = self._there(vectors), float(norm(vectors))
        lost = float(norm(axpy(-1.0, self.raised(result), tuple(map(dense, vectors)))))
        if lost > _LOST * whole:
            raise ValueError(
                f"{_PAIR} positive definite P: of a vector of length {whole:.3g}, {lost:.3g} is "
                "lost on the way there and back; return P^power times the vectors, and "
                f"{_REMEDY}"
            )
        return result

    def _there(self, vectors: Tensors) -> Tensors:
        result = self.lowered(vectors)
        # One more wait for the device, in steps that probe: else the product would be blamed.
        if not math.isfinite(float(norm(result))) and math.isfinite(float(norm(vectors))):
            raise ValueError(_NOT_POSITIVE)
        return result

    def vectors(self, adjoint: Tensors, product: Tensors, residual: Tensors) -> tuple[Tensors, ...]:
        """q, H q and a in these units."""
        return self.raised(adjoint), self.lowered(product), self.lowered(residual)

    def inside(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Any, Evaluation, Norms]:
        """What a lower step looks at, in these units; ||a|| and ||s|| keep theirs.

        Raises:
            ValueError: the preconditioner is no symmetric positive definite P, as far as seen.
        """
        subspace = evaluation.subspace
        if subspace is None:
            raise ValueError(
                "a preconditioner needs a penalty that evaluates by penalties.evaluate_residual, "
                "which asks the rule for its span"
            )
        adjoint, product = self._measured(norms, 2 * len(subspace.basis) + 1)
        probe_product, probed = evaluation.probe_product, 0.0
        if probe_product:
            probe_product = self.lowered(probe_product)
            # As above.
            probed = float(norm(probe_product))
        return (
            state.but(multiplier=self.raised(state.multiplier)),
            evaluation._replace(
                adjoint_residual=self.lowered(evaluation.adjoint_residual),
                probe_product=probe_product,
                subspace=None if len(subspace.basis) == 1 else subspace,
            ),
            norms._replace(adjoint=adjoint, product=product, probe_product=probed),
        )

    def outside(self, state: LeastSquaresState) -> LeastSquaresState:
        """With nu itself; past vectors and the probe keep these units."""
        return state.but(multiplier=self.lowered(state.multiplier))

    def _measured(self, norms: Norms, rows: int) -> tuple[float, float]:
        """||P^1/2 q|| and ||P^-1/2 H q||."""
        numbers = norms.inner_products
        # q first, H q in the middle, a last.
        middle, last = rows // 2, rows - 1
        squares = [numbers[i * rows + i] for i in (0, middle, last)]
        if not all(map(math.isfinite, squares)):
            raise ValueError(_NOT_POSITIVE)
        adjoint, product = math.sqrt(squares[0]), math.sqrt(squares[1])
        found = numbers[middle]
        # <P^1/2 q, P^-1/2 H q> = <q, H q>, whatever P is.
        if abs(found - norms.curvature) > _MISFIT * adjoint * product:
            raise ValueError(
                f"{_PAIR} P: <q, H q> is {norms.curvature:.3g} and "
                f"<P^1/2 q, P^-1/2 H q> is {found:.3g}; return P^power times the vectors, "
                "with the same P throughout a lower step"
            )
        return adjoint, product

    @torch.no_grad()
    def _times(self, vectors: Tensors, power: float) -> Tensors:
        # Copies, as it may work in place, on tensors that are the state; and of what it returns,
        # as that may be one buffer in every call.
        given = clones(tuple(map(dense, vectors)))
        result: Any = self.preconditioner(given, power)
        if not isinstance(result, (tuple, list)):
            raise TypeError(
                f"preconditioner returned {type(result).__name__}; return a tuple of tensors, "
                "P^power times the vectors"
            )
        shapes = [tuple(getattr(t, "shape", ())) for t in result]
        expected = [tuple(t.shape) for t in given]
        if shapes != expected:
            raise ValueError(
                f"preconditioner returned tensors of shapes {shapes} for vectors of shapes "
                f"{expected}; return P^power times the vectors, one tensor for each lower "
                "parameter that moves"
            )
        for tensor, vector in zip(result, given, strict=True):
            _check(tensor, vector.dtype)
        pairs = zip(result, given, strict=True)
        return tuple(t.detach().to(v, copy=t is not v) for t, v in pairs)


def _check(tensor: Any, dtype: torch.dtype) -> None:
    """Raise TypeError unless a preconditioner may return it for a vector of this dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"preconditioner returned a tuple with {type(tensor).__name__} in it; return tensors, "
            "P^power times the vectors"
        )
    if tensor.layout != torch.strided or torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
        raise TypeError(
            f"preconditioner returned a tensor of {tensor.dtype}, {tensor.layout} for a vector of "
            f"{dtype}; the multiplier would be rounded to that: return a dense one of {dtype}"
        )
    if tensor.is_complex():
        raise TypeError(
            f"preconditioner returned a tensor of {tensor.dtype} for a real vector; P is real"
        )


def resting(vectors: tuple[Tensors, ...]) -> Subspace:
    """q, H q and a alone, where no correction is due: their lengths are needed in every step."""
    return Subspace(vectors[:1], vectors[1:2], gram(vectors))
