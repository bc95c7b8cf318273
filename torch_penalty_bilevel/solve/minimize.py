r"""Deterministic bilevel minimisation: a feasible trust-region Newton method in the reduced space.

.. math:: \min_u f(u, v) \quad\text{where}\quad v \in \arg\min_v g(u, v)

Iterates stay on the manifold r = grad_v g = 0, H = d2g/dv2 >= 0: only Newton's method on the lower
level ever moves v there. On it f is minimised with its exact gradient and Hessian (``reduced``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .barrier import Restriction, along_the_path, barrier, judged, substituted
from .losses import Exhausted, Losses, PureLoss
from .lower import RUNAWAY, is_minimiser, solve_lower
from .reduced import Move, Point, attempt, escapes, linearise, newton_step, other_minimiser
from .result import MESSAGES, MinimizeResult

BOTTOM = -1e100  # upper losses under this count as minus infinity
POLISH = 5  # steps after the gradient test, until the step test holds too
ESCAPES = 5  # saddle points of f left at most
SLOW = 8  # slow lower steps in a row that betray a vanishing H

Callback = Callable[[MinimizeResult], Any]


def minimize(
    upper_loss: PureLoss,
    lower_loss: PureLoss,
    upper: Any,
    lower: Any,
    *,
    upper_constraint: Any = None,
    lower_constraint: Any = None,
    tolerance: float = 1e-8,
    max_evaluations: int = 20000,
    callback: Callback | None = None,
) -> MinimizeResult:
    r"""Solve a deterministic bilevel problem to the end, as ``scipy.optimize.minimize`` would.

    A local method: it finds a u near the start at which f(u, v(u)) is stationary with no negative
    curvature, v(u) being the branch of lower minimisers that the start leads to. Where the
    minimiser is not isolated, f chooses (optimistically). At the end a few random starts of v look
    for a better lower minimiser; see ``status``.

    Args:
        upper_loss: f(upper, lower), 0-d, pure, twice differentiable.
        lower_loss: g(upper, lower), 0-d, pure, three times differentiable.
        upper: pytree u of tensors, the start; not modified.
        lower: pytree v of tensors, the start; not modified.
        upper_constraint: a constraint object, or a list of them: Box, NonNegative, Simplex, Ball,
            or Inequality whose closure takes (upper, lower); holds for every tensor of the level.
            Followed by a barrier (``barrier``) down to the weight ``tolerance``.
        lower_constraint: likewise; part of the lower level, v minimises g within it.
        tolerance: bound on the hypergradient's norm over ||grad_u f|| + ||J q||, and on the last
            Newton step over 1 + ||u||; v is solved a hundred times finer. At least 100 roundings of
            the parameters' dtype are used.
        max_evaluations: losses with gradients and Hessian products at most.
        callback: called with the result so far after every accepted step; True stops.

    Raises:
        NonFiniteError: a loss or a derivative is not finite where it must be.
        UnusedParameterError: an upper tensor on which nothing depends.
        DoubleBackwardError: an operation cannot be differentiated often enough.
        ValueError: an argument out of range.
        TypeError: losses that are not callable, leaves that are not floating-point tensors.

    Example:
        >>> import torch
        >>> from torch_penalty_bilevel import minimize
        >>> start = torch.zeros((), dtype=torch.float64)
        >>> result = minimize(
        ...     lambda u, v: (v - 1) ** 2 + u**2, lambda u, v: (v - 2 * u) ** 2, start, start
        ... )
        >>> round(float(result.upper), 6), round(float(result.lower), 6), result.status
        (0.4, 0.8, 'converged')
    """
    _check(upper_loss, lower_loss, tolerance, max_evaluations, callback)
    limits = (
        Restriction("upper_constraint", upper_constraint, 0),
        Restriction("lower_constraint", lower_constraint, 1),
    )
    plain = [substituted(loss, *limits) for loss in (upper_loss, lower_loss)]
    starts = limits[0].free(upper), limits[1].free(lower)
    losses = Losses(plain[0], plain[1], starts[0], starts[1], max_evaluations)
    solver = _Solver(losses, max(tolerance, 100 * losses.eps), callback, limits, plain)
    return solver.result(solver.run(upper_loss, lower_loss))


def _check(f: Any, g: Any, tolerance: float, max_evaluations: int, callback: Any) -> None:
    for name, value in (("upper_loss", f), ("lower_loss", g), ("callback", callback or _check)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
    if not max_evaluations >= 1:
        raise ValueError(f"max_evaluations must be >= 1, got {max_evaluations}")


@dataclass
class _Solver:
    losses: Losses
    tolerance: float
    callback: Callback | None
    limits: tuple[Restriction, Restriction]
    plain: list[Any]
    at: Point | None = None
    iterations: int = 0
    slow: int = 0
    note: str = ""

    def run(self, *both: PureLoss) -> str:
        losses, limits, path, status = self.losses, self.limits, list[tuple[Tensor, Tensor]](), ""
        values = [substituted(limit.values, *limits) for limit in limits if limit]
        last = math.ceil(-math.log10(self.tolerance)) if values else 0
        try:
            for phase in range(last + 1):
                tau = 10.0**-phase
                barred = [barrier(loss, h, tau) for loss, h in zip(both, limits, strict=True)]
                losses.use(*(substituted(loss, *limits) for loss in barred))
                if phase == 0:
                    losses.check_dependence()
                final = phase == last
                status = self.iterate(self.tolerance if final else max(1e-2 * tau, self.tolerance))
                if self.at is None or status in ("stopped", "unbounded", "lower_not_solved"):
                    return status
                path = [*path[-1:], (self.at.u, self.at.low.v)]
                losses.u, losses.v = along_the_path(losses, path, values)
        except Exhausted:
            return "budget"
        verdict = judged(losses, *path[-1], values, 10.0**-last)
        if verdict == "infeasible" or (status == "converged" and verdict):
            status = verdict
        return self.second_look(status)

    def second_look(self, status: str) -> str:
        """Is there a better lower minimiser at the end?"""
        if self.at is None or status not in ("converged", "stalled", "flat_upper", "weakly_active"):
            return status
        try:
            return other_minimiser(self.losses, self.at) or status
        except Exhausted:
            self.note += "; no evaluations were left to look for other lower minimisers"
            return status

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

    def report(self) -> bool:
        """Tell the callback; does it want to stop?"""
        return self.callback is not None and self.callback(self.result("running")) is True

    def result(self, status: str) -> MinimizeResult:
        losses, at, message = self.losses, self.at, MESSAGES[status] + self.note
        count, nan = losses.count, math.nan

        def as_upper(u: Tensor) -> Any:
            return self.limits[0].inside(losses.upper_level.tree(u))

        def as_lower(v: Tensor) -> Any:
            return self.limits[1].inside(losses.lower_level.tree(v))

        if at is None:
            blank = self.limits[1].direction(losses.lower_level.tree(nan * losses.v))
            return MinimizeResult(
                as_upper(losses.u), as_lower(losses.v), blank, nan, nan, nan, nan, nan, count,
                self.iterations, status, message,
            )  # fmt: skip
        if self.slow >= SLOW:
            message += "; the lower level is flat: H vanishes there, the multiplier is unbounded"
        if at.H.nullity:
            message += "; the lower minimiser is not unique: v has the smallest upper loss nearby"
        residual, adjoint, gradient = at.low.model.residual, at.grad_v, at.grad_u
        q, f, g = self.limits[1].direction(losses.lower_level.tree(at.q)), at.f, at.low.model.value
        if any(self.limits):  # without the barrier
            with torch.no_grad():
                trees = losses.upper_level.tree(at.u), losses.lower_level.tree(at.low.v)
                f, g = (float(loss(*trees)) for loss in self.plain)
        return MinimizeResult(
            as_upper(at.u.clone()), as_lower(at.low.v.clone()), q, f, g,
            _norm(residual), _norm(adjoint), _norm(gradient), count, self.iterations,
            status, message,
        )  # fmt: skip


@dataclass
class _Region:
    """The trust region, and how many steps were taken since the gradient test held."""

    radius: float = 1.0
    polish: int = 0


def _norm(x: Any) -> float:
    return float(x.norm())
