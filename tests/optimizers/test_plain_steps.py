"""Lower steps on g alone, between those that learn the multiplier."""

import copy

import pytest
import torch
from micro_batches import ENGINES, Rows, joined
from stepping import close, curved_phi, start, target_f

from torch_penalty_bilevel import (
    FixedPoint,
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    constraints,
)


def made(rows, **options):
    return PenaltyBilevelOptimizer(*rows.rules(), **options)


@pytest.mark.parametrize("of", [lambda each: each, joined], ids=["parts", "whole"])
@pytest.mark.parametrize("curvature", ENGINES)
def test_it_is_plain_training(curvature, of):
    """That of a torch loop, dropout, BatchNorm and momentum included, before and after a step."""
    rows = Rows()
    lower = torch.optim.SGD(rows.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.03)
    optimizer = PenaltyBilevelOptimizer([rows.u], lower, curvature=curvature)
    for _ in range(2):
        twin = Rows()
        twin.net.load_state_dict(rows.net.state_dict())
        twin.u.data = rows.u.detach().clone()
        rule = torch.optim.SGD(twin.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.03)
        rule.load_state_dict(copy.deepcopy(lower.state_dict()))  # which else shares tensors
        before = torch.get_rng_state()
        values = [optimizer.plain_lower_step(of(rows.lower)) for _ in range(3)]
        torch.set_rng_state(before)
        for value in values:
            rule.zero_grad()
            loss = joined(twin.lower)()
            loss.backward()
            decay = sum(p.detach().square().sum() for p in twin.net.parameters()) * 0.03 / 2
            close(value, loss.detach() + decay, 1e-12)  # the decay is part of g
            rule.step()
        torch.testing.assert_close(rows.net.state_dict(), twin.net.state_dict())
        optimizer.step(of(rows.upper), of(rows.lower))


def test_the_multiplier_and_u_wait():
    rows = Rows()
    optimizer = made(rows)
    optimizer.step(rows.upper, rows.lower)
    before = [t.clone() for t in (rows.u, *optimizer.adjoint)]
    seen = optimizer.metrics
    optimizer.plain_lower_step(rows.lower)
    assert all(map(torch.equal, before, (rows.u, *optimizer.adjoint)))
    after = optimizer.metrics
    assert after.gradient_evaluations == seen.gradient_evaluations + 1
    assert after.relative_certificate == seen.relative_certificate


@pytest.mark.parametrize("curvature", ENGINES)
def test_g_is_called_once_and_f_never(curvature):
    rows, calls = Rows(), []

    def g():
        calls.append(0)
        return joined(rows.lower)()

    optimizer = made(rows, curvature=curvature)
    optimizer.plain_lower_step(g)
    calls.clear()
    for _ in range(3):
        optimizer.plain_lower_step(g)
    assert len(calls) == 3


def test_damping_is_that_of_the_rule():
    ends = []
    for damping, rate in ((1.0, 0.3), (3.0, 0.1)):
        u, v = (t.clone().requires_grad_() for t in start())
        penalty = Stationarity(LeastSquares(damping=damping))
        rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=rate)
        optimizer = PenaltyBilevelOptimizer(*rules, penalty=penalty)
        optimizer.plain_lower_step(lambda u=u, v=v: (v.cosh() * u.sum().exp()).sum())
        ends.append(v.detach())
    close(*ends)


@pytest.mark.parametrize("curvature", ["double_backward", "functional"])
def test_a_map_is_iterated(curvature):
    u, v = (t.clone().requires_grad_() for t in start())
    rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=1.0)
    optimizer = PenaltyBilevelOptimizer(*rules, penalty=FixedPoint(), curvature=curvature)
    expected = curved_phi(u, curved_phi(u, v)).detach()
    for _ in range(2):
        pure = lambda a, b: curved_phi(a[0], b[0])  # noqa: E731
        phi = pure if curvature == "functional" else lambda: curved_phi(u, v)
        optimizer.plain_lower_step(phi)
    close(v.detach(), expected)


def test_the_solution_is_that_of_full_steps():
    """And the multiplier is the exact adjoint there, at a quarter of the evaluations."""
    ends = []
    for every in (1, 4):
        u, v = (t.clone().requires_grad_() for t in start())
        rules = torch.optim.SGD([u], lr=0.03), torch.optim.SGD([v], lr=0.1)
        optimizer = PenaltyBilevelOptimizer(*rules)
        f = lambda u=u, v=v: target_f(u, v) + (u**2).sum()  # noqa: E731
        g = lambda u=u, v=v: (v - u.sum()).cosh().sum() + (v**2).sum()  # noqa: E731
        for k in range(2400):
            if (k + 1) % every:
                optimizer.plain_lower_step(g)
            else:
                optimizer.step(f, g)
        assert float(optimizer.metrics.relative_certificate) < 1e-8
        ends.append(torch.cat([u, v, *optimizer.adjoint]).detach())
    close(*ends, 1e-7)


def test_the_correction_of_v_hears_how_far_v_went():
    u, v = (t.clone().requires_grad_() for t in start())
    penalty = Stationarity(LeastSquares(correct_lower=True))
    optimizer = PenaltyBilevelOptimizer([u], [v], penalty=penalty)
    f, g = (lambda: target_f(u, v)), (lambda: (v - u.sum()).cosh().sum())
    optimizer.step(f, g)
    told, before = optimizer._dual.lower_move[0].clone(), v.detach().clone()
    for _ in range(3):
        optimizer.plain_lower_step(g)
    close(optimizer._dual.lower_move[0], told + v.detach() - before)


def test_a_set_holds_v():
    u, v = (t.clone().requires_grad_() for t in start())
    v.data.clamp_(0.0, 1.0)
    rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=0.5)
    optimizer = PenaltyBilevelOptimizer(*rules, lower_constraint=constraints.Box(0.0, 1.0))
    for _ in range(50):
        optimizer.plain_lower_step(lambda: ((v - 2 * u.sum()) ** 2).sum() - 2 * v[0])
    close(v.detach(), torch.ones(4, dtype=v.dtype))


# What is refused.


@pytest.mark.parametrize("penalty", ["paper", "value"])
def test_a_multiplier_that_lives_in_v_is_refused(penalty):
    rows = Rows()
    with pytest.raises(ValueError, match="would wash it out; use lower_step"):
        made(rows, penalty=penalty).plain_lower_step(rows.lower)


def test_a_lower_inequality_is_refused():
    rows = Rows()
    limit = constraints.Inequality(lambda: rows.u.sum())
    with pytest.raises(ValueError, match="Inequality in lower_constraint"):
        made(rows, lower_constraint=limit).plain_lower_step(rows.lower)


def test_what_is_no_closure():
    rows = Rows()
    with pytest.raises(TypeError, match="lower_closure is NoneType"):
        made(rows).plain_lower_step(None)


def test_not_finite_changes_nothing():
    rows = Rows()
    optimizer = made(rows)
    optimizer.step(rows.upper, rows.lower)
    state = torch.get_rng_state()
    before = rows.state(optimizer)
    torch.set_rng_state(state)
    count = optimizer.metrics.gradient_evaluations
    with pytest.raises(NonFiniteError, match="lower loss is not finite in a plain lower step"):
        optimizer.plain_lower_step([rows.lower[0], lambda: rows.lower[1]() * torch.inf])
    assert torch.equal(rows.state(optimizer), before)
    assert optimizer.metrics.gradient_evaluations == count
