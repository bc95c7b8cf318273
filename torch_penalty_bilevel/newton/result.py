"""What ``minimize`` returns, and what it says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MESSAGES = {
    "running": "not finished: this is the last point accepted",
    "converged": "first- and second-order conditions of both levels hold",
    "flat_upper": (
        "the hypergradient is within tolerance but Newton steps stay long: the upper variables are "
        "not determined, or run to infinity; bound or regularise them, or accept the loss reached"
    ),
    "lower_tie": (
        "another minimiser of the lower loss at this u has the same lower loss and a smaller upper "
        "loss, so the optimistic solution is elsewhere: start `lower` there"
    ),
    "lower_not_global": (
        "the lower loss has a lower minimum elsewhere at this u; this solves the problem of the "
        "local minimiser only: start `lower` in the other one"
    ),
    "lower_not_solved": (
        "no minimiser of the lower loss in reach of the start: it is unbounded below, not smooth, "
        "or the budget of a descent is spent; start `lower` elsewhere or add a little weight decay"
    ),
    "budget": "max_evaluations is spent before convergence; raise it, or start from this result",
    "stalled": (
        "no step along the lower solutions lowers the upper loss any more: rounding, a loss that "
        "is not smooth, or a lower solution that jumps; check upper_grad_norm, and start elsewhere "
        "or smooth the losses"
    ),
    "weakly_active": (
        "converged, but a constraint is nearly active with a multiplier near zero, and no active "
        "set near the end of the barrier's path meets the optimality conditions: the error is up "
        "to about sqrt(tolerance); lower tolerance, or drop the constraint if it is not needed"
    ),
    "infeasible": (
        "a constraint stays violated: no feasible point was found near the path, or upper "
        "variables that the losses do not determine ran off; start inside, bound or regularise them"
    ),
    "unbounded": (
        "the upper loss falls without bound along the lower solutions; bound or regularise upper"
    ),
    "stopped": "the callback returned True; start from this result to go on",
}


@dataclass(frozen=True)
class MinimizeResult:
    """A bilevel solution and its certificate.

    With constraints the norms are those of the optimality conditions at the active set found,
    multipliers of the constraints included; of the barrier problem, where none was found
    (never "converged" on a kink). The losses are without the barrier.

    Attributes:
        upper: u, structured like the start.
        lower: v, a minimiser of g(u, .) up to ``residual_norm``.
        multiplier: q = -H^+ grad_v f, the adjoint, structured like ``lower``.
        upper_loss: f(u, v).
        lower_loss: g(u, v).
        residual_norm: ||grad_v g||_2 (not squared).
        adjoint_residual_norm: ||grad_v f + H q||_2; with an invertible H zero up to rounding.
        upper_grad_norm: ||grad_u f + J q||_2, the hypergradient.
        evaluations: losses with their gradients and products with Hessians; products that
            differentiate g three times count two.
        iterations: trust-region steps tried.
        status: "converged", "flat_upper", "lower_tie", "lower_not_global", "lower_not_solved",
            "weakly_active", "infeasible", "budget", "stalled", "unbounded" or "stopped";
            "running" in a callback.
        message: what happened and what to try.
        solutions: different points that converged, over all restarts.
    """

    upper: Any
    lower: Any
    multiplier: Any
    upper_loss: float
    lower_loss: float
    residual_norm: float
    adjoint_residual_norm: float
    upper_grad_norm: float
    evaluations: int
    iterations: int
    status: str
    message: str
    solutions: int = 0

    @property
    def converged(self) -> bool:
        """Is ``status`` "converged"?"""
        return self.status == "converged"
