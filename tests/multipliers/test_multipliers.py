"""What keeps the default multiplier honest: its guard, its pull, its watch, and the warm-up."""

import pytest
import torch
from constrained import PLAIN, SGD, leaf
from oracles import LeastSquaresTwin, derivatives

from torch_penalty_bilevel import (
    BilevelWarning,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
    testing,
)

STIFF_AND_HOLLOW = torch.tensor([2.0, -1.0], dtype=torch.float64)


def wells_f(u, v):
    return 0.5 * ((v - 0.7) ** 2).sum() + 0.1 * (u * u).sum()


def wells_g(u, v):
    """Two wells per entry, tilted by u; near v = 0 the curvature is -1."""
    return (0.25 * v**4 - 0.5 * v**2 - 0.1 * u * v).sum()


def hollow_free_f(u, v):
    return (v[0] - u[0]) ** 2 + 0.5 * (v[1] - 1.0) ** 2 + 0.5 * (v[1] - u[1]) ** 2


def hollow_free_g(u, v):
    """v[1] is free: only the pull moves it."""
    return 0.5 * (v[0] - u[1]) ** 2 + 0.0 * v[1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("f", "g", "steps", "active"),
    [
        (wells_f, wells_g, 60, lambda twin, w: twin.kappa > 0.01),
        (hollow_free_f, hollow_free_g, 300, lambda twin, w: twin.w > 1.0001 * w),
    ],
    ids=["negative curvature", "fading pull"],
)
def test_guard_and_pull_equal_their_twin(f, g, steps, active):
    u0, v0 = torch.tensor([0.3, -0.4]), torch.tensor([0.05, -0.02])
    twin = LeastSquaresTwin(f, g, u0, v0, lr=0.02, lower_steps=5)
    u, v = (t.clone().requires_grad_() for t in (u0, v0))
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.02, lower_lr=0.02, lower_steps=5)
    seen = 0
    for _ in range(steps):
        optimizer.step(lambda: f(u, v), lambda: g(u, v))
        twin.step()
        instant = twin.share * (twin.R / (twin.A + twin.S)) ** 0.5
        seen += active(twin, instant)
        # 1e-8: rounding differences grow where the curvature is negative.
        torch.testing.assert_close(v.detach(), twin.v, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(optimizer.adjoint[0], twin.nu, rtol=1e-8, atol=1e-8)
    assert seen > 20  # else this test says nothing about the branch it is named after


@pytest.mark.long
def test_negative_curvature_does_not_blow_the_multiplier_up():
    """At a saddle of g nu does not grow by 1 + |h| / L per step; it solves a damped equation, and
    afterwards the adjoint equation as if nothing had been."""
    hollow = True
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0)

    def f():
        return (v * torch.tensor([1.0, 1.0])).sum()

    def g():
        h = STIFF_AND_HOLLOW if hollow else STIFF_AND_HOLLOW.abs()
        return 0.5 * (h * v * v).sum() + (u * v).sum()

    settle(optimizer, f, g, 200)
    assert 1.5**200 > 1e35  # what it would be
    assert float(optimizer.adjoint[0].norm()) < 3.0
    hollow = False
    settle(optimizer, f, g, 3000)
    exact = -1.0 / STIFF_AND_HOLLOW.abs()
    torch.testing.assert_close(optimizer.adjoint[0], exact, rtol=1e-8, atol=0)


@pytest.mark.long
def test_optimistic_solution_is_reached_after_the_residual_has_vanished():
    """g of SMD24 has many minimisers; r is down to rounding long before v is at the one f likes.
    With a pull that vanishes with r the error stays at 4e-3."""
    problem = testing.get("smd24")
    u, v = (t.requires_grad_() for t in problem.start(torch.Generator().manual_seed(0)))
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=0.1, lower_steps=5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200)
    for _ in range(1200):
        optimizer.step(lambda: problem.upper_loss(u, v), lambda: problem.lower_loss(u, v))
        schedule.step()
    assert float(problem.error(u.detach(), v.detach())) < 1e-6


def settle(optimizer, f, g, steps):
    for _ in range(steps):
        optimizer.lower_step(f, g)


def flat_direction(rule=None):
    """H = diag(1, 1e-7): nu learns the second direction in 1e7 steps, and forgets it in as many."""
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    penalty = Stationarity(rule or LeastSquares())
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=penalty)
    slope = torch.tensor([1.0, 0.0])

    def f():
        return (slope * v).sum()

    def g():
        return 0.5 * (torch.tensor([1.0, 1e-7]) * v * v).sum() + (u * v).sum()

    return optimizer, slope, f, g


