"""One call that compares the optimizer's hypergradient with exact ones and says why it is off."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_count, checked_number
from ..curvature import Automatic, Curvature, FiniteDifference, Loss
from ..curvature.micro_batches import MeanLoss, parts_of, value_of
from ..errors import AdjointError, BilevelWarning
from ..evaluation import Evaluation, measure
from ..hypergradients import MethodOptions
from ..linear_solve import random_direction
from ..penalties import Losses, Reduce
from ..tensors import Pair, Tensors, axpy, coarsest_eps, dense, dot, filled, norm
from ..undo.random_state import RandomState
from .dependence import dependence
from .diagnosis import Advice, Context, diagnosed
from .exact import Implicit, ImplicitProblem, implicit_hypergradient
from .own_problem import at_rounding, newton_length, own_certificate, solves_another
from .report import HypergradientReport, Repeats
from .resolved_slopes import slopes

_MOST_UNKNOWNS_TO_RESOLVE = 2_000
_MOST_PRODUCTS = 1_000


class CheckOptions(NamedTuple):
    """How thoroughly to check; see ``PenaltyBilevelOptimizer.check_hypergradient``."""

    tolerance: float | None
    max_iterations: int | None
    damping: float
    resolve: bool | None

    def checked(self) -> CheckOptions:
        """These options; raises for values out of range."""
        if self.tolerance is not None:
            bounded = "it bounds ||H q + grad_v f|| / ||grad_v f||"
            checked_number("tolerance", self.tolerance, "lie in (0, 1)", bounded)
        if self.max_iterations is not None:
            check_count("max_iterations", self.max_iterations, at_least=1)
        exact = "0 solves the equation itself"
        checked_number("damping", self.damping, "be a finite number >= 0", exact)
        resolve: Any = self.resolve
        if resolve is not None and not isinstance(resolve, bool):
            raise ValueError(f"resolve must be True, False or None, got {self.resolve!r}")
        return self


class Subject(NamedTuple):
    """What there is to check: an optimizer's parts, restricted to parameters that move."""

    losses: Losses
    at: Pair
    names: Sequence[str]
    estimate: Callable[[Losses], Evaluation]
    """What the next upper step would apply."""
    shift: float
    """mu, where q is to solve (H + mu I) q = -grad_v f."""
    lower_is_map: bool
    curvature: Curvature
    reduce: Reduce
    step: int
    """Number of the step that would come next, for errors."""
    advice: Advice


def check(subject: Subject, options: CheckOptions) -> HypergradientReport:
    """Compare; see ``HypergradientReport``. The caller undoes what this moves."""
    if subject.lower_is_map:
        raise ValueError(
            "check_hypergradient compares with implicit differentiation of a lower loss; with "
            "a map check the adjoint residual in optimizer.metrics instead"
        )
    with warnings.catch_warnings():
        # That "auto" switches engines is news in a step; here it is a line of the report.
        warnings.simplefilter("ignore", BilevelWarning)
        repeats = _repeats(subject.losses, subject.at)
        held = _with_same_random_numbers(subject.losses, subject.at)
        return _compare(subject._replace(losses=held), options, repeats)


def _compare(subject: Subject, options: CheckOptions, repeats: Repeats) -> HypergradientReport:
    at, losses = subject.at, subject.losses
    depends = dependence(losses, at, False, _reference(subject.curvature))
    own = _own(subject, losses)
    evaluation, estimate = own.evaluation, own.gradient
    problem = ImplicitProblem(losses, at, _reference(subject.curvature), subject.reduce)
    exact = _exact(problem, options)
    error, cosine = _compared(estimate, exact.hypergradient)
    seen = float(norm(exact.products(random_direction(at.lower)).upper)) > 0
    curvature, cancellation = _curvature_along_residual(exact), _cancellation(exact)
    distance = newton_length(exact, at, exact.linear.residual)
    another, certificate = False, math.nan
    if evaluation is not None:
        another = repeats != "no" and solves_another(evaluation, exact, at)
        certificate = own_certificate(evaluation, exact)
    rounding, slope = at_rounding(exact, at), float(norm(exact.upper.slope))
    # From here on parameters move in place, which ends the life of ``exact.linear``.
    difference = _engine_difference(subject, problem, exact, repeats)
    report = HypergradientReport(
        cosine=cosine,
        relative_error=error,
        residual_norm=float(norm(exact.linear.residual)),
        adjoint_residual_norm=own.certificate,
        slope_norm=slope,
        lower_distance=distance,
        curvature_along_residual=curvature,
        positive_definite=exact.positive_definite,
        depends_on_upper=any(depends.residual) and seen,
        repeats=repeats,
        engine=problem.engine_name,
        engine_difference=difference,
        products=exact.solution.iterations,
        solve_residual=exact.solution.residual_norm / (slope or 1.0),
        solved=exact.solution.converged,
        damping=options.damping,
        slopes=slopes(problem, estimate, exact) if _resolves(options, at, repeats) else (),
        findings=(),
        estimate=estimate,
        exact=exact.hypergradient,
        same_lower_problem=not another,
    )
    context = Context(
        eps=coarsest_eps(at.lower),
        ridge_share=1.0 if evaluation is None else _ridge_share(subject, evaluation),
        cancellation=cancellation,
        damping=options.damping,
        message=exact.solution.message,
        unused=tuple(
            n for n, *uses in zip(subject.names, *depends[:2], strict=True) if not any(uses)
        ),
        advice=subject.advice,
        failure=own.failure,
        true_share=certificate / (slope or 1.0),
        attainable=problem.tolerance,
        at_rounding=rounding,
    )
    return diagnosed(report, context)


# The closures.


