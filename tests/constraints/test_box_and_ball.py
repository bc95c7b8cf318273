"""Bounds and a length together: the projection, the face, and runs that end where both are met."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize as scipy_minimize

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity, minimize
from torch_penalty_bilevel.constraints import Ball, Box, BoxAndBall

LOW = torch.tensor([[-0.5, -2.0, 0.0, -0.1, -1.0]], dtype=torch.float64)
HIGH = torch.tensor([[0.7, 0.3, 1.5, 0.0, torch.inf]], dtype=torch.float64)
POINTS = hnp.arrays(np.float64, (3, 5), elements=st.floats(-3, 3, width=32))
ROWS, WHOLE = BoxAndBall(LOW, HIGH, 0.9, rows=True), BoxAndBall(LOW, HIGH, 1.1)


def by_bisection(x, radius):
    """Clip(x / (1 + mu)) of one length, mu by bisection."""
    clip = lambda y: torch.minimum(torch.maximum(y, LOW), HIGH)  # noqa: E731
    least, most = 0.0, 1e6
    if float(clip(x).norm()) <= radius:
        return clip(x)
    for _ in range(200):
        middle = (least + most) / 2
        least, most = (middle, most) if clip(x / (1 + middle)).norm() > radius else (least, middle)
    return clip(x / (1 + most))


@settings(max_examples=150, deadline=None)
@given(x=POINTS)
def test_projection_is_the_clipped_multiple_that_fits(x):
    x = torch.from_numpy(x)
    for found, wanted in (
        (ROWS.project(x), torch.cat([by_bisection(r[None], 0.9) for r in x])),
        (WHOLE.project(x), by_bisection(x, 1.1)),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    for constraint in (ROWS, WHOLE):
        point = constraint.project(x)
        assert torch.equal(constraint.project(point), point)
        assert bool(
            (constraint.values(point)[torch.isfinite(constraint.values(point))] < 1e-14).all()
        )


def test_projection_equals_a_generic_solver_and_not_the_two_in_turn():
    x = torch.tensor([[2.0, 1.5, 0.8, -3.0, -0.2]])
    solved = scipy_minimize(
        lambda y: ((y - x[0].numpy()) ** 2).sum(),
        np.zeros(5),
        bounds=list(zip(LOW[0].tolist(), HIGH[0].tolist(), strict=True)),
        constraints={"type": "ineq", "fun": lambda y: 0.81 - (y**2).sum()},
        method="SLSQP",
        tol=1e-15,
    )
    found = ROWS.project(x)
    np.testing.assert_allclose(found[0].numpy(), solved.x, atol=1e-7)
    in_turn = [
        Box(LOW, HIGH).project(Ball(0.9, rows=True).project(x)),
        Ball(0.9, rows=True).project(Box(LOW, HIGH).project(x)),
    ]
    for other in in_turn:
        assert float((other - x).norm()) > float((found - x).norm()) + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 5000])
def test_low_precision_and_long_rows(dtype, size):
    x = (3 * torch.randn(4, size)).to(dtype)
    constraint = BoxAndBall(-0.5, 1.0, 0.2 * size**0.5, rows=True)
    point = constraint.project(x)
    assert point.dtype == dtype
    assert torch.equal(constraint.project(point), point)
    wide = point.double()
    assert bool(((wide >= -0.5) & (wide <= 1)).all())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        wide.norm(dim=1), torch.full((4,), 0.2 * size**0.5), rtol=4 * rounding, atol=0
    )
    # On the sphere as its own face sees it.
    assert bool((constraint.face(point, -point).curvature > 0).all())


@settings(max_examples=300, deadline=None)
@given(x=POINTS, g=POINTS, grow=st.sampled_from([1.0, 3.0]))
def test_tangent_gradient_is_the_projection_onto_the_tangent_cone(x, g, grow):
    """-P g = lim (project(x - t g) - x) / t, and P is an orthogonal projector."""
    x, g = torch.from_numpy(grow * x), torch.from_numpy(g)
    for constraint in (ROWS, WHOLE):
        at = constraint.project(x)
        near = torch.cat([(at - LOW).abs().flatten(), (at - HIGH).abs().flatten()])
        lengths = at.norm(dim=1) - 0.9 if constraint is ROWS else at.norm()[None] - 1.1
        # Almost at a bound is not at it: the quotient sees the bound, the face does not.
        assume(not bool(((near > 0) & (near < 1e-3)).any()))
        assume(not bool(((lengths.abs() > 1e-14) & (lengths.abs() < 1e-3)).any()))
        # Nor does the quotient see a small entry turn within one step.
        assume(not bool(((at != 0) & (at.abs() < 1e-3)).any()))
        face, t = constraint.face(at, g), 1e-7
        limit = (constraint.project(at - t * g) - at) / t
        torch.testing.assert_close(-face.tangent(g), limit, rtol=0, atol=5e-5)
        once = face.tangent(g)
        torch.testing.assert_close(face.tangent(once), once, rtol=0, atol=1e-12)


def test_a_bound_entry_that_the_sphere_pulls_in_moves():
    """x = (0.6, 0.8) at high = 0.6 on the unit circle, -g = (0.1, 1): along the circle entry 1
    shrinks as entry 2 grows, though -g alone pushes it out of the box."""
    x, g = torch.tensor([0.6, 0.8]), torch.tensor([-0.1, -1.0])
    face = BoxAndBall(-1.0, torch.tensor([0.6, 1.0]), 1.0).face(x, g)
    along = torch.tensor([-0.8, 0.6])
    torch.testing.assert_close(-face.tangent(g), (-g @ along) * along)
    torch.testing.assert_close(face.curvature, torch.tensor([-g @ x]))
    held = BoxAndBall(-1.0, torch.tensor([0.6, 1.0]), 1.0).face(x, torch.tensor([-1.0, -0.1]))
    assert float(held.tangent(torch.tensor([-1.0, -0.1])).norm()) == 0


def test_a_step_keeps_held_entries_and_rows_without_gradient():
    constraint = BoxAndBall(-1.0, torch.tensor([0.6, 1.0, 1.0]), 1.0, rows=True)
    x = constraint.project(torch.tensor([[2.0, 1.0, 0.5], [2.0, 1.0, 0.5]]))
    assert float(x[0, 0]) == 0.6
    gradient = torch.tensor([[-9.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
    face = constraint.face(x, gradient)
    moved = face.retract(x, x - 0.2 * face.tangent(gradient))
    assert float(moved[0, 0]) == 0.6
    assert torch.equal(moved[1], x[1])
    torch.testing.assert_close(moved[0].norm(), torch.tensor(1.0))
    assert float((gradient * (moved - x)).sum()) < 0


def solution(target, weights):
    """min of sum w (x - target)^2 / 2 over the set, by scipy."""
    return torch.from_numpy(
        scipy_minimize(
            lambda y: (weights.numpy() * (y - target.numpy()) ** 2).sum() / 2,
            np.zeros(3),
            jac=lambda y: weights.numpy() * (y - target.numpy()),
            bounds=[(-1.0, 0.6), (-1.0, 1.0), (0.0, 1.0)],
            constraints={
                "type": "ineq",
                "fun": lambda y: 1 - (y**2).sum(),
                "jac": lambda y: -2 * y,
            },
            method="SLSQP",
            tol=1e-14,
        ).x
    )


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("target", [[3.0, 0.5, -0.4], [0.3, 2.0, 2.0], [0.1, 0.1, 0.2]])
def test_runs_end_at_the_constrained_minimum(rule, target):
    target, weights = torch.tensor(target), torch.tensor([1.0, 3.0, 0.5])
    constraint = BoxAndBall(torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([0.6, 1.0, 1.0]), 1.0)
    u, v = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    make, rate = {"sgd": (torch.optim.SGD, 0.15), "adam": (torch.optim.Adam, 0.05)}[rule]
    optimizer = PenaltyBilevelOptimizer(
        make([u], lr=rate),
        torch.optim.SGD([v], lr=0.9),
        penalty=Stationarity(LeastSquares(share=0.0)),
        upper_constraint=constraint,
    )
    f = lambda v: (weights * (v - target).square()).sum() / 2  # noqa: E731
    g = lambda u, v: (v - u).square().sum() / 2  # noqa: E731
    for k in range(400):
        optimizer.upper.param_groups[0]["lr"] = rate * (1 - k / 400)
        optimizer.step(lambda: f(v), lambda: g(u, v))
    torch.testing.assert_close(u.detach(), solution(target, weights), rtol=0, atol=2e-4)
    found = minimize(
        lambda u, v: f(v), g, torch.zeros(3), torch.zeros(3), upper_constraint=constraint
    )
    torch.testing.assert_close(found.upper, solution(target, weights), rtol=0, atol=1e-6)


def test_below_the_hypergradient_is_that_of_the_curved_face():
    """v*(u) is the projection of u; at (3, 1) entry 1 sits at 0.6 and entry 2 on the sphere."""
    target = torch.tensor([1.0, -1.0, 2.0])
    constraint = BoxAndBall(-1.0, torch.tensor([0.6, 2.0, 2.0]), 1.0)
    u, v = torch.tensor([3.0, 1.0, 0.5]).requires_grad_(), torch.zeros(3, requires_grad=True)
    f = lambda v: (v - target).square().sum() / 2  # noqa: E731
    optimizer = PenaltyBilevelOptimizer(
        [u],
        torch.optim.SGD([v], lr=0.3),
        upper_lr=0.0,
        penalty=Stationarity(LeastSquares(share=0.0)),
        lower_constraint=constraint,
    )
    for _ in range(400):
        optimizer.step(lambda: f(v), lambda: (v - u).square().sum() / 2)
    at, step = u.detach(), 1e-6
    torch.testing.assert_close(v.detach(), constraint.project(at), rtol=0, atol=1e-9)
    wanted = [
        (f(constraint.project(at + step * e)) - f(constraint.project(at - step * e))) / (2 * step)
        for e in torch.eye(3)
    ]
    assert float(torch.stack(wanted).norm()) > 0.1
    torch.testing.assert_close(u.grad, torch.stack(wanted), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BoxAndBall(0.1, 1.0, 1.0), "low <= 0 <= high, got low=0.1"),
        (lambda: BoxAndBall(-1.0, torch.tensor([-0.5]), 1.0), "low <= 0 <= high"),
        (lambda: BoxAndBall(1.0, -1.0, 1.0), "low <= high"),
        (lambda: BoxAndBall(-1.0, 1.0, 0.0), "radius must be a finite number > 0"),
        (lambda: BoxAndBall(-1, 1, 1, rows=True).project(torch.ones(3)), "needs rows"),
    ],
)
def test_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
