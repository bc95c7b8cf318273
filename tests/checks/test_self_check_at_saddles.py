"""check_hypergradient where g has no minimum to be found, or the optimizer has no estimate."""

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


@pytest.mark.parametrize("options", [{"method": "cg"}, {"method": "neumann", "step_size": 5.0}])
def test_without_an_estimate_the_check_says_why(options):
    u, v, f, g = saddle(torch.float64)
    optimizer = HypergradientOptimizer([u], [v], **options)
    with pytest.raises(AdjointError, match="nothing was changed") as raised:
        optimizer.check_hypergradient(f, g)
    assert raised.value.status in ("negative_curvature", "diverged")
    assert torch.equal(v, torch.tensor([0.3, 0.2], dtype=torch.float64))


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
