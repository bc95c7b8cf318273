"""What the rule and its watch remember where f or g is silent; whole runs are in ``stress``."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from phases import Phase, Run, followed

from torch_penalty_bilevel import BilevelWarning, LeastSquares, PenaltyBilevelOptimizer
from torch_penalty_bilevel.evaluation import Norms
from torch_penalty_bilevel.multipliers import Watch


def seen(residual, slope, adjoint_residual):
    return Norms(1.0, residual, adjoint_residual, slope, 2.0, 2.0, math.nan, 2.0)


def observed(rule, state, norms):
    evaluation = SimpleNamespace(probe_product=(torch.ones(1),))
    return rule._observed(state, evaluation, norms).but(steps=state.steps + 1)


@pytest.mark.parametrize("faster", [0.9, 0.5, 0.0])
def test_the_pull_stays_bounded_where_its_denominator_vanishes_first(faster):
    """The ratio of the present gradients passes 1e30; w stays near share * r / s of
    the start, 1 (a slope seen in one step counts a tenth in its mean square over 100)."""
    rule = LeastSquares()
    state = rule.start((torch.zeros(1),))
    for k in range(3000):
        state = observed(rule, state, seen(0.99**k, faster**k, faster**k))
        assert state.pull < 10 * rule.share


def test_a_loss_that_returns_meets_a_pull_made_for_it():
    """f is silent for 2,000 steps while r falls, and returns with a slope of 100."""
    rule = LeastSquares()
    state = rule.start((torch.zeros(1),))
    for k in range(2000):
        state = observed(rule, state, seen(max(0.99**k, 1e-3), 0.0, 0.0))
    held = state.length * state.curvature
    state = observed(rule, state, seen(1e-3, 100.0, 100.0))
    assert state.pull <= rule.share * held / 100.0


def test_dead_probes_do_not_switch_the_power_iteration_off():
    """g has no curvature in the first 15 steps; then H = diag(1, 50): L must reach 50, nu -1/h."""
    h, alive = torch.tensor([1.0, 50.0]), torch.zeros(1)
    u, v = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.0, lower_lr=0.0)
    for k in range(400):
        alive.fill_(float(k >= 15))
        optimizer.lower_step(lambda: v.sum(), lambda: (alive * h * v * v).sum() / 2 + (u * v).sum())
    assert optimizer._dual.curvature == pytest.approx(50.0, rel=0.03)  # 0.999 per step
    torch.testing.assert_close(optimizer.adjoint[0], -1 / h, rtol=1e-2, atol=1e-4)


def test_probes_that_are_always_flat_do_not_leave_the_multiplier_off():
    """g is flat whenever a probe is due by its number, as where the first batch has no weight."""
    run = Run(followed(), rates=(0.05, 0.2))
    for k in range(800):
        run.go([Phase(1, g=0.0 if k < 10 or k % 20 == 0 else 1.0)])
    assert run.errors[-1] < 1e-8


@pytest.mark.long
def test_the_published_schedule_reports_a_certificate_that_stays_bad():
    """f = u v - 2 u + 1, g = (v - u)^2: minimum (1, 1), but v runs away from u for small gamma."""
    u, v = torch.tensor([2.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=1e-2, lower_lr=1e-2, lower_steps=5, penalty="paper"
    )

    def run():
        for _ in range(400):
            optimizer.step(lambda: (u * v - 2 * u + 1).sum(), lambda: (v - u).square().sum())

    with pytest.warns(BilevelWarning, match=r"trusted. The weight is 0.01 .* raise EpsilonTest"):
        run()


def test_trouble_is_reported_again_after_it_was_over():
    """A ratio of 100, then 0.1, then 100 again: two reports, and none of a silent f."""
    watch, reports = Watch(), 0
    for k, (adjoint, slope) in enumerate(
        [(100.0, 1.0)] * 200 + [(0.1, 1.0)] * 2000 + [(100.0, 1.0)] * 200 + [(1e-9, 0.0)] * 4000
    ):
        norms = seen(1.0, slope, adjoint)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch = watch.seen(norms, k).looked_at(norms, k)
        reports += len(caught)
    assert reports == 2


def test_warmup_does_not_end_while_f_is_silent():
    u, v, on = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True), 0.0
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=1e-6, warmup_steps=50)
    before = u.detach().clone()
    for k in range(8):
        on = float(k >= 5)
        optimizer.step(
            lambda: on * (v - 1).square().sum(),  # noqa: B023
            lambda: (torch.tensor([1.0, 1e-4]) * v * v).sum() / 2 - (u * v).sum(),
        )
    assert torch.equal(u.detach(), before)


def test_a_checkpoint_without_the_new_scalars_loads():
    run = Run(followed(), rates=(0.05, 0.2)).go([Phase(3)])
    saved = run.optimizer.state_dict()
    own = next(g["bilevel"] for g in saved["param_groups"] if g.get("bilevel"))
    for name in ("probed", "length", "slope", "restarts"):
        del own["scalars"][name]
    run.optimizer.load_state_dict(saved)
    run.go([Phase(400)])
    assert run.errors[-1] < 1e-6
