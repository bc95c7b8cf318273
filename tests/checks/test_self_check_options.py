"""check_hypergradient: options, errors and the printed report."""

import math

import pytest
import torch
from checking import warm
from problems import normal
from tasks import Task
from torch import nn

from torch_penalty_bilevel import HypergradientReport, NonFiniteError, PenaltyBilevelOptimizer


def test_tolerance_has_an_effect():
    _, _, optimizer, f, g = warm("curved")
    loose = optimizer.check_hypergradient(f, g, tolerance=0.3)
    tight = optimizer.check_hypergradient(f, g)
    assert loose.products < tight.products
    assert 1e-8 < loose.solve_residual <= 0.3
    assert tight.solve_residual <= 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must lie"),
        ({"tolerance": 1.0}, "tolerance must lie"),
        ({"max_iterations": 0}, "max_iterations must be an integer >= 1"),
        ({"max_iterations": 2.5}, "max_iterations must be an integer >= 1"),
        ({"damping": -1.0}, "damping must be"),
        ({"damping": math.inf}, "damping must be"),
        ({"resolve": "yes"}, "resolve must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    task = Task()
    with pytest.raises(ValueError, match=message):
        task.optimizer.check_hypergradient(task.upper, task.lower, **options)


def test_errors_are_those_of_a_step():
    task = Task().run(1)
    with pytest.raises(NonFiniteError, match="upper loss f is not finite in step 2"):
        task.optimizer.check_hypergradient(lambda: task.upper() * math.nan, task.lower)
    with pytest.raises(TypeError, match="two closures"):
        task.optimizer.check_hypergradient(None, task.lower)


def test_large_lower_levels_are_not_solved_again_unless_asked():
    net = nn.Linear(50, 50)  # 2,550 unknowns
    u = torch.zeros(50, requires_grad=True)
    x = normal(4, 50, seed=1)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters())

    def g():
        decay = sum(p.square().sum() for p in net.parameters())
        return (net(x) - u).square().mean() + 0.5 * decay

    report = optimizer.check_hypergradient(lambda: net(x).square().mean(), g)
    assert report.slopes == ()
    assert report.solved
    assert optimizer.check_hypergradient(lambda: net(x).square().mean(), g, resolve=True).slopes


def test_the_printed_report_holds_what_a_person_needs():
    _, _, optimizer, f, g = warm("curved", steps=2)
    report = optimizer.check_hypergradient(f, g)
    assert isinstance(report, HypergradientReport)
    text = str(report)
    for number in (report.cosine, report.relative_error, report.adjoint_residual_norm):
        assert f"{number:.3g}"[:4] in text
    for word in ("cosine", "certificate", "curvature of g along r", "depends on u", "re-solved"):
        assert word in text
    for finding in report.findings:
        assert f"- {finding.name}: {finding.message}" in text
