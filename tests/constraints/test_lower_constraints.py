"""Constraints below: hypergradients on the active face against differences and closed forms."""

import itertools

import pytest
import torch
from constrained import PLAIN, SGD, Adam, follow, leaf

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Ball, Box, Inequality, NonNegative, Simplex

M = torch.tensor([[2.0, 0.4, 0, 0.1], [0.4, 1.5, 0.2, 0], [0, 0.2, 1.2, 0.3], [0.1, 0, 0.3, 1]])
M = M.double()
TARGET = torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64)
U0 = torch.tensor([2.0, -1.0, 0.5, 1.0], dtype=torch.float64)


def f_of(u, v):
    return 0.5 * (v - TARGET).square().sum() + 0.1 * u.sum() * v.sum()


def g_of(u, v):
    return 0.5 * v @ M @ v - u @ v


def solve_lower(constraint, u):
    v = constraint.project(torch.zeros(4))
    for _ in range(400):
        v = constraint.project(v - 0.4 * (M @ v - u))
    return v


def settled(constraint, start, rule=lambda p: SGD(p, 0.3), steps=400, curvature="auto"):
    """v and nu at convergence with u held."""
    u, v = leaf(U0), leaf(start)
    optimizer = PenaltyBilevelOptimizer(
        [u], rule([v]), upper_lr=0.0, lower_constraint=constraint, curvature=curvature
    )
    f, g = (lambda: f_of(u, v)), (lambda: g_of(u, v))
    if curvature == "functional":
        f, g = (lambda a, b: f_of(a[0], b[0])), (lambda a, b: g_of(a[0], b[0]))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(f, g)
        scheduler.step()
    return u, v, optimizer


LOWER = {
    "ball, active": (Ball(0.8), torch.zeros(4)),
    "ball, inactive": (Ball(50.0), torch.zeros(4)),
    "non-negative": (NonNegative(), torch.ones(4)),
    "box": (Box(-0.3, torch.tensor([0.4, 9, 9, 0.3])), torch.zeros(4)),
    "simplex, centre": (Simplex(), torch.full((4,), 0.25)),
    "simplex, vertex": (Simplex(), torch.eye(4)[3]),
}


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
@pytest.mark.parametrize("case", LOWER)
@pytest.mark.long
def test_lower_hypergradient_equals_differences_of_the_solution(case, curvature):
    constraint, start = LOWER[case]
    u, v, optimizer = settled(constraint, start, curvature=curvature)
    torch.testing.assert_close(v.detach(), solve_lower(constraint, U0), rtol=0, atol=1e-7)

    def value(x):
        return f_of(x, solve_lower(constraint, x))

    step = 1e-5
    differences = [(value(U0 + step * e) - value(U0 - step * e)) / (2 * step) for e in torch.eye(4)]
    torch.testing.assert_close(u.grad, torch.stack(differences), rtol=0, atol=1e-6)
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-6


@pytest.mark.long
def test_adam_below_reaches_the_same_face():
    for case in ("ball, active", "simplex, vertex"):
        constraint, start = LOWER[case]
        slow = settled(constraint, start)[0].grad
        u, v, _ = settled(constraint, start, lambda p: Adam(p, 0.05), steps=500)
        torch.testing.assert_close(v.detach(), solve_lower(constraint, U0), rtol=0, atol=1e-6)
        torch.testing.assert_close(u.grad, slow, rtol=0, atol=1e-5)


def test_box_constrained_ridge_closed_form():
    """H = X'X/N + I e^u, box: held entries have q = 0, free ones solve the reduced system."""
    x, y = torch.randn(20, 4), torch.randn(20)
    target = torch.randn(4)
    u, v = leaf([0.1]), leaf(torch.zeros(4))

    def g():
        return 0.5 * (x @ v - y).square().mean() + 0.5 * u.exp().sum() * v.square().sum()

    optimizer = PenaltyBilevelOptimizer(
        [u], SGD([v], 0.4), upper_lr=0.0, lower_constraint=Box(-0.05, 0.08)
    )
    for _ in range(300):
        optimizer.step(lambda: 0.5 * (v - target).square().sum(), g)
    w = v.detach()
    free = (w > -0.05) & (w < 0.08)
    assert 0 < int(free.sum()) < 4
    decay = u.detach().exp()
    H = x.T @ x / 20 + decay * torch.eye(4)
    q = torch.zeros(4)
    q[free] = -torch.linalg.solve(H[free][:, free], (w - target)[free])
    torch.testing.assert_close(optimizer.adjoint[0], q, rtol=0, atol=1e-9)
    torch.testing.assert_close(u.grad, decay * (w @ q), rtol=0, atol=1e-9)


