"""Projections onto the sets, and the faces on which gradients are taken."""

import numpy as np
import pytest
import torch
from constrained import SETS, in_set
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from torch_penalty_bilevel.constraints import Ball, Box, Inequality, Simplex

POINTS = arrays(np.float64, (2, 3), elements=st.floats(-4, 4, width=32))


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None)
@given(x=POINTS, other=POINTS)
def test_projection_is_feasible_idempotent_and_closest(name, x, other):
    """Closest: <x - Px, y - Px> <= 0 for every y of the set (the projection theorem)."""
    project = SETS[name].project
    x, y = torch.from_numpy(x), project(torch.from_numpy(other))
    p = project(x)
    assert in_set(name, p, 1e-12)
    assert torch.equal(project(p), p)
    assert float(((x - p) * (y - p)).sum()) <= 1e-11


def test_simplex_projection_equals_a_generic_solver():
    x = torch.tensor([0.9, -0.3, 0.8, 0.1])
    solved = minimize(
        lambda y: ((y - x.numpy()) ** 2).sum(),
        np.full(4, 0.25),
        bounds=[(0, None)] * 4,
        constraints={"type": "eq", "fun": lambda y: y.sum() - 1},
        method="SLSQP",
        tol=1e-14,
    )
    np.testing.assert_allclose(Simplex().project(x).numpy(), solved.x, atol=1e-7)
    torch.testing.assert_close(Simplex().project(x), torch.tensor([0.55, 0, 0.45, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_in_low_precision(dtype):
    x = (3 * torch.randn(5, 7)).to(dtype)
    for name, constraint in SETS.items():
        p = constraint.project(x)
        assert p.dtype == dtype
        assert in_set(name, p.double(), 16 * torch.finfo(dtype).eps), name
        assert torch.equal(constraint.project(p), p), name


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None)
@given(x=POINTS, g=POINTS)
def test_tangent_gradient_is_the_projection_onto_the_tangent_cone(name, x, g):
    """-P g = lim (project(x - t g) - x) / t, and P is an orthogonal projector."""
    constraint = SETS[name]
    x = constraint.project(torch.from_numpy(x))
    g = torch.from_numpy(g)
    if name == "box":
        bounds = (x + 0.5).abs(), (x - 0.7).abs()
    elif name in ("ball", "rows"):
        bounds = ((x.norm() - 1.3).abs(),) if name == "ball" else ((x.norm(dim=1) - 0.8).abs(),)
    else:
        bounds = (x,)
    # Almost at the bound is not at it: the quotient below then sees the bound, the face does not.
    rounding = 1e-14 if name in ("ball", "rows") else 0.0
    assume(not any(bool(((b > rounding) & (b < 1e-3)).any()) for b in bounds))
    face = constraint.face(x, g)
    t = 1e-7
    limit = (constraint.project(x - t * g) - x) / t
    torch.testing.assert_close(-face.tangent(g), limit, rtol=0, atol=2e-5)
    once = face.tangent(g)
    torch.testing.assert_close(face.tangent(once), once, rtol=0, atol=1e-12)


def test_entries_held_at_a_bound_do_not_pay_for_a_rules_scaling():
    """SGD scaled by (1, 10, 1) from (1/2, 1/2, 0): plain projection would let entry 2 in."""
    u = torch.tensor([0.5, 0.5, 0.0])
    gradient = torch.tensor([-1.0, 1.0, 100.0])
    face = Simplex().face(u, gradient)
    scaled = u - 0.01 * torch.tensor([1.0, 10, 1]) * face.tangent(gradient)
    assert float(Simplex().project(scaled)[2]) > 0  # the false move
    moved = face.retract(u, scaled)
    assert float(moved[2]) == 0
    assert float(gradient @ (moved - u)) < 0


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Box(1.0, 0.0), ValueError, "low <= high, got low=1.0 and high=0.0"),
        (lambda: Box(float("nan"), 0.0), ValueError, "low <= high"),
        (lambda: Ball(0), ValueError, "radius must be a finite number > 0, got 0"),
        (lambda: Ball("1"), ValueError, "radius must be a finite number > 0, got '1'"),
        (lambda: Ball(float("inf")), ValueError, "radius must be"),
        (lambda: Inequality(3), TypeError, "closure must be callable"),
        (lambda: Inequality(torch.zeros, weight=0), ValueError, "weight must be .*, got 0"),
        (lambda: Inequality(torch.zeros, rate=1.5), ValueError, r"rate must lie in \(0, 1\], got"),
    ],
)
def test_constraint_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()