def test_watch_reports_a_multiplier_worse_than_none_once():
    optimizer, slope, f, g = flat_direction()
    settle(optimizer, f, g, 300)  # warnings are errors in these tests
    optimizer._dual.multiplier[0][1] = 1e7  # (H nu)[1] = 1
    slope.mul_(1e-2)
    with pytest.warns(BilevelWarning, match="not to be trusted") as caught:
        settle(optimizer, f, g, 900)
    assert len(caught) == 1
    assert float(optimizer.adjoint[0][1]) > 9e6


@pytest.mark.long
def test_watch_restarts_a_hopeless_multiplier():
    optimizer, slope, f, g = flat_direction()
    settle(optimizer, f, g, 300)
    optimizer._dual.multiplier[0][1] = 1e7
    slope.mul_(1e-5)
    with pytest.warns(BilevelWarning) as caught:
        settle(optimizer, f, g, 1700)
    assert ["not to be trusted" in str(w.message) for w in caught] == [True, False]
    assert "restarts from zero" in str(caught[1].message)
    # -H^{-1} grad_v f again.
    torch.testing.assert_close(optimizer.adjoint[0], torch.tensor([-1e-5, 0.0]))
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-9


def quadratic(conditioning):
    h = torch.tensor([1.0, conditioning])
    u, v = torch.tensor([0.5, -0.5], requires_grad=True), torch.zeros(2, requires_grad=True)
    f, g = lambda u, v: ((v - 1.0) ** 2).sum(), lambda u, v: 0.5 * (h * v * v).sum() - (u * v).sum()
    return u, v, f, g


def test_warmup_ends_when_the_certificate_is_small():
    u, v, f, g = quadratic(0.3)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=0.1, warmup_steps=50)
    ready = False
    held = 0
    while not ready:
        _, _, _, f_v, _, H, _ = derivatives(f, g, u.detach(), v.detach())
        certificate = (f_v + H @ optimizer._dual.multiplier[0]).norm()
        ready = bool(certificate <= 0.5 * f_v.norm())
        before = u.detach().clone()
        optimizer.step(lambda: f(u, v), lambda: g(u, v))
        assert torch.equal(u.detach(), before) is not ready
        held += not ready
    assert 1 <= held < 20
    # It does not begin again.
    optimizer._dual.multiplier[0].zero_()
    before = u.detach().clone()
    optimizer.step(lambda: f(u, v), lambda: g(u, v))
    optimizer.step(lambda: f(u, v), lambda: g(u, v))
    assert not torch.equal(u.detach(), before)


def test_warmup_takes_at_most_the_steps_it_was_given():
    """H = diag(1, 1e-6): flatter than the correction looks, so the certificate stays."""
    u, v, f, g = quadratic(1e-6)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=1e-6, warmup_steps=7)
    before = u.detach().clone()
    for _ in range(7):
        optimizer.step(lambda: f(u, v), lambda: g(u, v))
        assert torch.equal(u.detach(), before)
        assert not optimizer.upper.state
    assert float(optimizer.metrics.adjoint_residual_norm) > 1.0
    optimizer.step(lambda: f(u, v), lambda: g(u, v))
    assert not torch.equal(u.detach(), before)


def test_warmup_goes_on_after_a_checkpoint():
    u, v, f, g = quadratic(1e-4)
    optimizer = PenaltyBilevelOptimizer([u], [v], warmup_steps=4)
    for _ in range(3):
        optimizer.step(lambda: f(u, v), lambda: g(u, v))
    saved = optimizer.state_dict()
    resumed = PenaltyBilevelOptimizer([u], [v], warmup_steps=4)
    resumed.load_state_dict(saved)
    before = u.detach().clone()
    resumed.step(lambda: f(u, v), lambda: g(u, v))
    assert torch.equal(u.detach(), before)
    resumed.step(lambda: f(u, v), lambda: g(u, v))
    assert not torch.equal(u.detach(), before)


def test_one_lower_entry_with_opposite_gradients_still_learns_its_multiplier():
    """r = -grad_v f / |grad_v f| at the start: their directions cancel in the curvature probe."""
    u, v = leaf([4.0]), leaf([0.0])  # grad_v f = 8 and r = -4: they cancel without rounding
    optimizer = PenaltyBilevelOptimizer([u], SGD([v], 0.0), upper_lr=0.0, penalty=PLAIN)
    for _ in range(3):
        optimizer.step(lambda: (v + u).square().sum(), lambda: (v - 0.5 * u).square().sum())
    assert optimizer.adjoint[0].item() == pytest.approx(-4.0)
