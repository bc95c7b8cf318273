"""``minimize``: deterministic bilevel problems, by one run of the solver or by several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, checked_number
from ..errors import NondeterministicClosureError
from .barrier import ConstraintValues, as_list
from .counted_losses import CountedLosses, PureLoss
from .restarts import Ended, Task, search
from .result import MinimizeResult
from .run import Callback, Solver


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
    restarts: int = 0,
    seed: int = 0,
    callback: Callback | None = None,
) -> MinimizeResult:
    r"""Solve a deterministic bilevel problem to the end, as ``scipy.optimize.minimize`` would.

    A local method: it finds a u near the start at which f(u, v(u)) is stationary with no negative
    curvature, v(u) being the branch of lower minimisers that the start leads to. Where the
    minimiser is not isolated, f chooses (optimistically). At the end a few random starts of v look
    for a better lower minimiser; see ``status``. A barrier follows constraints, and the equation of
    the active set it points at ends them exactly, also on a kink of v(u) (``active_set``).

    Other local solutions are looked for with ``restarts`` alone. None finds a solution with no
    feasible points around that are nearly as good, as where v(u) jumps at a single u without a
    second well of g (``testing.get("lmp_1987_01")``).

    Args:
        upper_loss: f(upper, lower), 0-d, pure, twice differentiable.
        lower_loss: g(upper, lower), 0-d, pure, three times differentiable.
        upper: pytree u of tensors, the start; not modified.
        lower: pytree v of tensors, the start; not modified.
        upper_constraint: a constraint object, or a list of them: Box, NonNegative, Simplex, Ball,
            or Inequality whose closure takes (upper, lower); holds for every tensor of the level.
        lower_constraint: likewise; part of the lower level, v minimises g within it.
        tolerance: bound on the hypergradient's norm over ||grad_u f|| + ||J q||, and on the last
            Newton step over 1 + ||u||; v is solved a hundred times finer. At least 100 roundings of
            the parameters' dtype are used.
        max_evaluations: losses with gradients and Hessian products at most.
        restarts: further runs at most, on what is left of ``max_evaluations``: from other lower
            minimisers in sight, on the cut g(u, v) <= g(u, w) between two of them, and from random
            starts in the box or around the best solution. The best result is returned, with the
            number of different solutions. This is no proof that it is the global one.
        seed: of the random starts.
        callback: called with the result so far after every accepted step; True stops.

    Raises:
        NonFiniteError: a loss or a derivative is not finite where it must be.
        UnusedParameterError: an upper tensor on which nothing depends.
        DoubleBackwardError: an operation cannot be differentiated often enough.
        NondeterministicClosureError: a loss or an inequality, called again, returns something else.
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
    _check(upper_loss, lower_loss, tolerance, max_evaluations, restarts, callback)
    check_count("seed", seed, at_least=0)
    task = Task(upper_loss, lower_loss, upper, lower, upper_constraint, lower_constraint)

    def run(task: Task, limit: int, spent: int) -> Ended:
        limits = (
            ConstraintValues("upper_constraint", task.upper_constraint, 0),
            ConstraintValues("lower_constraint", task.lower_constraint, 1),
        )
        starts = limits[0].free(task.upper), limits[1].free(task.lower)
        losses = CountedLosses(task.upper_loss, task.lower_loss, *starts, limit)
        if spent == 0:
            _check_deterministic(task)
        both = task.upper_loss, task.lower_loss
        fine = max(tolerance, 100 * losses.eps)
        return Solver(losses, fine, callback, limits, both, spent, task.weight).run()

    return search(run, task, restarts, seed, max_evaluations)


def _check(
    f: Any, g: Any, tolerance: float, max_evaluations: int, restarts: int, callback: Any
) -> None:
    for name, value in (("upper_loss", f), ("lower_loss", g), ("callback", callback or _check)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    relative = "it bounds the hypergradient's norm over ||grad_u f|| + ||J q||"
    checked_number("tolerance", tolerance, "lie in (0, 1)", relative)
    check_count("max_evaluations", max_evaluations, at_least=1)
    check_count("restarts", restarts, at_least=0)


def _check_deterministic(task: Task) -> None:
    """Call everything twice at the start."""
    called: dict[str, Callable[[Any, Any], Any]] = {
        "upper_loss": task.upper_loss,
        "lower_loss": task.lower_loss,
    }
    for level in ("upper", "lower"):
        for each in as_list(getattr(task, f"{level}_constraint")):
            if hasattr(each, "closure"):
                called[f"the closure of {level}_constraint's Inequality"] = each.closure
    for name, function in called.items():
        first, again = (function(task.upper, task.lower) for _ in range(2))
        if not isinstance(first, Tensor) or not first.is_floating_point():
            continue  # refused with its reason where it is used
        close = torch.finfo(first.dtype).eps ** 0.5  # sums may be ordered differently
        if not torch.allclose(first, again, rtol=close, atol=close, equal_nan=True):
            raise NondeterministicClosureError(
                f"{name} returned {first.detach()} and, called again at the start, "
                f"{again.detach()}; minimize solves deterministic problems: draw the data outside, "
                "in eval mode, or use PenaltyBilevelOptimizer"
            )
