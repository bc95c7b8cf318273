"""What a report says, for numbers made up on both sides of each threshold."""

import math

import pytest
import torch

from torch_penalty_bilevel import HypergradientReport
from torch_penalty_bilevel.checks.diagnosis import Advice, Context, diagnosed
from torch_penalty_bilevel.checks.report import Finding, Slope

CONTEXT = Context(
    eps=2e-16,
    ridge_share=1.0,
    cancellation=1.0,
    damping=0.0,
    message="converged",
    unused=(),
    advice=Advice(
        "multiplier", "take more lower_steps", "lower the ridge", "take more lower_steps"
    ),
)


def report(entries=100, size=1.0, **changes):
    """All is well, with an estimate of ``entries`` numbers and the length ``size``."""
    vector = (torch.full((entries,), size / math.sqrt(entries)),)
    numbers = {
        "cosine": 1.0,
        "relative_error": 0.0,
        "residual_norm": 0.0,
        "adjoint_residual_norm": 0.0,
        "slope_norm": 1.0,
        "lower_distance": 0.0,
        "curvature_along_residual": 1.0,
        "positive_definite": True,
        "depends_on_upper": True,
        "repeats": "exactly",
        "engine": "double_backward",
        "engine_difference": 0.0,
        "products": 1,
        "solve_residual": 0.0,
        "solved": True,
        "damping": 0.0,
        "slopes": (),
        "findings": (),
        "estimate": vector,
        "exact": vector,
    }
    return HypergradientReport(**numbers | changes)


def slope(direction="the estimate", estimate=1.0, resolved=1.0, uncertainty=0.0, exact=None):
    exact = estimate if exact is None else exact
    return (Slope(direction, estimate, exact, resolved, uncertainty),)


def found(changed, **context):
    return [f.name for f in diagnosed(changed, CONTEXT._replace(**context)).findings]


def test_nothing_is_found_where_all_is_well():
    assert found(report()) == []
    assert report().agrees


@pytest.mark.parametrize(("off", "agrees"), [(0.015, True), (0.05, False)])
def test_a_random_direction_has_its_share_of_the_length(off, agrees):
    """Of 100 entries it sees a tenth: 2 / sqrt(100) of the tenth that is allowed."""
    slopes = slope("a random direction", estimate=0.1, resolved=0.1 + off)
    assert report(slopes=slopes).agrees == agrees


@pytest.mark.parametrize(("uncertainty", "agrees"), [(0.0, False), (0.05, True)])
def test_slopes_that_are_not_known_better_agree(uncertainty, agrees):
    assert report(slopes=slope(resolved=1.2, uncertainty=uncertainty)).agrees == agrees


def test_without_a_reference_there_is_no_agreement():
    lost = report(relative_error=math.nan, slopes=slope())
    assert not lost.agrees
    assert "no verdict" in str(lost)


def test_without_an_estimate_slopes_are_held_to_the_exact_one():
    lost = {"relative_error": math.nan, "estimate": (torch.tensor([math.nan]),)}
    for uncertainty, telling in ((0.5, 1), (2.0, 0)):
        slopes = slope("a random direction", math.nan, resolved=0.1, uncertainty=uncertainty)
        assert len(report(**lost, slopes=slopes).telling) == telling
    assert "no estimate" in str(report(**lost))


def test_the_verdict_is_that_of_the_resolved_level():
    assert report(relative_error=0.5, slopes=slope()).agrees
    assert not report(relative_error=0.0, slopes=slope(resolved=2.0)).agrees


@pytest.mark.parametrize("distance", [math.nan, 0.5])
def test_a_distance_that_is_not_known_is_not_small(distance):
    assert found(report(lower_distance=distance)) == ["lower level"]
    off = slope(resolved=2.0)
    assert found(report(lower_distance=distance, slopes=off)) == ["lower level"]
    assert found(report(lower_distance=0.0, slopes=off)) == ["landscape"]


def test_slopes_are_off_relative_to_the_length():
    for size, off in ((1.0, True), (100.0, False)):
        changed = report(size=size, slopes=slope(estimate=size, resolved=size + 5.0))
        assert found(changed) == (["landscape"] if off else [])


@pytest.mark.parametrize(
    ("share", "difference", "blamed"),
    [(0.5, 0.0, True), (0.5, 0.9, True), (0.01, 0.0, True), (0.01, 0.9, False)],
)
def test_the_multiplier_is_to_blame_unless_the_engines_differ(share, difference, blamed):
    changed = report(relative_error=0.5, adjoint_residual_norm=share, engine_difference=difference)
    assert ("multiplier" in found(changed)) == blamed
    assert found(changed, ridge_share=0.0).count("ridge") == 1


def test_of_a_damped_reference_the_headline_says_so():
    off = {"relative_error": 1.06, "damping": 0.01}
    assert "damped by 0.01, which is not the exact one; damp less" in str(report(**off))
    near = slope()
    assert "the exact one; v re-solved agrees" in str(report(**off, slopes=near))
    far = slope(resolved=3.0)
    assert "DISAGREES" in str(report(**off, slopes=far))
    assert "the estimate agrees with the exact one" in str(report(damping=0.01))


@pytest.mark.parametrize(
    ("findings", "end"),
    [
        ((), "it is the implicit formula by double_backward that does not"),
        (("lower level",), "not with the implicit formula at this v, which is not v*(u)"),
    ],
)
def test_far_from_the_lower_solution_the_formula_is_not_blamed(findings, end):
    named = tuple(Finding(name, "") for name in findings)
    seen = report(relative_error=0.12, slopes=slope(resolved=0.95), findings=named)
    assert seen.agrees
    assert str(seen).splitlines()[0].endswith(end)
