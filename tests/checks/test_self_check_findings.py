"""Every finding of check_hypergradient, provoked once."""

import math

import pytest
import torch
from checking import leaf, names, warm
from tasks import Task

from torch_penalty_bilevel import (
    DoubleBackward,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)


def test_names_a_multiplier_that_has_not_converged():
    _, _, optimizer, f, g = warm("quadratic", steps=0)
    report = optimizer.check_hypergradient(f, g)
    assert not report.agrees
    assert names(report)[0] == "multiplier"
    assert "lower_steps" in report.findings[0].message
    assert report.adjoint_residual_norm == report.slope_norm  # q = 0
    assert "DISAGREES" in str(report)


def test_names_the_ridge():
    rule = Stationarity(LeastSquares(share=0.0, ridge=1.0))
    _, _, optimizer, f, g = warm("quadratic", steps=0, penalty=rule, lower_lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.lower, 600)
    for _ in range(600):
        optimizer.lower_step(f, g)
        scheduler.step()
    report = optimizer.check_hypergradient(f, g)
    assert names(report) == ["ridge"]
    assert report.relative_error > 0.1


@pytest.mark.parametrize("resolve", [True, False])
def test_names_a_lower_level_that_is_not_solved(resolve):
    """nu is exact at this v, but v is far from v*(u): only the re-solved level can tell."""
    _, _, optimizer, f, g = warm("curved", steps=0, lower_lr=0.0)
    for _ in range(300):
        optimizer.lower_step(f, g)
    report = optimizer.check_hypergradient(f, g, resolve=resolve)
    assert report.relative_error < 0.1
    assert report.agrees != resolve
    assert ("DISAGREES with the re-solved lower level" in str(report)) == resolve
    assert names(report) == ["lower level"]
    assert report.lower_distance > 0.1


def test_names_negative_curvature_along_r():
    u, v = leaf(0.3), leaf(0.4, 0.2)
    optimizer = PenaltyBilevelOptimizer([u], [v])

    def g():  # concave in v[0], convex in v[1]
        return (v[1] ** 2 - v[0] ** 2 + u * v.sum()).sum()

    report = optimizer.check_hypergradient(lambda: (v.sum() - 1) ** 2, g, resolve=False)
    # r = (u - 2 v0, u + 2 v1) = (-0.5, 0.7), H = diag(-2, 2): (0.98 - 0.5) / 0.74.
    assert report.curvature_along_residual == pytest.approx(2 * (0.49 - 0.25) / 0.74)
    assert not report.positive_definite
    assert names(report)[0] == "curvature"
    # The saddle's own formula by least squares: q = -H^-1 f_v, f_v = -0.8 (1, 1): J q = 0.
    assert report.solved
    assert float(report.exact[0].abs().max()) < 1e-12
    assert math.isnan(report.lower_distance)

    report = optimizer.check_hypergradient(
        lambda: (v.sum() - 1) ** 2, lambda: (u * v.sum() - v.square().sum()).sum(), resolve=False
    )
    assert report.curvature_along_residual == pytest.approx(-2.0)
    assert "downwards" in report.findings[0].message
    # u + 1/2 (f_v = -0.8 twice, H = -2, J = 1): q = -0.4 each.
    assert float(report.exact[0]) == pytest.approx(-0.8)


def test_damping_makes_a_saddle_definite_and_is_named():
    u, v = leaf(0.3), leaf(0.4, 0.2)
    optimizer = PenaltyBilevelOptimizer([u], [v])

    def g():
        return (v[1] ** 2 - v[0] ** 2 + u * v.sum()).sum()

    report = optimizer.check_hypergradient(
        lambda: (v.sum() - 1) ** 2, g, damping=3.0, resolve=False
    )
    assert report.positive_definite
    # H + 3 = diag(1, 5): J q = 0.8 (1 + 1/5).
    assert float(report.exact[0]) == pytest.approx(0.96)
    assert "damping" in names(report)


def test_a_flat_lower_level_has_no_exact_hypergradient():
    """f sees a direction in which g is flat: no adjoint exists, and none is made up."""
    u, v = leaf(0.3), leaf(0.4, 0.2)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    report = optimizer.check_hypergradient(
        lambda: v.square().sum(), lambda: ((v[0] - u) ** 2).sum() + 0 * v[1], resolve=False
    )
    assert math.isnan(report.relative_error)
    assert report.exact[0].isnan().all()
    assert not report.agrees
    assert not report.solved
    assert {"curvature", "solve"} <= set(names(report))
    assert "no verdict" in str(report)


