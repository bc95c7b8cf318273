"""An upper loss that does not see v, as one that is computed from a copy of the model."""

import copy
import warnings

import pytest
import torch
from tasks import Task

from torch_penalty_bilevel import (
    BilevelWarning,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
)

NOT_SEEN = "the upper loss does not depend on any lower parameter"
ENGINES = ["auto", "double_backward", "finite_difference"]
MAKERS = [
    *((PenaltyBilevelOptimizer, {"curvature": engine}) for engine in ENGINES),
    (PenaltyBilevelOptimizer, {"penalty": "value"}),
    (HypergradientOptimizer, {"damping": 1.0}),
    (HypergradientOptimizer, {"method": "reverse"}),
]


def made(kind, options):
    task = Task()
    task.optimizer = kind([task.weights], task.net.parameters(), **options)
    task.other = copy.deepcopy(task.net)
    return task


def on_the_copy(task):
    return (task.other(task.x[8:]) - task.y[8:]).square().mean()


def said(task, f, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            task.optimizer.step(f, task.lower)
    return [str(w.message) for w in caught if issubclass(w.category, BilevelWarning)]


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_it_is_said_once_what_is_wrong_and_what_to_do(kind, options):
    task = made(kind, options)
    first = said(task, lambda: on_the_copy(task), 2)
    assert len(first) == 1
    assert first[0].startswith(NOT_SEEN)
    assert "copy.deepcopy" in first[0]
    assert "symptoms.md" in first[0]
    task.optimizer._dependence.due = True  # as after 20 silent evaluations, or a new group
    assert said(task, lambda: on_the_copy(task), 1) == []


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_an_upper_loss_that_is_switched_off_sees_v(kind, options):
    task, factor = made(kind, options), 0.0
    assert said(task, lambda: factor * task.upper(), 2) == []


def test_of_micro_batches_one_may_be_blind():
    task = Task()
    halves = [lambda: on_the_copy(task), task.upper]
    task.other = copy.deepcopy(task.net)
    assert said(task, halves, 2) == []
    task = Task()
    task.other = copy.deepcopy(task.net)
    assert len(said(task, halves[:1] * 2, 2)) == 1


def test_pure_functions():
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], curvature="functional")
    with pytest.warns(BilevelWarning, match=NOT_SEEN):
        optimizer.step(
            lambda u, v: (u[0] - 1).square().sum(), lambda u, v: (v[0] - u[0]).square().sum()
        )


def test_the_check_has_nothing_to_compare():
    task = Task()
    task.other = copy.deepcopy(task.net)
    report = task.optimizer.check_hypergradient(lambda: on_the_copy(task), task.lower)
    headline = str(report).splitlines()[0]
    assert "nothing to compare: grad_v f is exactly zero" in headline
    assert "agrees" not in headline
    assert "upper loss" in [finding.name for finding in report.findings]
    report = task.optimizer.check_hypergradient(task.upper, task.lower)
    assert "nothing to compare" not in str(report)
