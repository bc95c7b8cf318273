r"""The end of the barrier's path: the solution for a guessed active set, to rounding.

Where the lower constraints are qualified, a bilevel solution solves

.. math::
    \min_{u, v, z} f \quad\text{where}\quad r = \nabla_v (g + \langle z, h_L\rangle) = 0, \quad
    c = (h_U, h_L, -z) \le 0, \quad z_i h_{L,i} = 0

For a set W of entries of c held at zero, with one of every pair (h_L,i, z_i) among them, this is
an equation: Newton's method on the gradient of L = f + <q, r> + <m, c_W> in x = (u, v, z), q and m.
Pairs of which both are held are kinks of v(u). Entries of W with a multiplier of the wrong sign
are released, violated ones join, until the point is strongly stationary (Scheel & Scholtes, 2000):
m >= 0 for h_U and for both sides of every kink, so that no neighbouring piece of v(u) is better.

Why not only a smaller barrier weight: on a kink the path's error is about the root of the weight,
so that eight digits ask for the weight 1e-16; and where u is not determined the path runs off along
it, while Newton's least-norm step stays (``benchmarks/suite.py --barrier-only``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..linear_solve.signed_least_squares import signed_least_squares
from .autograd import gradient, jacobian, variable
from .counted_losses import CountedLosses, Values, differentiating
from .lower_hessian import DENSE

NEWTON = 25  # steps per working set
ROUNDS = 8  # working sets tried
SINGULAR = 1e-10  # singular values under this share of the largest count as zero
ZERO = 1e-7  # a multiplier or a curvature under this, relative to the largest, counts as zero


class Corner(NamedTuple):
    """A strongly stationary point, in the units of the losses."""

    u: Tensor
    v: Tensor
    q: Tensor
    residual: Tensor
    """r."""
    grad_u: Tensor
    """L_u."""
    grad_v: Tensor
    """L_v."""
    unique: bool
    """Has g a positive curvature along the active lower constraints?"""


class _Expansion(NamedTuple):
    """L and its parts at (x, q, m), to second order."""

    slope: Tensor  # f_x
    gradient: Tensor  # L_x
    r: Tensor
    c: Tensor
    hessian: Tensor  # L_xx
    r_x: Tensor
    c_x: Tensor


class _Point(NamedTuple):
    x: Tensor
    q: Tensor
    m: Tensor  # of all entries of c, zero outside of W


def guess(before: Tensor, after: Tensor, upper: int) -> Tensor:
    """W from the slacks of c's first two parts at the weights 10 tau and tau.

    A slack falls like tau where the constraint is active with a multiplier, like sqrt(tau) on a
    kink, and not at all where it is inactive; ``upper`` counts those of the upper level.
    """
    tiny = torch.finfo(after.dtype).tiny
    rate = torch.log10(before.clamp_min(tiny) / after.clamp_min(tiny))
    return torch.cat([rate > 0.25, rate[upper:] < 0.75])


class ActiveSet:
    """The equation for both levels' plain losses and constraint values on flat vectors.

    Args:
        losses: in use must be the plain ones.
        upper_values: h_U on the level's trees; None without upper constraints.
        lower_values: likewise h_L.
        scales: of f and g; the equation is that of f and g over them.
    """

    def __init__(
        self,
        losses: CountedLosses,
        upper_values: Values | None,
        lower_values: Values | None,
        scales: tuple[float, float],
    ) -> None:
        self._losses, self._scales = losses, scales
        self._h = upper_values, lower_values

    def constraint_values(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """h_U and h_L; empty where the level has none."""
        levels = self._losses.upper_level.tree(u), self._losses.lower_level.tree(v)
        none = u.new_zeros(0)
        h_upper, h_lower = (none if h is None else h(*levels).to(u) for h in self._h)
        return h_upper, h_lower

    def solve(
        self, u: Tensor, v: Tensor, z: Tensor, working: Tensor, reach: float, tolerance: float
    ) -> Corner | None:
        """The strongly stationary point nearby; None if there is none within ``reach`` of (u, v).

        Args:
            u: near the solution.
            v: likewise.
            z: estimates of the lower multipliers.
            working: W, a mask on c.
            reach: bound on the distance to (u, v).
            tolerance: on x and the multipliers, relative.
        """
        lower = z.numel()
        if u.numel() + 2 * v.numel() + working.numel() > DENSE:
            return None
        sizes = u.numel(), v.numel(), lower
        held = ~working[-lower:] if lower else working[:0]
        start = torch.cat([u, v, torch.where(held, z, 0.0)])
        at, seen = _Point(start, torch.zeros_like(v), u.new_zeros(working.numel())), set[bytes]()
        for _ in range(ROUNDS):
            key = bytes(working.tolist())
            if key in seen:
                return None
            seen.add(key)
            found = self._newton(at, working, sizes, reach, tolerance)
            if found is None:
                return None
            at, model = found
            violation = torch.where(working, -math.inf, model.c)
            if working.numel() and float(violation.max()) > tolerance:
                working = working.clone()
                working[violation.argmax()] = True
                continue
            signed = self._signed(working, sizes)
            multipliers, stationary = _signed_multipliers(model, working, signed, at.x, tolerance)
            if stationary:
                gone = float((at.x - start)[: u.numel() + v.numel()].norm())
                found = self._judged(self._with(at, multipliers, working), working, sizes)
                return found if gone <= reach else None
            free = torch.where(signed, _multipliers(model, working), 0.0)[len(v) :]
            if not bool((free < 0).any()):
                return None
            working = working.clone()
            working[working.nonzero()[free.argmin()]] = False
        return None

    def _newton(
        self, at: _Point, working: Tensor, sizes: tuple[int, int, int], reach: float, tol: float
    ) -> tuple[_Point, _Expansion] | None:
        """Newton's method with least-norm steps; None if it does not converge.

        On the way to the right working set it may go ten times as far as the solution may lie.
        """
        near, n = sum(sizes[:2]), sum(sizes)
        start, previous, slow = at.x[:near], math.inf, 0
        model = self._expand(at, sizes)
        # First-order multipliers at the start, so that the first step has a sensible L_xx.
        at = self._with(at, _multipliers(model, working), working)
        for _ in range(NEWTON):
            model = self._expand(at, sizes)
            E = torch.cat([model.r_x, model.c_x[working]])
            zero = E.new_zeros(len(E), len(E))
            K = torch.cat([torch.cat([model.hessian, E.T], 1), torch.cat([E, zero], 1)])
            M = torch.cat([model.gradient, model.r, model.c[working]])
            if not (bool(torch.isfinite(K).all()) and bool(torch.isfinite(M).all())):
                return None
            step = -(torch.linalg.pinv(K, rtol=SINGULAR, hermitian=True) @ M)
            multipliers = torch.cat([at.q, at.m[working]]) + step[n:]
            at = self._with(at._replace(x=at.x + step[:n]), multipliers, working)
            size = float(step.norm())
            if float((at.x[:near] - start).norm()) > 10 * reach:
                return None
            if size <= 1e-2 * tol * (1 + float(at.x.norm()) + float(multipliers.norm())):
                break
            slow = slow + 1 if size > 0.7 * previous else 0
            if slow > 4:
                return None
            previous = size
        else:
            return None
        model = self._expand(at, sizes)
        held = torch.cat([model.r, model.c[working]])
        return (at, model) if float(held.norm()) <= tol else None

    def _with(self, at: _Point, multipliers: Tensor, working: Tensor) -> _Point:
        m = torch.zeros_like(at.m)
        m[working] = multipliers[len(at.q) :]
        return at._replace(q=multipliers[: len(at.q)], m=m)

    def _signed(self, working: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """Which of (q, m_W) must not be negative: those of h_U and of pairs held twice."""
        signed = _inequalities(working, sizes[2])[working]
        return torch.cat([signed.new_zeros(sizes[1]), signed])

    def _expand(self, at: _Point, sizes: tuple[int, int, int]) -> _Expansion:
        losses = self._losses
        losses.spend(2 + 2 * len(at.x))
        with differentiating("lower"):
            x, q, m = variable(at.x), variable(at.q), variable(at.m)
            u, v, z = x.split(sizes)
            f, g = losses.values(u, v)
            h_upper, h_lower = self.constraint_values(u, v)
            (r,) = gradient(g / self._scales[1] + z @ h_lower, (v,), create_graph=True)
            c, f = torch.cat([h_upper, h_lower, -z]), f / self._scales[0]
            L = f + q @ r + m @ c
            (L_x,) = gradient(L, (x,), create_graph=True)
            (slope,) = gradient(f, (x,), retain_graph=True)
            second = jacobian(L_x, (x, q, m))
        return _Expansion(
            slope, L_x.detach(), r.detach(), c.detach(), second[0], second[1].T, second[2].T
        )

    def _judged(self, at: _Point, working: Tensor, sizes: tuple[int, int, int]) -> Corner | None:
        """The point, if second-order conditions hold on both levels."""
        model = self._expand(at, sizes)
        n_u, n_v, lower = sizes
        upper = working.numel() - 2 * lower
        # Weakly held entries are let go: what is sufficient without them is sufficient with them.
        weak = at.m.abs() <= ZERO * (1 + float(at.m.abs().sum()))
        strong = working & ~(weak & _inequalities(working, lower))
        if not _positive(model.hessian, torch.cat([model.r_x, model.c_x[strong]])):
            return None
        u, v, z = at.x.split(sizes)
        H = model.r_x[:, n_u : n_u + n_v]
        normals = model.c_x[upper : upper + lower, n_u : n_u + n_v]
        if not _positive(H, normals[z > ZERO * (1 + float(z.abs().sum()))]):
            return None
        s_f, s_g = self._scales
        held = working[upper : upper + lower]
        return Corner(
            u, v, at.q * (s_f / s_g), model.r * s_g, model.gradient[:n_u] * s_f,
            model.gradient[n_u : n_u + n_v] * s_f, _positive(H, normals[held], strictly=True),
        )  # fmt: skip


def _inequalities(working: Tensor, lower: int) -> Tensor:
    """The entries of c that could leave W: h_U, and both of a pair that is held twice."""
    upper = working.numel() - 2 * lower
    both = working[upper : upper + lower] & working[upper + lower :]
    return torch.cat([torch.ones_like(working[:upper]), both, both])


def _multipliers(model: _Expansion, working: Tensor) -> Tensor:
    """The least-norm (q, m_W) of either sign that makes L_x smallest."""
    normals = torch.cat([model.r_x, model.c_x[working]])
    return -(torch.linalg.pinv(normals.T, rtol=SINGULAR) @ model.slope)


def _signed_multipliers(
    model: _Expansion, working: Tensor, signed: Tensor, x: Tensor, tolerance: float
) -> tuple[Tensor, bool]:
    """(q, m_W) with the right signs, and whether they make L_x vanish.

    Against f_x and its counterparts, or against the scale of f over a distance of 1 + ||x||.
    """
    normals = torch.cat([model.r_x, model.c_x[working]])
    found, missed = signed_least_squares(normals.T, -model.slope, signed)
    size = float(model.slope.norm()) + float((normals.T * found).norm())
    small = 1e-2 * tolerance / (1 + float(x.norm()))
    return found, missed <= max(tolerance * size, small)


def _positive(matrix: Tensor, normals: Tensor, strictly: bool = False) -> bool:
    """Is the symmetric matrix positive (semi)definite where ``normals`` vanish, up to rounding?"""
    values = torch.linalg.svd(normals, full_matrices=True)
    top = float(values.S.max()) if values.S.numel() else 0.0
    rank = int((SINGULAR * top < values.S).sum())
    basis = values.Vh[rank:]
    if not len(basis):
        return True
    scale = float(matrix.abs().max())
    lowest = float(torch.linalg.eigvalsh(basis @ matrix @ basis.T)[0])
    return lowest > ZERO * scale if strictly else lowest >= -ZERO * scale