def test_names_closures_that_do_not_see_u_or_v():
    u, v = leaf(0.3), leaf(0.4)
    optimizer = PenaltyBilevelOptimizer([u], [v])

    def f():
        return ((u + v) ** 2).sum()

    def g():
        return ((u - v) ** 2).sum()

    report = optimizer.check_hypergradient(f, lambda: (v**2 + u**2).sum())
    assert "dependence" in names(report)
    assert not report.depends_on_upper
    # In the graph, and still nothing: the dependence is multiplied by zero.
    report = optimizer.check_hypergradient(f, lambda: (v**2 + 0 * u * v).sum())
    assert "dependence" in names(report)
    report = optimizer.check_hypergradient(f, g)
    assert "dependence" not in names(report)
    report = optimizer.check_hypergradient(lambda: (u**2 + 0 * v).sum(), g)
    assert names(report) == ["upper loss"]
    other = PenaltyBilevelOptimizer([u, idle := leaf(1.0)], [v])
    report = other.check_hypergradient(f, g)
    assert names(report)[0] == "unused"
    assert "upper[1]" in report.findings[0].message
    assert float(report.exact[1]) == 0.0
    assert idle.grad is None


class WrongSecond(torch.autograd.Function):
    """x^4 / 12 whose backward forgets that x^3 / 3 depends on x with half of its slope."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4 / 12

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (x**3 + (x**3).detach()) / 6 * grad


@pytest.mark.parametrize("engine", [DoubleBackward(), "finite_difference"])
def test_names_a_custom_backward_with_a_wrong_derivative(engine):
    u, v = leaf(0.3, -0.5), leaf(1.0, 2.0)
    optimizer = PenaltyBilevelOptimizer([u], [v], curvature=engine)

    def g():
        return WrongSecond.apply(v).sum() - (u * v).sum()

    report = optimizer.check_hypergradient(lambda: (v - 1).square().sum(), g, resolve=False)
    # H = v^2, autograd says v^2 / 2.
    if isinstance(engine, DoubleBackward):
        assert report.engine_difference == pytest.approx(1.0, rel=1e-6)
        assert names(report)[0] == "engine"
    else:  # "auto" does not believe custom functions, so differences are the reference
        assert report.engine == "finite_difference"
        assert "engine" not in names(report)
        assert float(report.exact[0][1]) == pytest.approx(2 / 4, rel=1e-6)


def test_names_a_landscape_that_implicit_differentiation_does_not_see():
    """A gradient of g with respect to u that a detach hides."""
    u, v = leaf(0.3, -0.5), leaf(0.3, -0.5)
    optimizer = PenaltyBilevelOptimizer([u], [v])

    def g():
        return ((v - u) ** 2).sum() + ((v - u.detach()) ** 2).sum()

    report = optimizer.check_hypergradient(lambda: (v + 1).square().sum(), g)
    assert "landscape" in names(report)  # dv*/du = 1, the implicit formula has 1/2
    for slope in report.slopes:
        assert slope.exact == pytest.approx(slope.resolved / 2, rel=1e-6)


def test_names_closures_that_draw_other_data():
    task = Task(curvature="double_backward").run(3)
    draws = iter(range(10**6))

    def g():
        return task.lower() * (1 + 0.1 * (next(draws) % 7))

    report = task.optimizer.check_hypergradient(task.upper, g)
    assert report.repeats == "no"
    assert names(report)[0] == "closures"
    assert report.slopes == ()
    assert math.isnan(report.engine_difference)


def test_minibatches_drawn_inside_are_held_fixed_and_named():
    task = Task().run(3)

    def g():
        rows = torch.randint(0, 8, (6,))
        each = (task.net(task.x[rows]) - task.y[rows]).square().squeeze(1)
        decay = sum(p.square().sum() for p in task.net.parameters())
        return (torch.sigmoid(task.weights[rows]) * each).mean() + 0.05 * decay

    report = task.optimizer.check_hypergradient(task.upper, g)
    assert names(report)[-1] == "random"
    assert report.repeats == "with the same random numbers"
    assert report.engine_difference < 1e-6  # two engines saw one batch


def test_names_a_nearly_stationary_upper_level():
    u, v = leaf(0.5 + 1e-7), leaf(0.5 - 1e-7)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0)
    f, g = (lambda: (u**2 + v**2).sum()), (lambda: ((1 - u - v) ** 2).sum())
    optimizer.lower_step(f, g)
    report = optimizer.check_hypergradient(f, g)
    assert names(report)[-1] == "stationary"


def test_names_an_exact_solve_that_was_cut_short():
    task = Task().run(3)
    report = task.optimizer.check_hypergradient(task.upper, task.lower, max_iterations=1)
    assert not report.solved
    assert report.products == 1
    assert "solve" in names(report)
