"""check_hypergradient: numbers and slopes against dense oracles, in every engine and dtype."""

import math

import pytest
import torch
from checking import ENGINES, leaf, names, warm
from oracles import derivatives, exact_hypergradient
from problems import normal
from stepping import PROBLEMS, build, start
from tasks import Task
from torch import nn

from torch_penalty_bilevel import DoubleBackward, PenaltyBilevelOptimizer
from torch_penalty_bilevel.checks.exact import ImplicitProblem
from torch_penalty_bilevel.penalties import Losses
from torch_penalty_bilevel.tensors import Pair
from torch_penalty_bilevel.workers import ALONE, Workers


@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
@pytest.mark.parametrize("curvature", ENGINES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_report_equals_the_dense_oracle(name, curvature, penalty):
    u, v, optimizer, f, g = warm(name, curvature=curvature, penalty=penalty)
    report = optimizer.check_hypergradient(f, g)
    at = u.detach(), v.detach()
    exact, adjoint = exact_hypergradient(*PROBLEMS[name], *at)
    _, _, f_u, f_v, r, H, J = derivatives(*PROBLEMS[name], *at)
    rule = optimizer.penalty.rule
    estimate = f_u + J @ rule.adjoint(optimizer._dual, (r,))[0]
    certificate = f_v + H @ rule.adjoint(optimizer._dual, (r,))[0]
    # Central differences of the estimate err by about 1e-10; the exact side never uses them here.
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(report.exact[0], exact, **close)
    torch.testing.assert_close(report.estimate[0], estimate, **close)
    expected = {
        "cosine": torch.cosine_similarity(estimate, exact, dim=0),
        "relative_error": (estimate - exact).norm() / exact.norm(),
        "residual_norm": r.norm(),
        "adjoint_residual_norm": certificate.norm(),
        "slope_norm": f_v.norm(),
        "curvature_along_residual": r @ H @ r / (r @ r),
    }
    for field, value in expected.items():
        assert getattr(report, field) == pytest.approx(float(value), rel=1e-8, abs=1e-8), field
    newton = torch.linalg.solve(H, r).norm() / v.detach().norm()
    assert report.lower_distance == pytest.approx(float(newton), rel=0.02)  # solved to two digits
    assert report.relative_error > 1e-3  # not a trivial point
    assert report.solved
    assert report.positive_definite
    assert report.depends_on_upper
    assert report.repeats == "exactly"
    assert report.engine == ("functional" if curvature == "functional" else "double_backward")
    assert report.engine_difference < 1e-8
    assert float(adjoint.norm()) > 0.1


@pytest.mark.parametrize("curvature", ENGINES)
def test_slopes_are_the_derivatives_of_the_solved_problem(curvature):
    """On the quadratic v*(u) = -A^-1 C'u is known, and a central difference has no error in h."""
    u, v, optimizer, f, g = warm("quadratic", curvature=curvature)
    A, C = derivatives(*PROBLEMS["quadratic"], u.detach(), v.detach())[5:]
    solved = -torch.linalg.solve(A, C.T @ u.detach())
    true, _ = exact_hypergradient(*PROBLEMS["quadratic"], u.detach(), solved)
    report = optimizer.check_hypergradient(f, g)
    along, across = report.slopes
    direction = report.estimate[0] / report.estimate[0].norm()
    assert along.direction == "the estimate"
    assert along.resolved == pytest.approx(float(true @ direction), rel=1e-7)
    assert along.estimate == pytest.approx(float(report.estimate[0].norm()), rel=1e-12)
    assert along.exact == pytest.approx(float(report.exact[0] @ direction), rel=1e-12)
    # |<true, d>| <= ||true|| for the random direction, which is another one.
    assert abs(across.resolved) <= float(true.norm())
    assert abs(across.resolved - along.resolved) > 1e-2
    assert max(along.uncertainty, across.uncertainty) < 1e-6


@pytest.mark.long
def test_at_the_solution_everything_agrees():
    _, _, optimizer, f, g = warm("curved", steps=0, lower_lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.lower, 1000)
    for _ in range(1000):
        optimizer.lower_step(f, g)
        scheduler.step()
    report = optimizer.check_hypergradient(f, g)
    assert report.agrees
    assert report.findings == ()
    assert report.relative_error < 1e-6
    assert report.cosine == pytest.approx(1.0, abs=1e-10)
    for slope in report.slopes:
        # The step is 7e-4 ||u||: its square times third derivatives of order one.
        assert slope.resolved == pytest.approx(slope.exact, abs=1e-5)
        assert slope.estimate == pytest.approx(slope.exact, abs=1e-6)
    assert "agrees" in str(report)
    assert "DISAGREES" not in str(report)


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_float32_agrees_with_float64(curvature):
    reports = []
    for dtype in (torch.float32, torch.float64):
        u0, v0 = (t.to(dtype) for t in start())
        u, v, optimizer = build(u0, v0, curvature=curvature, lower_lr=0.05)
        C = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)

        def f(u=u, v=v):
            return ((v - u.sum()) ** 2).sum()

        def g(u=u, v=v, C=C):
            return torch.cosh(v).sum() + u @ C @ v

        for _ in range(30):
            optimizer.lower_step(f, g)
        reports.append(optimizer.check_hypergradient(f, g))
    single, double = reports
    assert single.solved
    assert single.exact[0].dtype == torch.float32
    # 100 eps in the solve; the estimate by forward differences errs by 3e-4.
    torch.testing.assert_close(single.exact[0].double(), double.exact[0], rtol=1e-4, atol=1e-4)
    assert single.relative_error == pytest.approx(double.relative_error, rel=2e-2, abs=1e-3)
    assert "engine" not in names(single)
    for a, b in zip(single.slopes, double.slopes, strict=True):
        assert a.resolved == pytest.approx(b.resolved, rel=2e-2, abs=2e-2)


