"""check_hypergradient of a penalty whose lower problem, or product, is not that of the closures."""

import pytest
import torch
from checking import names

from examples.extending.penalty import Regularised
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity, ValueGap
from torch_penalty_bilevel.penalties import evaluate_residual
from torch_penalty_bilevel.tensors import OptionalPair, filled, scale


def tensors(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def settled(penalty, steps=300):
    """f = |v - t|^2, g = |v - u|^2 / 2 at one u; v and q where the penalty takes them."""
    u, v = tensors(1.0, -2.0), tensors(0.2, 0.1)
    options = {"penalty": penalty, "upper_lr": 0.0, "lower_lr": 0.2}
    optimizer = PenaltyBilevelOptimizer([u], [v], **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.lower, steps)
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def f():
        return (v - target).square().sum()

    def g():
        return (v - u).square().sum() / 2

    for _ in range(steps):
        optimizer.lower_step(f, g)
        scheduler.step()
    return u, v, optimizer, f, g


@pytest.mark.parametrize("resolve", [True, False])
def test_a_penalty_with_another_lower_problem_is_told_so(resolve):
    """v = u / 2 and q = -(v - t), against v = u and q = -2 (v - t) of g alone."""
    u, v, optimizer, f, g = settled(Regularised(1.0))
    report = optimizer.check_hypergradient(f, g, resolve=resolve)
    assert float((v - u / 2).detach().norm()) < 1e-6
    assert report.adjoint_residual_norm < 1e-3 * report.slope_norm
    assert report.relative_error == pytest.approx(0.5, abs=1e-3)
    assert report.residual_norm == pytest.approx(float((v - u).detach().norm()))  # of g
    assert names(report) == ["penalty"]
    assert "another lower problem than grad_v g = 0" in report.findings[0].message
    assert "no verdict: the penalty solves another lower problem" in str(report)
    assert not report.same_lower_problem


@pytest.mark.parametrize("kappa", [1e-7, 0.0])
def test_a_penalty_with_nearly_the_same_problem_is_compared(kappa):
    *_, optimizer, f, g = settled(Regularised(kappa))
    report = optimizer.check_hypergradient(f, g)
    assert report.same_lower_problem
    assert report.agrees
    assert names(report) == []


def test_at_a_saddle_of_g_the_residuals_are_compared():
    """g = -|v|^2 / 4 - <u, v> is concave, and convex once regularised."""
    u, v = tensors(1.0, 2.0), tensors(0.3, -0.4)
    for penalty, same in ((Regularised(1.0), False), ("stationarity", True)):
        report = PenaltyBilevelOptimizer([u], [v], penalty=penalty).check_hypergradient(
            lambda: (v - 1).square().sum(),
            lambda: -v.square().sum() / 4 - (u * v).sum(),
            resolve=False,
        )
        assert not report.positive_definite
        assert report.same_lower_problem == same


class HalfProduct(Regularised):
    """r = grad_v g with H / 2 for its Jacobian: the certificate is of another equation."""

    def evaluate(self, losses, at, state, curvature, reduce):
        upper = curvature.gradient(losses.upper, at)
        made = curvature.linearise(losses.lower, at, reusable=True)

        def product(direction):
            of_g = made.product(direction)
            return OptionalPair(of_g.upper, scale(filled(of_g.lower, at.lower), 0.5))

        halved = made._replace(product=product)
        return evaluate_residual(self.rule, state, at, upper, halved, 1, reduce)


def test_a_small_certificate_is_never_blamed():
    *_, optimizer, f, g = settled(HalfProduct(0.0), steps=600)
    report = optimizer.check_hypergradient(f, g)
    assert report.adjoint_residual_norm < 1e-3 * report.slope_norm
    assert report.relative_error == pytest.approx(1.0, abs=1e-2)
    assert names(report) == ["penalty"]
    assert "another product than H q" in report.findings[0].message


def test_a_small_certificate_of_an_ill_conditioned_g_is_to_blame():
    """g = v'Hv / 2 - <u, v>, H = diag(1, 0.01), f = v0 + 0.01 v1: after 20 steps q = -(1, 0.2),
    a = (0, 0.008), and still q = -(1, 1) is meant."""
    u, v = tensors(1.0, 1.0), tensors(1.0, 1.0)
    slow = Stationarity(LeastSquares(subspace=False))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=slow)
    scales = torch.tensor([1.0, 0.01], dtype=torch.float64)

    def g():
        return (0.5 * scales * v.square() - u * v).sum()

    for _ in range(20):
        optimizer.lower_step(lambda: (scales * v).sum(), g)
    report = optimizer.check_hypergradient(lambda: (scales * v).sum(), g, resolve=False)
    assert report.adjoint_residual_norm < 0.02 * report.slope_norm
    assert report.relative_error > 0.1
    assert names(report)[0] == "multiplier"


def test_a_value_gap_of_a_small_weight_is_biased_not_unsolved():
    """g = sum of cosh(v) - <u, v>: q = gamma (v - z) is biased where gamma is small."""
    u, v = tensors(0.3, -0.5), tensors(0.0, 0.0)
    penalty = ValueGap(weight=1.0, relative=False)
    optimizer = PenaltyBilevelOptimizer([u], [v], penalty=penalty, upper_lr=0.0, lower_lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.lower, 600)

    def f():
        return (v - 4).square().sum()

    def g():
        return torch.cosh(v).sum() - (u * v).sum()

    for _ in range(600):
        optimizer.lower_step(f, g)
        scheduler.step()
    report = optimizer.check_hypergradient(f, g, resolve=False)
    assert report.adjoint_residual_norm < 1e-3 * report.slope_norm
    assert report.relative_error > 0.1
    assert report.same_lower_problem
    assert "multiplier" not in names(report)
    assert 'or ("value") too small a weight' in str(report)


def test_a_residual_at_rounding_is_a_minimiser():
    """r = (0, -5e-18) where H = diag(1, 1e-17): half of ||v|| away, by numbers that are noise."""
    u, v = tensors(1.0, 1.0), tensors(1.0, 0.5)
    optimizer = PenaltyBilevelOptimizer([u], [v])

    def g():
        return (0.5 * (v - u) ** 2 * torch.tensor([1.0, 1e-17], dtype=torch.float64)).sum()

    report = optimizer.check_hypergradient(lambda: v[0] ** 2, g, resolve=False)
    assert report.lower_distance > 0.4
    assert 0 < report.residual_norm < 1e-16
    assert "lower level" not in names(report)
    v.data[0] = 0.5
    report = optimizer.check_hypergradient(lambda: v[0] ** 2, g, resolve=False)
    assert "lower level" in names(report)
