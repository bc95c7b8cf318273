"""Central differences of u -> f(u, v*(u)): first derivatives only, so the last word of a check.

Where the search for a minimum of g leaves the numbers there are none.
"""

from __future__ import annotations

import math

from ..errors import NonFiniteError
from ..linear_solve import random_direction
from ..tensors import Tensors, coarsest_eps, dot, norm, scale
from .exact import Implicit, ImplicitProblem
from .report import Slope

_MOST_STEPS = 6
_STEADY = 0.01


def slopes(problem: ImplicitProblem, estimate: Tensors, exact: Implicit) -> tuple[Slope, ...]:
    """Solve the lower level here, then at u +- h d for two unit directions d; what that says."""
    directions = {"a random direction": random_direction(problem.at.upper)}
    length = float(norm(estimate))
    if length > 0:
        directions = {"the estimate": scale(estimate, 1.0 / length)} | directions
    found: list[Slope] = []
    try:
        problem.solve_lower()
        for name, direction in directions.items():
            resolved, uncertainty = _resolved(problem, direction, float(norm(exact.solution.value)))
            found.append(
                Slope(
                    direction=name,
                    estimate=float(dot(estimate, direction)),
                    exact=float(dot(exact.hypergradient, direction)),
                    resolved=resolved,
                    uncertainty=uncertainty,
                )
            )
    except NonFiniteError:
        return ()
    return tuple(found)


def _resolved(problem: ImplicitProblem, direction: Tensors, adjoint: float) -> tuple[float, float]:
    """The central difference along ``direction``, and how far it may be off.

    The first step h balances the error of the difference, h^2, and what the solver leaves,
    sqrt(eps) / h, where u's entries are alike; it shrinks until two of them agree.
    """
    size = float(norm([u.detach() for u in problem.at.upper])) or 1.0
    eps = coarsest_eps((*problem.at.upper, *problem.at.lower))
    step = eps**0.2 * size
    slope, change, noise = math.nan, math.inf, math.inf
    for _ in range(_MOST_STEPS):
        ahead, error_ahead = problem.solved_value(scale(direction, step))
        behind, error_behind = problem.solved_value(scale(direction, -step))
        before, slope = slope, (ahead - behind) / (2 * step)
        rounding = eps * (abs(ahead) + abs(behind))
        noise = (adjoint * (error_ahead + error_behind) + rounding) / (2 * step)
        change = abs(slope - before) if math.isfinite(before) else math.inf
        if change <= max(noise, _STEADY * abs(slope)):
            break
        step /= 8
    return slope, noise + change
