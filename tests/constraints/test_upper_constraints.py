"""Constraints above: adaptive rules on a simplex, bounds in closed form, multipliers."""

import pytest
import torch
from constrained import PLAIN, SGD, Adam, follow, in_set, leaf

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Box, Inequality, Simplex

Q = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
SLOPE = torch.tensor([-1.0, -0.5, 3.0, 0.2, 2.0], dtype=torch.float64)
# Stationarity on the face {0, 1}: x0 - 1 = 2 x1 - 0.5 = tau with x0 + x1 = 1.
OPTIMUM = torch.tensor([5 / 6, 1 / 6, 0, 0, 0], dtype=torch.float64)

# The constraint above is what is tested, so that f need not see v.
ALONE = pytest.mark.filterwarnings("ignore:the upper loss does not depend on any lower parameter")


def on_simplex(start, rule, steps=250):
    u, v = leaf(start), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(rule([u]), SGD([v], 0.5), upper_constraint=Simplex())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(
            lambda: 0.5 * u @ Q @ u + SLOPE @ u, lambda: 0.5 * (v - u.sum()).square().sum()
        )
        scheduler.step()
        assert in_set("simplex", u.detach(), 1e-12)
    return u, optimizer


@ALONE
@pytest.mark.parametrize("start", [[0.2] * 5, [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
def test_adam_on_a_simplex_reaches_the_optimum_from_centre_and_vertices(start):
    u, optimizer = on_simplex(start, lambda p: Adam(p, 0.05))
    torch.testing.assert_close(u.detach(), OPTIMUM, rtol=0, atol=1e-4)
    assert float(optimizer.metrics.upper_grad_norm) < 1e-3


@ALONE
def test_adams_equal_steps_move_on_a_simplex():
    """All entries of the gradient are negative: sign steps are normal to the simplex."""
    u, v = leaf(torch.full((3,), 1 / 3)), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u], SGD([v], 0.5), upper_lr=0.05, upper_constraint=Simplex()
    )
    slope = torch.tensor([-3.0, -2.0, -1.0])
    for _ in range(60):
        optimizer.step(lambda: slope @ u, lambda: 0.5 * (v - u.sum()).square().sum())
    torch.testing.assert_close(u.detach(), torch.eye(3)[0])


@ALONE
def test_a_stationary_vertex_is_left_alone():
    """At e_0 with the smallest gradient there, the tangent gradient is zero, moments included."""
    u, v = leaf(torch.eye(3)[0]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer([u], SGD([v], 0.5), upper_constraint=Simplex())
    slope = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(5):
        optimizer.step(lambda: slope @ u, lambda: 0.5 * (v - u.sum()).square().sum())
    assert torch.equal(u.detach(), torch.eye(3)[0])
    assert float(optimizer.metrics.upper_grad_norm) == 0
    assert torch.equal(u.grad, torch.zeros(3))


def test_box_above_in_closed_form():
    """F = 0.5 (v - 2)^2, v = u in [-1, 1]: u = v = 1, F = 0.5, projected gradient 0."""
    u, v = leaf([0.0]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=0.05, lower_lr=0.05, upper_constraint=Box(-1.0, 1.0)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = optimizer.step(lambda: 0.5 * (v - 2).square().sum(), lambda: follow(u, v))
        scheduler.step()
    assert u.item() == 1.0
    torch.testing.assert_close(v.item(), 1.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.item(), 0.5, rtol=0, atol=1e-6)
    assert float(optimizer.metrics.upper_grad_norm) == 0
    torch.testing.assert_close(optimizer.adjoint[0].item(), 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reads", ["u", "v"])
def test_inequality_above_in_closed_form(reads):
    """The same bound as h <= 0: multiplier 1, whether h reads u or, through the adjoint, v."""
    u, v = leaf([0.0]), leaf([0.0])
    h = Inequality(lambda: (u if reads == "u" else v) - 1)
    optimizer = PenaltyBilevelOptimizer(
        SGD([u], 0.1), SGD([v], 0.3), penalty=PLAIN, upper_constraint=h
    )
    for _ in range(400):
        loss = optimizer.step(lambda: 0.5 * (v - 2).square().sum(), lambda: follow(u, v))
    torch.testing.assert_close(u.item(), 1.0, rtol=0, atol=1e-8)
    torch.testing.assert_close(loss.item(), 0.5, rtol=0, atol=1e-8)  # f, without the terms of h
    (mu,) = optimizer.inequality_multipliers["upper"]
    torch.testing.assert_close(mu.item(), 1.0, rtol=0, atol=1e-8)


def test_multipliers_follow_what_all_workers_see():
    """A second worker with h = 0 halves the average, so mu grows by half."""
    grown = []
    for other in (1.0, 0.5):
        u, v = leaf([2.0]), leaf([0.0])
        optimizer = PenaltyBilevelOptimizer(
            [u],
            [v],
            upper_constraint=Inequality(lambda u=u: u - 1),
            reduce=lambda tensors, other=other: tuple(other * t for t in tensors),
        )
        loss = optimizer.step(lambda: v.square().sum(), lambda: follow(u, v))  # noqa: B023
        assert loss.item() == pytest.approx(0.0)  # f itself, although the term of h is 0.5
        grown.append(optimizer.inequality_multipliers["upper"][0].item())
    assert grown == [pytest.approx(0.1), pytest.approx(0.05)]


def test_absent_rows_stay_bit_equal_under_constraints():
    """Rows of simplices that were not in the batch keep their distribution and their moments."""
    u, v = leaf(torch.softmax(torch.randn(4, 3), 1)), leaf(torch.zeros(3))
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, upper_constraint=Simplex())
    for batch in ([0, 1], [2]):
        before, state = u.detach().clone(), optimizer.upper.state.get(u, {})
        moments = state["exp_avg"].clone() if state else torch.zeros(4, 3)
        for _ in range(2):
            optimizer.step(
                lambda: (v - 1).square().sum(),
                lambda batch=batch: (v - u[batch].sum(0)).square().sum(),
            )
        away = [i for i in range(4) if i not in batch]
        assert torch.equal(u.detach()[away], before[away])
        assert torch.equal(optimizer.upper.state[u]["exp_avg"][away], moments[away])
        assert not torch.equal(u.detach()[batch], before[batch])


@pytest.mark.parametrize("penalty", ["value", "fixed_point"])
@pytest.mark.long
def test_other_formulations_take_upper_constraints(penalty):
    """The same with v = u as a loss and as a map: u stops at the bound, mu goes to 1."""
    below = (lambda u, v: follow(u, v)) if penalty == "value" else (lambda u, v: 0.5 * (v + u))
    for kind in ("set", "inequality"):
        u, v = leaf([0.0]), leaf([0.0])
        h = Inequality(lambda u=u: u - 1)
        optimizer = PenaltyBilevelOptimizer(
            SGD([u], 0.05),
            SGD([v], 0.3),
            penalty=penalty,
            upper_constraint=Box(-1.0, 1.0) if kind == "set" else h,
        )
        for _ in range(600):
            optimizer.step(lambda v=v: 0.5 * (v - 2).square().sum(), lambda u=u, v=v: below(u, v))
            assert kind == "inequality" or abs(u.item()) <= 1
        torch.testing.assert_close(u.item(), 1.0, rtol=0, atol=1e-2)
        if kind == "inequality":
            (mu,) = optimizer.inequality_multipliers["upper"]
            torch.testing.assert_close(mu.item(), 1.0, rtol=0, atol=5e-2)


def test_the_multiplier_of_an_upper_inequality_waits_with_u_in_the_warmup():
    """h = u - 1/2 = 1/2 > 0 throughout, and v hardly moves, so that the certificate stays bad."""
    u, v = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([u], lr=0.1),
        torch.optim.SGD([v], lr=1e-9),
        upper_constraint=Inequality(lambda: u - 0.5),
        warmup_steps=100,
        penalty="value",
    )
    optimizer.step(lambda: (v - 3).square().sum(), lambda: (v - u).square().sum())
    assert torch.equal(u.detach(), torch.ones(1))
    assert torch.equal(optimizer.inequality_multipliers["upper"][0], torch.zeros(1))
    for _ in range(200):
        optimizer.step(lambda: (v - 3).square().sum(), lambda: (v - u).square().sum())
    assert float(optimizer.inequality_multipliers["upper"][0]) > 0
