"""From the numbers of a hypergradient check to causes and remedies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from .report import AGREEMENT, Finding, HypergradientReport

_NEAR = 1e-3
"""v at most this far from v*(u), relative to ||v||, is at the minimiser."""


class Advice(NamedTuple):
    """What to do, in terms of the optimizer that is checked."""

    solver: str
    """What holds q."""
    unsolved: str
    """That is not solved for, and the remedy."""
    shifted: str
    """Why it solves (H + mu I) q = -grad_v f, and the remedy."""
    away: str
    """To bring v to its minimiser."""


class Context(NamedTuple):
    """What a report does not hold and a diagnosis needs."""

    eps: float
    """Of the coarsest lower dtype."""
    ridge_share: float
    """||a + mu nu|| / ||a||, mu the ridge; about 0 if the ridge is why a is not zero, else 1."""
    cancellation: float
    """||grad_u f + J q|| / (||grad_u f|| + ||J q||) of the exact hypergradient."""
    damping: float
    """lambda of the exact solve."""
    message: str
    """How the exact solve ended."""
    unused: tuple[str, ...]
    """Upper parameters that neither f nor grad_v g depends on."""
    advice: Advice
    failure: str = ""
    """Why there is no estimate."""
    true_share: float = math.nan
    """||grad_v f + H q|| / ||grad_v f|| of the closures' losses, whatever the penalty reports."""
    attainable: float = 0.0
    """The share that a converged q may have."""
    at_rounding: bool = False
    """grad_v g is as small as its rounding."""


def diagnosed(report: HypergradientReport, context: Context) -> HypergradientReport:
    """The same report with its findings, most fundamental first."""
    found = [
        *_about_losses(report, context),
        *_about_curvature(report, context),
        *_about_estimate(report, context),
        *_about_lower_level(report, context),
        *_notes(report, context),
    ]
    return dataclasses.replace(report, findings=tuple(found))


def _about_losses(report: HypergradientReport, context: Context) -> Iterator[Finding]:
    if not report.same_lower_problem:
        yield Finding(
            "penalty",
            "this penalty solves another lower problem than grad_v g = 0 (its residual is not "
            "grad_v g); the exact values are those of g: to check it, compare with an optimizer "
            "whose lower closure returns the loss that the penalty minimises",
        )
    if report.repeats == "no":
        yield Finding(
            "closures",
            "a closure returns another value when called again with the same random numbers, so "
            "estimate and exact gradient belong to different data; draw the batch outside the "
            "closures",
        )
    if context.unused:
        yield Finding(
            "unused",
            f"neither f nor grad_v g depends on {list(context.unused)}: these do not move",
        )
    if not report.depends_on_upper:
        yield Finding(
            "dependence",
            "grad_v g does not depend on u, so the hypergradient is the plain gradient of f; are "
            "the closures swapped, or is u detached in g?",
        )
    if report.slope_norm == 0:
        yield Finding(
            "upper loss",
            "grad_v f is exactly zero, so v carries nothing from u to f; does the upper closure "
            "use the lower parameters, and not a copy of the model?",
        )


def _about_curvature(report: HypergradientReport, context: Context) -> Iterator[Finding]:
    downwards = report.curvature_along_residual < 0
    if downwards or not report.positive_definite:
        where = "along r" if downwards else "along a direction of the exact solve"
        yield Finding(
            "curvature",
            f"g curves downwards or not at all {where}: v is at a saddle, a maximum or a flat "
            "place, where v*(u) has no derivative; minimise g further, add weight decay to g, or "
            "pass damping",
        )
    if not report.solved:
        yield Finding("solve", f"the exact solve did not converge: {context.message}")
    # The errors of a central difference are about eps^(2/3), curved networks a hundred times that.
    if report.engine_difference > context.eps**0.2:
        yield Finding(
            "engine",
            f"two ways to differentiate g twice differ by {report.engine_difference:.1e} of their "
            "size: kinks (ReLU, max) near this point, a gradient that its graph does not explain "
            "(a hook, a custom backward, values under no_grad or detach), or rounding; what v "
            "re-solved says decides; compare curvature='double_backward' and 'finite_difference', "
            "try float64",
        )


def _about_estimate(report: HypergradientReport, context: Context) -> Iterator[Finding]:
    solver = context.advice.solver
    if context.failure:
        yield Finding(solver, f"there is no estimate: {context.failure}")
    if not report.relative_error > AGREEMENT:
        return
    share = report.adjoint_residual_norm / (report.slope_norm or math.inf)
    same_products = report.engine_difference <= context.eps**0.2
    if context.ridge_share < 0.3:
        yield Finding(
            "ridge",
            f"the {solver} has converged, but to (H + mu I) q = -grad_v f: "
            f"{context.advice.shifted}",
        )
    elif share > AGREEMENT:
        yield _unsolved(share, context)
    elif context.damping == 0 and same_products and report.same_lower_problem:
        if context.true_share > max(AGREEMENT, 2 * share):
            yield Finding(
                "penalty",
                f"the {solver} has converged to a certificate of {share:.2g} of ||grad_v f||, but "
                f"||grad_v f + H q|| of the two closures is {context.true_share:.2g}: the penalty "
                'has another product than H q, or ("value") too small a weight',
            )
        elif share > context.attainable:
            yield _unsolved(share, context)
    if context.damping > 0:
        yield Finding(
            "damping",
            f"the exact solve is damped by {context.damping:g}, which biases it too; pass a "
            "smaller damping",
        )


def _unsolved(share: float, context: Context) -> Finding:
    solver, remedy = context.advice.solver, context.advice.unsolved
    return Finding(
        solver,
        f"the {solver} has not converged: the certificate is {share:.2g} of ||grad_v f||; {remedy}",
    )


def _about_lower_level(report: HypergradientReport, context: Context) -> Iterator[Finding]:
    if not report.same_lower_problem:
        return
    exact = math.sqrt(sum(float(t.double().square().sum()) for t in report.exact))
    off = any(
        not abs(s.resolved - s.exact) <= AGREEMENT * exact + 3 * s.uncertainty
        for s in report.telling
    )
    near = _NEAR if report.telling else AGREEMENT
    away = not (report.lower_distance <= near or context.at_rounding)
    if not (off if report.telling else away):
        return
    if away:
        far = (
            "" if math.isnan(report.lower_distance) else f", {report.lower_distance:.2g} ||v|| away"
        )
        yield Finding(
            "lower level",
            f"v is not at the minimiser of g (||grad_v g|| = {report.residual_norm:.2g}{far}), so "
            f"the implicit formula is that of another v; {context.advice.away}",
        )
    elif context.damping == 0:  # else the formula is not exact, and need not fit
        yield Finding(
            "landscape",
            "v is at a minimiser, yet f after re-solving g moves differently: kinks, several "
            "minima, or a first derivative of g or f that is wrong (a custom backward, a detach)",
        )


def _notes(report: HypergradientReport, context: Context) -> Iterator[Finding]:
    if context.cancellation < 1e-3:
        yield Finding(
            "stationary",
            "the hypergradient is a small difference of large terms (u is nearly stationary), so "
            "even a good estimate has a large relative error",
        )
    if report.repeats == "with the same random numbers":
        yield Finding(
            "random",
            "the closures draw random numbers (dropout, a minibatch); all of this holds for one "
            "draw, while the multiplier averages over many: check on fixed data, in eval mode",
        )
