r"""One run of ``minimize``: a feasible trust-region Newton method in the reduced space.

.. math:: \min_u f(u, v) \quad\text{where}\quad v \in \arg\min_v g(u, v)

Iterates stay on the manifold r = grad_v g = 0, H = d2g/dv2 >= 0: only Newton's method on the lower
level ever moves v there. On it f is minimised with its exact gradient and Hessian (``reduced``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .active_set import ActiveSet, Corner, guess
from .barrier import ConstraintValues, Milestone, ahead, barrier, estimates, judged, substituted
from .counted_losses import CountedLosses, Exhausted, PureLoss
from .lower_level import RUNAWAY, is_minimiser, solve_lower
from .manifold import Move, Point, attempt, escapes, linearise, newton_step
from .restarts import Ended
from .result import MESSAGES, MinimizeResult
from .rivals import Rival, rival

BOTTOM = -1e100  # upper losses under this count as minus infinity
POLISH = 5  # steps after the gradient test, until the step test holds too
ESCAPES = 5  # saddle points of f left at most
SLOW = 8  # slow lower steps in a row that betray a vanishing H
CORNERS = 1e-2  # barrier weights from this on are followed by a look for the corner

Callback = Callable[[MinimizeResult], Any]


@dataclass
class Solver:
    """A run, and what it has found so far.

    Args:
        losses: on the free variables.
        tolerance: as in ``minimize``.
        callback: likewise.
        limits: of both levels.
        both: f and g on the user's variables.
        spent: evaluations before this run.
        weight: of the barrier at the start; falls by ten from phase to phase.
    """

    losses: CountedLosses
    tolerance: float
    callback: Callback | None
    limits: tuple[ConstraintValues, ConstraintValues]
    both: tuple[PureLoss, PureLoss]
    spent: int = 0
    weight: float = 0.1
    at: Point | None = None
    corner: Corner | None = None
    rival: Rival | None = None
    iterations: int = 0
    slow: int = 0
    note: str = ""
    plain: tuple[PureLoss, PureLoss] = field(init=False)

    def __post_init__(self) -> None:
        f, g = (substituted(loss, *self.limits) for loss in self.both)
        self.plain = f, g

    def run(self) -> Ended:
        """Solve; the result with its status, and the better lower minimiser seen, if any."""
        self.losses.use(*self.plain)
        self.losses.check_dependence()
        try:
            status = self.follow() if any(self.limits) else self.iterate(self.tolerance)
        except Exhausted:
            return Ended(self.result("budget"), None, checked=False)
        result = self.result(self.second_look(status))
        tree, inside = self.losses.lower_level.tree, self.limits[1].inside
        rival = None if self.rival is None else inside(tree(self.rival.v))
        return Ended(result, rival, checked=not self.note)

    # Constraints.

    def follow(self) -> str:
        """The barrier's path, until its end or until the corner it leads to is found."""
        losses, path, last = self.losses, list[Milestone](), self.weight
        tau, status = self.weight, ""
        while tau > 0.9 * self.tolerance:
            corners, scales = self.corners()
            losses.use(*self.barred(tau, scales))
            final = tau < 9 * self.tolerance
            status = self.iterate(self.tolerance if final else max(1e-2 * tau, self.tolerance))
            if self.at is None or status in ("stopped", "unbounded", "lower_not_solved"):
                return status
            slack = -torch.cat(corners.constraint_values(self.at.u, self.at.low.v)).detach()
            path = [*path[-1:], Milestone(self.at.u, self.at.low.v, slack)]
            if len(path) == 2:
                if tau <= CORNERS and self.find_corner(corners, path, tau):
                    return "converged"
                u, v = ahead(*path)
                inside = all(bool((h < 0).all()) for h in corners.constraint_values(u, v))
                losses.u, losses.v = (u, v) if inside else path[-1][:2]
            else:
                losses.u, losses.v = path[-1][:2]
            last, tau = tau, tau / 10
        verdict = judged(path[-1].slack, last)
        return verdict if verdict and (verdict == "infeasible" or status == "converged") else status

    def corners(self) -> tuple[ActiveSet, tuple[float, float]]:
        """The equations of active sets, and the scales they use."""
        self.losses.use(*self.plain)
        upper, lower = (substituted(h.values, *self.limits) if h else None for h in self.limits)
        scales = self.losses.scales(self.losses.u, self.losses.v)
        return ActiveSet(self.losses, upper, lower, scales), scales

    def barred(self, tau: float, scales: tuple[float, float]) -> tuple[PureLoss, PureLoss]:
        """Both losses with barriers of weight ``tau``, on the free variables."""
        triples = zip(self.both, self.limits, scales, strict=True)
        f, g = (substituted(barrier(loss, h, tau, s), *self.limits) for loss, h, s in triples)
        return f, g

    def find_corner(self, corners: ActiveSet, path: list[Milestone], tau: float) -> bool:
        """Solve for the active set that the path points at."""
        before, now = path
        h_upper, _ = corners.constraint_values(now.u, now.v)
        working = guess(before.slack, now.slack, h_upper.numel())
        z = estimates(now.slack[h_upper.numel() :], tau)
        reach = 2 * math.hypot(_norm(now.u - before.u), _norm(now.v - before.v)) + self.tolerance
        self.losses.use(*self.plain)
        self.corner = corners.solve(now.u, now.v, z, working, reach, self.tolerance)
        return self.corner is not None

    def second_look(self, status: str) -> str:
        """Is there a better lower minimiser at the end?"""
        if status not in ("converged", "stalled", "flat_upper", "weakly_active"):
            return status
        losses, found = self.losses, self.found
        if found is None:
            return status
        u, v = found.u, found.v
        losses.use(*self.plain)
        try:
            scales = losses.scales(u, v)
            weights = (1e-2, 1e-6) if self.limits[1] else ()
            stages = [self.barred(tau, scales)[1] for tau in weights] or [self.plain[1]]
            self.rival = rival(losses, self.plain, stages, u, v, scales)
        except Exhausted:
            self.note += "; no evaluations were left to look for other lower minimisers"
        other = self.rival.status if self.rival else "shallower"
        return status if other == "shallower" else other

    # The trust region.

    def iterate(self, tolerance: float) -> str:
        """Trust region on f along the manifold; the status it ends with."""
        losses, fine = self.losses, 1e-2 * tolerance
        low = solve_lower(losses, losses.u, losses.v, fine)
        self.slow = low.slow
        if _norm(low.v) > RUNAWAY:
            return "lower_not_solved"
        at = self.at = linearise(losses, losses.u, low)
        if not low.converged or not is_minimiser(at.H, losses.eps):
            return "lower_not_solved"
        region, first, escaped = _Region(), max(at.scale, at.slope), 0
        while True:
            status = self.step(region, first, tolerance)
            if status in ("converged", "flat_upper") and escaped < ESCAPES:
                escaped += 1
                if self.escape(fine):
                    region, first = _Region(), max(first, self.at.scale, self.at.slope)
                    continue
            if status is not None:
                return status

    def step(self, region: _Region, first: float, tolerance: float) -> str | None:
        """One trust-region step; None to go on."""
        at, losses = self.at, self.losses
        assert at is not None
        self.iterations += 1
        size, scale, unit = float(at.gradient.norm()), max(at.scale, 1e-2 * first), 1 + _norm(at.u)
        if size <= 1e-14 * first:
            return "converged"
        small = size <= tolerance * scale
        forcing = 1e-3 if small else min(0.1, math.sqrt(size / scale))
        move = newton_step(losses, at, region.radius, forcing)
        step, length = move.step, _norm(move.step.value)
        close = step.interior and length <= tolerance * unit
        if small and (close or region.polish >= POLISH):
            return "converged" if close else "flat_upper"
        if _norm(move.u) > RUNAWAY or at.f < BOTTOM:
            return "unbounded"
        ratio = self.attempt(move, 1e-2 * tolerance)
        if ratio == -math.inf:
            return "unbounded"
        if ratio is not None:
            region.polish += small
            if ratio > 0.75 and not step.interior:
                region.radius *= 4 if abs(ratio - 1) < 0.1 else 2
            return "stopped" if self.report() else None
        if small:
            rounding = step.decrease <= 1e3 * losses.eps * abs(at.f)
            return "converged" if close or rounding else "flat_upper"
        region.radius = 0.25 * min(length, region.radius)
        return "stalled" if region.radius <= 1e-10 * unit else None

    def attempt(self, move: Move, fine: float) -> float | None:
        """The ratio of true to predicted decrease; None: refused; -inf: f is -inf there."""
        assert self.at is not None
        trial = attempt(self.losses, self.at, move, fine)
        self.slow = max(self.slow, trial.slow)
        if trial.value == -math.inf:
            return -math.inf
        if trial.at is None:
            return None
        self.at = trial.at
        return trial.ratio

    def escape(self, fine: float) -> bool:
        """Leave a saddle point of f; False where there is none to leave."""
        assert self.at is not None
        tiny = 1e3 * self.losses.eps * abs(self.at.f)
        moves = (m for m in escapes(self.losses, self.at) if m.step.decrease > tiny)
        return any(self.attempt(m, fine) is not None for m in moves)

    @property
    def found(self) -> Corner | None:
        """The corner, or else the last point accepted."""
        at = self.at
        if self.corner or at is None:
            return self.corner
        return Corner(
            at.u, at.low.v, at.q, at.low.model.residual, at.grad_u, at.grad_v, not at.H.nullity
        )

    def report(self) -> bool:
        """Tell the callback; does it want to stop?"""
        return self.callback is not None and self.callback(self.result("running")) is True

    def result(self, status: str) -> MinimizeResult:
        """What is known so far, in the user's variables."""
        losses, found, message = self.losses, self.found, MESSAGES[status] + self.note
        inside_u, inside_v = (limit.inside for limit in self.limits)
        adjoint = self.limits[1].direction
        u_tree, v_tree = losses.upper_level.tree, losses.lower_level.tree
        count = self.spent + losses.count
        if found is None:
            nan = math.nan
            return MinimizeResult(
                inside_u(u_tree(losses.u)), inside_v(v_tree(losses.v)),
                adjoint(v_tree(nan * losses.v)), nan, nan, nan, nan, nan,
                count, self.iterations, status, message,
            )  # fmt: skip
        if self.slow >= SLOW:
            message += "; the lower level is flat: H vanishes there, the multiplier is unbounded"
        if not found.unique:
            message += "; the lower minimiser is not unique: v has the smallest upper loss nearby"
        with torch.no_grad():  # without the barrier
            f, g = (float(loss(u_tree(found.u), v_tree(found.v))) for loss in self.plain)
        return MinimizeResult(
            inside_u(u_tree(found.u.clone())), inside_v(v_tree(found.v.clone())),
            adjoint(v_tree(found.q)), f, g,
            _norm(found.residual), _norm(found.grad_v), _norm(found.grad_u),
            count, self.iterations, status, message,
        )  # fmt: skip


@dataclass
class _Region:
    """The trust region, and how many steps were taken since the gradient test held."""

    radius: float = 1.0
    polish: int = 0


def _norm(x: Any) -> float:
    return float(x.norm())
