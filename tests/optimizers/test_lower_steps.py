"""Steps that move v only: what they cost, and what they cannot know."""

import math

import pytest
import torch
from tasks import Task
from torch.testing import assert_close

from torch_penalty_bilevel import BilevelWarning, PenaltyBilevelOptimizer


@pytest.fixture
def asked(monkeypatch):
    """Whose derivatives autograd was asked for, call by call."""
    calls = []
    original = torch.autograd.grad

    def grad(outputs, inputs, *args, **options):
        calls.append({id(t) for t in ([inputs] if torch.is_tensor(inputs) else inputs)})
        return original(outputs, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return calls


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_only_the_evaluation_that_serves_u_differentiates_by_u(asked, penalty, curvature):
    task = Task(curvature=curvature, penalty=penalty, lower_steps=4)
    task.run(1)  # looks at what depends on what
    upper = {id(p) for group in task.optimizer.upper.param_groups for p in group["params"]}

    def with_upper(run):
        asked.clear()
        run()
        return [bool(upper & inputs) for inputs in asked]

    lower_step = with_upper(lambda: task.optimizer.lower_step(task.upper, task.lower))
    assert lower_step
    assert not any(lower_step)
    step = with_upper(lambda: task.run(1))
    upper_step = with_upper(lambda: task.optimizer.upper_step(task.upper, task.lower))
    assert sum(step) == sum(upper_step) > 0
    # Only the last evaluation, for the paper's rule a fifth one.
    shared = task.optimizer.penalty.rule.shares_evaluation
    assert step.index(True) >= (len(step) - len(upper_step) if shared else len(lower_step) * 4)


def test_hypergradient_norm_is_not_made_up_after_a_lower_step():
    task = Task()
    task.optimizer.lower_step(task.upper, task.lower)
    metrics = task.optimizer.metrics
    assert math.isnan(metrics.upper_grad_norm)
    assert math.isfinite(metrics.residual_norm)
    assert math.isfinite(metrics.adjoint_residual_norm)
    task.optimizer.upper_step(task.upper, task.lower)
    assert task.optimizer.metrics.upper_grad_norm > 0


def test_lower_steps_between_do_not_hide_a_vanished_hypergradient():
    """g sees u in value only: its gradient is zero wherever v goes."""
    u = torch.ones(2, requires_grad=True)
    v = torch.zeros(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    closures = (lambda: (v - 1).square().sum(), lambda: (v - 0 * u).square().sum())
    for _ in range(2):
        optimizer.lower_step(*closures)
        optimizer.upper_step(*closures)
    optimizer.lower_step(*closures)
    with pytest.warns(BilevelWarning, match="exactly zero three times"):
        optimizer.upper_step(*closures)


def test_half_steps_are_the_whole_one_with_four_evaluations():
    """Three lower steps and one step: the same numbers as ``lower_steps=4``."""
    whole, halves = Task(lower_steps=4), Task()
    for _ in range(3):
        whole.run(1)
        for _ in range(3):
            halves.optimizer.lower_step(halves.upper, halves.lower)
        halves.run(1)
    assert_close(halves.point(), whole.point(), rtol=0, atol=0)