def test_frozen_parameters_are_left_out():
    task = Task().run(2)
    task.net[0].bias.requires_grad_(False)
    before = task.point()
    report = task.optimizer.check_hypergradient(task.upper, task.lower)
    assert torch.equal(task.point(), before)
    assert len(report.exact) == 1
    twin = Task().run(2)
    whole = twin.optimizer.check_hypergradient(twin.upper, twin.lower)
    assert float((report.exact[0] - whole.exact[0]).norm()) > 1e-6


def test_sparse_gradients_are_compared():
    table = nn.Embedding(6, 1, sparse=True)
    v = torch.ones(2, requires_grad=True)
    x, y, rows = normal(4, 2, seed=1), normal(4, seed=2), torch.tensor([0, 1, 4, 5])
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SparseAdam(table.parameters()), [v], curvature="auto"
    )

    def f():
        return (v - 1).square().sum() + v.sum()

    def g():
        return (table(rows).squeeze(1).exp() * (x @ v - y).square()).mean() + v.square().sum()

    report = optimizer.check_hypergradient(f, g)

    def dense_g(w, v):
        return (w[rows].exp() * (x @ v - y).square()).mean() + v.square().sum()

    exact, _ = exact_hypergradient(
        lambda w, v: (v - 1).square().sum() + v.sum(),
        dense_g,
        table.weight.detach().squeeze(1),
        v.detach(),
    )
    torch.testing.assert_close(report.exact[0].squeeze(1), exact, rtol=1e-8, atol=1e-10)
    assert float(exact.norm()) > 0


# Workers.


def test_workers_are_averaged():
    """Two shards, one after the other: reduce hands each the mean of both."""
    reports = []
    for reduced in (False, True):
        u, v, optimizer = build(
            *start(), reduce=(lambda tensors: tuple(2 * t for t in tensors)) if reduced else None
        )
        factor = 0.5 if reduced else 1.0  # this worker holds half of each loss, the other as much
        f, g = PROBLEMS["curved"]
        reports.append(
            optimizer.check_hypergradient(
                lambda u=u, v=v, s=factor, f=f: s * f(u, v),
                lambda u=u, v=v, s=factor, g=g: s * g(u, v),
            )
        )
    alone, together = reports
    torch.testing.assert_close(alone.exact[0], together.exact[0], rtol=1e-9, atol=1e-9)
    assert alone.relative_error == pytest.approx(together.relative_error, rel=1e-9)
    for a, b in zip(alone.slopes, together.slopes, strict=True):
        assert a.resolved == pytest.approx(b.resolved, rel=1e-6)


def test_the_lower_solver_averages_over_workers():
    """Its residual is the averaged one: three times this worker's where reduce says so."""
    u, v = leaf(0.3), leaf(0.4)
    losses = Losses(lambda u, v: v[0].sum(), lambda u, v: (v[0] - u[0]).square().sum())
    problem = ImplicitProblem(
        losses,
        Pair((u,), (v,)),
        DoubleBackward(),
        Workers(lambda tensors: tuple(3 * t for t in tensors)),
    )
    value, gradient = problem._lower_gradient()
    assert float(value) == pytest.approx(3 * 0.01)
    assert float(gradient[0]) == pytest.approx(3 * 0.2)


def test_solved_values_put_both_levels_back():
    """Of several minimisers every slope has to find the same: all start from one v."""
    u, v = leaf(0.3), leaf(0.4)
    losses = Losses(lambda u, v: v[0].sum(), lambda u, v: (v[0] - u[0]).square().sum())
    problem = ImplicitProblem(losses, Pair((u,), (v,)), DoubleBackward(), ALONE)
    for shift in (0.1, -0.1):
        value, error = problem.solved_value((torch.tensor(shift),))
        assert value == pytest.approx(0.3 + shift, rel=1e-12)
        assert error < 1e-12
        assert float(u.detach()) == 0.3
        assert float(v.detach()) == 0.4


def test_slopes_of_entries_of_very_different_size():
    """u = (1e4, .3), v* = (1e-4 u_1, sin(3 u_2)): a step made for the first entry would cross
    several periods of the sine. df/du_2 = 3 cos(.9) (sin(.9) - 2) by hand."""
    u, v = torch.tensor([1e4, 0.3]).requires_grad_(), torch.zeros(2, requires_grad=True)
    b = torch.tensor([1.0, 2.0])
    optimizer = PenaltyBilevelOptimizer([u], torch.optim.SGD([v], lr=0.3), upper_lr=0.0)

    def f():
        return (v - b).square().sum() / 2

    def g():
        return (v - torch.stack([1e-4 * u[0], torch.sin(3 * u[1])])).square().sum() / 2

    for _ in range(200):
        optimizer.step(f, g)
    report = optimizer.check_hypergradient(f, g)
    true = 3 * math.cos(0.9) * (math.sin(0.9) - 2)
    along = report.slopes[0]
    assert along.direction == "the estimate"
    assert along.resolved == pytest.approx(abs(true), rel=1e-3)
    assert along.uncertainty < 1e-2
    assert report.agrees
