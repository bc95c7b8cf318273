"""The problem of ``rates.py``: quadratic, the lower spectrum a choice; and its error bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Quadratic:
    r"""Both levels quadratic in v; mu = 1 and L = ``kappa`` are the extreme eigenvalues of A.

    .. math::
        g = \tfrac12 v'Av + a'v + u'Cv + \tfrac12 \langle c, u\rangle \lVert v\rVert^2, \qquad
        f = \tfrac12 v'Fv + b'v + u'Kv + s'u, \qquad F \succeq 0

    Everything is looked at in u = 0, where d2g/dv2 = A and d2g/du dv = J(v) = C + cv': A tells how
    fast v moves to v* = -A^{-1} a, and because J depends on v (c is a ridge weight, as in
    hyperparameter optimisation), differentiating the steps is not the same as solving the adjoint
    equation. The hypergradient is Kv* + s + J(v*) q* with q* = -A^{-1}(Fv* + b).

    u and v may have a leading dimension of independent copies, over which the losses sum.

    Args:
        kappa: the condition number of A.
        n: unknowns of the lower level.
        power: None spreads the eigenvalues evenly: the slowest ones stand apart from the others.
            1 and 2 put lambda^power at the zeros of a Chebyshev polynomial and give grad_v f(v*)
            the entries +-lambda^(1 - power): then the residual polynomials of conjugate
            gradients (1) and of those on the normal equations (2) are Chebyshev polynomials,
            because these are orthogonal in just these points. That is the worst case.
        m: unknowns of the upper level.
        seed: of everything else.
    """

    def __init__(
        self, kappa: float, n: int, power: int | None = None, m: int = 3, seed: int = 0
    ) -> None:
        source = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        self.mu, self.L, self.kappa = 1.0, kappa, kappa
        if power is None:
            self.A = torch.linspace(1, kappa, n, dtype=torch.float64)
        else:
            angles = math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
            middle, half = (kappa**power + 1) / 2, (kappa**power - 1) / 2
            self.A = (middle + half * angles.cos()) ** (1 / power)
        root = normal(n, n)
        self.F = root @ root.T / spectral(root) ** 2
        self.C, self.K = normal(m, n) / m**0.5, normal(m, n) / m**0.5
        self.a, self.c, self.s = normal(n), 3 * normal(m) / m**0.5, normal(m)
        self.u, self.v = torch.zeros(m, dtype=torch.float64), normal(n)
        self.best = -self.a / self.A
        spread = normal(n)
        self.slope = spread if power is None else spread.sign() * self.A ** (1 - power)
        self.b = self.slope - self.F @ self.best
        self.adjoint = -self.slope / self.A
        self.J = self.C + torch.outer(self.c, self.best)
        self.exact = self.K @ self.best + self.s + self.J @ self.adjoint

    def upper_loss(self, u: Tensor, v: Tensor) -> Tensor:
        return (v @ self.F * v / 2 + v * self.b + u @ self.K * v).sum() + (u @ self.s).sum()

    def lower_loss(self, u: Tensor, v: Tensor) -> Tensor:
        ridge = (u @ self.c * v.square().sum(-1)).sum() / 2
        return (v * self.A * v / 2 + v * self.a + u @ self.C * v).sum() + ridge

    def error(self, hypergradient: Tensor) -> float:
        """||p - p*||_2."""
        return float((hypergradient - self.exact).norm())

    # Rates.

    @property
    def step(self) -> float:
        """2 / (L + mu), the step size with the smallest contraction factor."""
        return 2 / (self.L + self.mu)

    @property
    def q(self) -> float:
        """||I - eta A||_2 for that step size."""
        return (self.kappa - 1) / (self.kappa + 1)

    # Bounds.

    def bound(self, lower: float, adjoint: float) -> float:
        """The largest error of K v + s + J(v) q for ||v - v*|| <= lower, ||q - q*|| <= adjoint.

        Bound (C.2): c1 ||v - v*|| + c2 ||q - q*|| with the constants of this problem.
        """
        size = float(self.adjoint.norm()) + adjoint
        through_v = spectral(self.K) + float(self.c.norm()) * size
        return through_v * lower + spectral(self.J) * adjoint

    def lower_error(self, t: int) -> float:
        """q^t ||v_0 - v*||, a bound of ||v_t - v*||."""
        return self.q**t * float((self.v - self.best).norm())

    def implicit_bound(self, lower: float, contraction: float) -> float:
        """Of a solver that brings q - q(v) to ``contraction`` times what it is at q = 0.

        q(v) = -A^{-1} grad_v f(v) is itself off by A^{-1} F (v - v*).
        """
        shift = spectral(self.F / self.A[:, None]) * lower
        return self.bound(lower, shift + contraction * (float(self.adjoint.norm()) + shift))

    def unrolled_bound(self, t: int) -> float:
        """Of the derivative of t steps: as if q^t were a solver's contraction, and the (1+t) q^t.

        The step from v_s to v_{s+1} contributes J(v_s), not J(v*): an error q^s, which the steps
        that follow contract by q^{t-1-s}; there are t such terms.
        """
        start, after = self.lower_error(0), self.lower_error(t)
        slope = float(self.slope.norm()) + spectral(self.F) * after
        late = self.step * float(self.c.norm()) * t * self.q ** (t - 1) * start * slope
        return self.implicit_bound(after, self.q**t) + late


def spectral(matrix: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, 2))
