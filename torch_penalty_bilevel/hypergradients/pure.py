"""Methods on pure functions, whose lower steps are taken here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..linear_solve import Status
from ..tensors import Pair, Tensors, axpy, filled, norm, sum_of_optional
from .estimate import estimated
from .forward import carry_forward
from .implicit import usual_step
from .options import MethodOptions
from .problem import LocalProblem, Upper
from .unrolled import descend


class HypergradientInfo(NamedTuple):
    """How good a hypergradient is."""

    iterations: int
    """Second-order products used; of ``"forward"`` the number of lower steps."""
    residual_norm: float
    """||(H + damping) q + grad_v f||_2 (not squared), the certificate; of a map with (I - dPhi/dv)'
    in the place of H. Of ``"forward"``, which has no q: ||dr/du + (dr/dv) dv/du||_F."""
    status: Status
    """How it ended; see ``linear_solve.Status``."""
    message: str
    """What happened and what to try."""
    adjoint: Any
    """q, shaped like ``lower``; -(H + damping)^{-1} grad_v f when converged. None of
    ``"forward"``."""

    @property
    def converged(self) -> bool:
        """Did the residual reach the tolerance? Of ``"reverse"`` and ``"forward"`` also: did v?"""
        return self.status == "converged"


def pure_hypergradient(
    problem: LocalProblem, method: str, options: MethodOptions
) -> tuple[Tensors, HypergradientInfo]:
    """The hypergradient by any method; ``options`` are checked.

    Raises:
        ValueError: ``"one_step"`` without a step size.
        NonFiniteError: the losses or their gradients are not finite, here or on the way.
    """
    step = options.step_size
    if method == "one_step" and step is None:
        if not problem.lower_is_map:
            raise ValueError(
                'method="one_step" needs step_size, by which H^{-1} is replaced: the learning '
                "rate of the lower level"
            )
        step = 1.0
    visits = []
    steps, start = options.lower_steps or 100, problem.at.lower
    if method in ("reverse", "forward"):
        if step is None:
            linear = problem.linearise()
            step = usual_step(problem, linear.product, linear.residual)
        visits, end = descend(problem, steps, step)
        problem.at = Pair(problem.at.upper, end)
    options = replace(options, step_size=step)
    if method == "forward":
        assert step is not None
        return _forward(problem, [v.lower for v in visits], step, options.tolerance)
    kept = visits[-options.truncation :] if options.truncation else visits
    estimate = estimated(problem, method, options, kept)
    solution = estimate.solution
    message, status = solution.message, solution.status
    if method == "reverse":
        assert step is not None
        moving = _still_moves(problem, estimate.residual, step, start, options.tolerance)
        if moving:
            message, status = moving, "unfinished"
    info = HypergradientInfo(
        solution.iterations, solution.residual_norm, status, message, solution.value
    )
    return filled(estimate.hypergradient, problem.at.upper), info


def _forward(
    problem: LocalProblem, visits: list[Tensors], step: float, tolerance: float | None
) -> tuple[Tensors, HypergradientInfo]:
    upper: Upper = problem.upper()
    _, residual = problem.residual()
    carried = carry_forward(problem, visits, step, upper.slope)
    bound = (_attainable(problem) if tolerance is None else tolerance) * carried.size
    message = _still_moves(problem, residual, step, visits[0], tolerance)
    if not carried.error <= bound:
        message = (
            f"the sensitivities of v have residual {carried.error:.1e} > {bound:.1e}; raise "
            "lower_steps"
        )
    total = filled(sum_of_optional(upper.direct, carried.indirect), problem.at.upper)
    status: Status = "unfinished" if message else "converged"
    return total, HypergradientInfo(len(visits), carried.error, status, message or status, None)


def _still_moves(
    problem: LocalProblem, residual: Tensors, step: float, start: Tensors, tolerance: float | None
) -> str:
    """Why v_T is not a lower solution yet; empty if it is one to tolerance."""
    end = problem.at.lower
    way = float(norm(axpy(-1.0, start, end))) + float(norm(end))
    bound = (_attainable(problem) if tolerance is None else tolerance) * way
    move = step * float(norm(residual))
    if move <= bound:
        return ""
    return f"the next lower step would still move v by {move:.1e} > {bound:.1e}; raise lower_steps"


def _attainable(problem: LocalProblem) -> float:
    return problem.engine.attainable(problem.at.lower)
