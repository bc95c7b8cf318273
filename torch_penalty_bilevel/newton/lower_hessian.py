r"""The Hessian H of the lower level at its minimiser: inverse, kernel and lowest eigenvalue.

``Spectral`` decomposes H in rescaled coordinates, S^-1 H S^-1 = V diag(w) V' with S^2 the diagonal
of \|H\|, so that the decision about its rank ignores the units of each lower variable. ``Krylov``
uses products alone.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..linear_solve import conjugate_residual, lanczos_lowest
from .counted_losses import LowerModel

DENSE = 1000  # lower variables up to which H is formed and decomposed
EPS = torch.finfo(torch.float64).eps


class Hessian(Protocol):
    """What the reduced Newton step needs of H and J."""

    lowest: float
    """The lowest eigenvalue over the largest."""
    escape: Tensor
    """Its eigenvector, of length 1."""
    nullity: int
    """Length of the coordinates of the kernel; 0: H is invertible."""
    curvature: float
    """A curvature of H known in the metric of ``precondition``, or 0."""
    flat: float
    """Relative curvatures of H under this, in the metric of ``precondition``, count as zero."""

    def solve(self, b: Tensor) -> Tensor:
        """H^+ b: solves on the complement of the kernel."""
        ...

    def lift(self, z: Tensor) -> Tensor:
        """N z: from coordinates of the kernel to v."""
        ...

    def drop(self, x: Tensor) -> Tensor:
        """N' x."""
        ...

    def cross(self, y: Tensor) -> Tensor:
        """J y."""
        ...

    def cross_transposed(self, p: Tensor) -> Tensor:
        """J' p."""
        ...

    def precondition(self, x: Tensor) -> Tensor:
        """Near H^-1 x, positive definite."""
        ...


def hessian_of(model: LowerModel, u: Tensor, probe: Tensor, eps: float) -> Hessian:
    """Dense for few lower variables, by products for many."""
    if probe.numel() <= DENSE:
        return Spectral(model, eps)
    return Krylov(model, u, probe)


class Spectral:
    """H decomposed; ``lift`` is S^-1 V_0 orthonormalised."""

    curvature = 1.0

    def __init__(self, model: LowerModel, eps: float = EPS) -> None:
        H, self._J = model.matrices()
        self.flat = max(1e-12, 50 * eps)
        diagonal = H.diagonal().abs()
        top = float(diagonal.max()) or float(H.abs().max()) or 1.0
        units = 1 / torch.where(diagonal > EPS * top, diagonal, top).sqrt()
        w, rotation = torch.linalg.eigh(units[:, None] * H * units)
        scale = float(w.abs().max())
        self.lowest = float(w[0]) / scale if scale > 0 else 0.0
        V = units[:, None] * rotation
        self.escape = V[:, 0] / V[:, 0].norm()
        kept = w.abs() > self.flat * scale
        self._kernel = torch.linalg.qr(V[:, ~kept]).Q
        self.nullity = self._kernel.shape[1]
        self._V, self._inverse = V, torch.where(kept, 1 / w, 0.0)
        self._positive = 1 / torch.where(kept, w.abs(), max(scale, 1e-300))

    def solve(self, b: Tensor) -> Tensor:
        return self._V @ (self._inverse * (self._V.T @ b))

    def lift(self, z: Tensor) -> Tensor:
        return self._kernel @ z

    def drop(self, x: Tensor) -> Tensor:
        return self._kernel.T @ x

    def cross(self, y: Tensor) -> Tensor:
        return self._J @ y

    def cross_transposed(self, p: Tensor) -> Tensor:
        return self._J.T @ p

    def precondition(self, x: Tensor) -> Tensor:
        return self._V @ (self._positive * (self._V.T @ x))


class Krylov:
    """H by products: conjugate residuals, and Lanczos for the lowest eigenvalue.

    The coordinates of the kernel are those of v, projected; ``probe`` is a vector (grad_v f) whose
    part in the kernel decides whether there is one that matters.
    """

    curvature = 0.0
    flat = 4 * EPS

    def __init__(self, model: LowerModel, like: Tensor, probe: Tensor) -> None:
        self._product, self._joint, n = model.hessian, model.joint, probe.numel()
        self._zeros, self._limit = (torch.zeros_like(like), torch.zeros_like(probe)), 4 * n
        self.lowest, self.escape = lanczos_lowest(model.hessian, probe)
        rest = conjugate_residual(model.hessian, probe, max_iterations=self._limit)[1]
        self.nullity = n if float(rest.norm()) > 1e-6 * float(probe.norm()) else 0

    def solve(self, b: Tensor) -> Tensor:
        return conjugate_residual(self._product, b, max_iterations=self._limit)[0]

    def lift(self, z: Tensor) -> Tensor:
        return conjugate_residual(self._product, z, max_iterations=self._limit)[1]

    def drop(self, x: Tensor) -> Tensor:
        return self.lift(x)

    def cross(self, y: Tensor) -> Tensor:
        return self._joint(self._zeros[0], y)[0]

    def cross_transposed(self, p: Tensor) -> Tensor:
        return self._joint(p, self._zeros[1])[1]

    def precondition(self, x: Tensor) -> Tensor:
        return x
