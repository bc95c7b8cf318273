"""check_hypergradient where g has no minimum to be found, or the optimizer has no estimate."""

import math

import pytest
import torch

from torch_penalty_bilevel import AdjointError, HypergradientOptimizer, PenaltyBilevelOptimizer


def saddle(dtype):
    """g = v1^2 - v2^2 / 2 - <u, v>, f = |v|^2: J = -I, H = diag(2, -1), so q = (-v1, 2 v2) and the
    implicit formula gives (v1, -2 v2); there is no v*(u)."""
    u = torch.ones(2, dtype=dtype, requires_grad=True)
    v = torch.tensor([0.3, 0.2], dtype=dtype, requires_grad=True)
    return (
        u,
        v,
        lambda: v.square().sum(),
        lambda: v[0] ** 2 - 0.5 * v[1] ** 2 - (u * v).sum(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["penalty", "cg_normal"])
def test_a_search_without_end_says_nothing_of_the_estimate(dtype, method):
    u, v, f, g = saddle(dtype)
    if method == "penalty":
        optimizer = PenaltyBilevelOptimizer([u], [v])
    else:
        optimizer = HypergradientOptimizer([u], [v], method=method)
    report = optimizer.check_hypergradient(f, g)
    torch.testing.assert_close(report.exact[0], torch.tensor([0.3, -0.4], dtype=dtype))
    assert not report.telling
    assert report.agrees == (method == "cg_normal")  # the penalty's multiplier is still zero
    assert "curvature" in {finding.name for finding in report.findings}
    assert not report.positive_definite
    assert torch.equal(v, torch.tensor([0.3, 0.2], dtype=dtype))


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"method": "cg"}, "damping above"), ({"method": "neumann", "step_size": 5.0}, "diverged")],
)
@pytest.mark.parametrize("resolve", [True, False])
def test_without_an_estimate_the_check_says_why(options, cause, resolve):
    u, v, f, g = saddle(torch.float64)
    optimizer = HypergradientOptimizer([u], [v], **options)
    report = optimizer.check_hypergradient(f, g, resolve=resolve)
    assert str(report).startswith("Hypergradient check: no estimate: the adjoint equation")
    assert not report.agrees
    assert report.estimate[0].isnan().all()
    assert math.isnan(report.relative_error)
    assert math.isnan(report.adjoint_residual_norm)
    torch.testing.assert_close(report.exact[0], torch.tensor([0.3, -0.4], dtype=torch.float64))
    found = {finding.name: finding.message for finding in report.findings}
    assert cause in found["adjoint"]
    assert "curvature" in found
    assert torch.equal(v, torch.tensor([0.3, 0.2], dtype=torch.float64))
    with pytest.raises(AdjointError, match="nothing was changed"):
        optimizer.upper_step(f, g)


def test_without_an_estimate_a_minimum_of_g_is_judged_all_the_same():
    """The divergent series is the whole trouble: exact, slopes and v are fine."""
    u, v, f, g = convex()
    v.data.copy_(torch.tensor([0.5, 1.0]))  # v* = u / (2, 1)
    optimizer = HypergradientOptimizer([u], [v], method="neumann", step_size=50.0)
    report = optimizer.check_hypergradient(f, g, resolve=True)
    assert {finding.name for finding in report.findings} == {"adjoint"}
    (slope,) = report.slopes
    assert slope.direction == "a random direction"
    assert slope.resolved == pytest.approx(slope.exact, rel=1e-2)
    assert report.telling == report.slopes


def convex():
    u, v = torch.ones(2, requires_grad=True), torch.tensor([0.5, 1.0], requires_grad=True)
    return (
        u,
        v,
        lambda: v.square().sum(),
        lambda: v[0] ** 2 + 0.5 * v[1] ** 2 - (u * v).sum(),
    )


def findings(options, **check):
    u, v, f, g = convex()
    report = HypergradientOptimizer([u], [v], **options).check_hypergradient(f, g, **check)
    return {finding.name: finding.message for finding in report.findings}


@pytest.mark.parametrize(
    ("options", "name", "remedy"),
    [
        ({"method": "one_step"}, "adjoint", "cg_normal"),
        ({"method": "alternating"}, "adjoint", "cg_normal"),
        ({"inner_iterations": 1}, "adjoint", "raise inner_iterations"),
        ({"damping": 0.5}, "ridge", "damping biases it"),
    ],
)
def test_findings_speak_of_what_the_optimizer_has(options, name, remedy):
    found = findings(options)
    assert set(found) == {name}
    assert remedy in found[name]
    assert not any(word in found[name] for word in ("multiplier", "warmup", "LeastSquares"))


def test_a_damped_reference_is_what_is_wrong():
    """The estimate is exact, v at its minimum: only the reference is off."""
    assert set(findings({}, damping=1.0)) == {"damping"}
    assert not findings({})