def _repeats(losses: Losses, at: Pair) -> Repeats:
    """Call both closures three times: the second time with the random numbers of the first."""

    def values() -> Tensor:
        pair = value_of(losses.upper, at), value_of(losses.lower, at)
        return torch.stack([value.double().cpu() for value in pair])

    random = RandomState(t.device for t in (*at.upper, *at.lower))
    first = values()
    random.restore()
    again, then = values(), values()
    # Atomic additions on a GPU reorder sums; other data change more than half of the digits.
    rounding = coarsest_eps((*at.upper, *at.lower)) ** 0.5
    if not torch.allclose(first, again, rtol=rounding, atol=0.0, equal_nan=True):
        return "no"
    same = torch.allclose(again, then, rtol=rounding, atol=0.0, equal_nan=True)
    return "exactly" if same else "with the same random numbers"


def _with_same_random_numbers(losses: Losses, at: Pair) -> Losses:
    random = RandomState(t.device for t in (*at.upper, *at.lower))

    def held(loss: Loss) -> Loss:
        first, *others = parts_of(loss)

        def replayed(upper: Tensors, lower: Tensors) -> Tensor:
            random.restore()
            return first(upper, lower)

        return MeanLoss([replayed, *others]) if others else replayed

    return Losses(held(losses.upper), held(losses.lower))


# Estimate and exact.


class _Own(NamedTuple):
    """What the optimizer would apply."""

    gradient: Tensors
    """NaN where it has none."""
    certificate: float
    evaluation: Evaluation | None
    failure: str
    """Why there is none."""


def _own(subject: Subject, losses: Losses) -> _Own:
    upper = subject.at.upper
    try:
        evaluation = subject.estimate(losses)
    except AdjointError as error:
        nowhere = tuple(torch.full_like(dense(u.detach()), math.nan) for u in upper)
        return _Own(nowhere, math.nan, None, error.reason)
    certificate = measure(evaluation, subject.names, subject.step).adjoint_residual
    gradient = tuple(dense(g) for g in filled(evaluation.upper_grad, upper))
    return _Own(gradient, certificate, evaluation, "")


def _reference(curvature: Curvature) -> Curvature:
    """The engine itself, or an exact one where it is a difference and torch has one."""
    exact = curvature.exact()
    return Automatic() if exact.takes_differences and not exact.falls_back else exact


def _exact(problem: ImplicitProblem, options: CheckOptions) -> Implicit:
    unknowns = sum(v.numel() for v in problem.at.lower)
    limit = options.max_iterations or min(10 * unknowns, _MOST_PRODUCTS)
    solve = MethodOptions(max_iterations=limit, damping=options.damping)
    return implicit_hypergradient(problem, solve, options.tolerance or problem.tolerance)


def _compared(estimate: Tensors, exact: Tensors) -> tuple[float, float]:
    """(||estimate - exact|| / ||exact||, cosine)."""
    error, size = float(norm(axpy(-1.0, exact, estimate))), float(norm(exact))
    lengths = float(norm(estimate)) * size
    cosine = float(dot(estimate, exact)) / lengths if lengths > 0 else math.nan
    if size == 0:
        return (0.0 if error == 0 else math.inf), cosine
    return error / size, cosine


# Symptoms.


def _curvature_along_residual(exact: Implicit) -> float:
    r = exact.linear.residual
    square = float(dot(r, r))
    return float(dot(r, exact.linear.product(r))) / square if square > 0 else math.nan


def _cancellation(exact: Implicit) -> float:
    direct, total = exact.direct, exact.hypergradient
    parts = float(norm(direct)) + float(norm(axpy(-1.0, direct, total)))
    return float(norm(total)) / parts if parts != 0 else 0.0


def _ridge_share(subject: Subject, evaluation: Evaluation) -> float:
    """||a + mu nu|| / ||a|| with mu the rule's shift; 1 where there is none."""
    size = float(norm(evaluation.adjoint_residual))
    if size == 0:
        return 1.0
    return float(norm(axpy(subject.shift, evaluation.adjoint, evaluation.adjoint_residual))) / size


def _engine_difference(
    subject: Subject, problem: ImplicitProblem, exact: Implicit, repeats: Repeats
) -> float:
    """How much (J q, H q) of an independent engine differ, the larger of both blocks.

    That engine is the optimizer's own where the exact solve used another, else central.
    """
    if repeats == "no" or problem.differences:
        return math.nan
    own = subject.curvature.takes_differences and not subject.curvature.falls_back
    other = copy.deepcopy(subject.curvature) if own else FiniteDifference(central=True)
    direction = exact.solution.value
    if not 0 < float(norm(direction)) < math.inf:
        direction = random_direction(subject.at.lower)
    here = exact.products(direction)
    twin = ImplicitProblem(subject.losses, subject.at, other, subject.reduce)
    there = exact._replace(linear=twin.linearise()).products(direction)
    differences = [axpy(-1.0, a, b) for a, b in zip(here, there, strict=True)]
    sizes = [
        max(float(norm(here.upper)), float(norm(exact.direct))),
        float(norm(here.lower)),
    ]
    return max(float(norm(d)) / (s or 1.0) for d, s in zip(differences, sizes, strict=True))


# Finite differences of the solved lower level.


def _resolves(options: CheckOptions, at: Pair, repeats: Repeats) -> bool:
    if options.resolve is not None:
        return options.resolve
    small = sum(v.numel() for v in at.lower) <= _MOST_UNKNOWNS_TO_RESOLVE
    accurate = coarsest_eps((*at.upper, *at.lower)) < 1e-6
    together = len({v.device for v in at.lower}) == 1
    return small and accurate and together and repeats != "no"