def half_space(rate=0.1, weight=1.0, offset=0.3, curvature="auto", steps=500, rule=None):
    """g = 0.5 |v - u|^2 subject to a'v <= b, u held."""
    a = torch.tensor([0.6, 0.8, 0.0])
    u, v, t = leaf([1.0, -0.2, 0.4]), leaf(torch.zeros(3)), torch.tensor([0.2, 0.5, -0.1])
    f, g, h = (
        lambda: 0.5 * (v - t).square().sum(),
        lambda: follow(u, v),
        lambda: (a @ v - offset).reshape(1),
    )
    if curvature == "functional":
        f = lambda x, y: 0.5 * (y[0] - t).square().sum()  # noqa: E731
        g = lambda x, y: follow(x[0], y[0])  # noqa: E731
        h = lambda x, y: (a @ y[0] - offset).reshape(1)  # noqa: E731
    optimizer = PenaltyBilevelOptimizer(
        [u],
        rule([v]) if rule else SGD([v], 0.3),
        upper_lr=0.0,
        penalty=PLAIN,
        curvature=curvature,
        lower_constraint=Inequality(h, weight=weight, rate=rate),
    )
    for _ in range(steps):
        optimizer.step(f, g)
    excess = max(0.0, float(a @ u.detach()) - offset)
    best = u.detach() - excess * a
    exact = (torch.eye(3) - (excess > 0) * torch.outer(a, a)) @ (best - t)
    return u, v, optimizer, best, exact, excess


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
@pytest.mark.parametrize("offset", [0.3, 0.6])
@pytest.mark.long
def test_half_space_below_in_closed_form(offset, curvature):
    """v = u - max(0, a'u - b) a, dF = (I - aa' 1[active])(v - t), z = max(0, a'u - b)."""
    u, v, optimizer, best, exact, excess = half_space(offset=offset, curvature=curvature)
    torch.testing.assert_close(v.detach(), best, rtol=0, atol=1e-7)
    torch.testing.assert_close(u.grad, exact, rtol=0, atol=1e-6)
    (z,) = optimizer.inequality_multipliers["lower"]
    torch.testing.assert_close(z.item(), excess, rtol=0, atol=1e-7)
    assert float(optimizer.metrics.residual_norm) < 1e-7
    assert [t.shape for t in optimizer.adjoint] == [v.shape]


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_guard_sees_the_curvature_of_the_ascending_system(weight):
    """q ascends along z, so its curvature is q_v' (I + w aa') q_v: a' q_v q_z cancels. Without the
    change of sign a saddle would pass for negative curvature, or hide it."""
    u, v, optimizer, *_ = half_space(weight=weight)
    q_v, q_z = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0])
    before = optimizer._dual.signed_curvature
    optimizer._dual = optimizer._dual.but(multiplier=(q_v, q_z))
    a, t = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([0.2, 0.5, -0.1])
    optimizer.lower_step(lambda: 0.5 * (v - t).square().sum(), lambda: follow(u, v))
    seen = (optimizer._dual.signed_curvature - 0.9 * before) / 0.1
    expected = float(q_v @ q_v + weight * (a @ q_v) ** 2)
    assert seen == pytest.approx(expected, rel=1e-9)


@pytest.mark.long
def test_weight_and_rate_change_the_path_and_not_the_solution():
    starts = [half_space(steps=10, weight=w, rate=r)[1] for w, r in ((1, 0.1), (3, 0.1), (1, 0.5))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
    for weight, rate in ((0.3, 1.0), (2.0, 0.5)):
        u, _, _, _, exact, _ = half_space(weight=weight, rate=rate)
        torch.testing.assert_close(u.grad, exact, rtol=0, atol=1e-6)
