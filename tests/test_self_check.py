"""check_hypergradient: right numbers, each cause named, nothing moved."""

import contextlib
import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import derivatives, exact_hypergradient
from problems import normal, spd
from scipy.stats import spearmanr
from stepping import PROBLEMS, build, closures, start
from tasks import Task, assert_unchanged, everything, noisy_task
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import (
    DoubleBackward,
    HypergradientReport,
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.implicit import ImplicitProblem
from torch_penalty_bilevel.penalties import Losses
from torch_penalty_bilevel.tensors import Pair

ENGINES = ("auto", "double_backward", "functional", "finite_difference")


def names(report):
    return [finding.name for finding in report.findings]


def warm(name="curved", steps=20, **options):
    """An optimizer somewhere on its way, and its closures."""
    options = {"upper_lr": 0.02, "lower_lr": 0.02} | options
    u, v, optimizer = build(*start(), **options)
    f, g = closures(name, u, v, options.get("curvature", "auto"))
    for _ in range(steps):
        optimizer.step(f, g)
    return u, v, optimizer, f, g


# Right numbers.


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


# The bound.


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n_u=st.integers(1, 4), n_v=st.integers(1, 6))
def test_error_is_J_Hinv_a_and_bounded_by_the_certificate(seed, n_u, n_v):
    """||estimate - exact|| = ||J H^-1 a|| <= ||J H^-1||_2 ||a||, for any quadratic."""
    torch.set_default_dtype(torch.float64)
    H, J, F2 = spd(n_v, seed, 30.0), normal(n_u, n_v, seed=seed + 1), spd(n_v, seed + 2)
    u = normal(n_u, seed=seed + 3).requires_grad_()
    v = normal(n_v, seed=seed + 4).requires_grad_()
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.1)

    def f():
        return v @ F2 @ v / 2 + v.sum() + u.square().sum()

    def g():
        return v @ H @ v / 2 + u @ J @ v

    for _ in range(seed % 7):
        optimizer.lower_step(f, g)
    report = optimizer.check_hypergradient(f, g, resolve=False)
    a = F2 @ v.detach() + 1 + H @ optimizer._dual.multiplier[0]
    error = report.estimate[0] - report.exact[0]
    transfer = J @ torch.linalg.inv(H)
    torch.testing.assert_close(error, transfer @ a, rtol=1e-7, atol=1e-7)
    assert report.adjoint_residual_norm == pytest.approx(float(a.norm()), rel=1e-9)
    bound = float(torch.linalg.matrix_norm(transfer, 2)) * report.adjoint_residual_norm
    assert float(error.norm()) <= bound * (1 + 1e-7)


def test_bound_is_attained():
    """With one unknown below and one above there is nothing to lose: error = |J / H| |a|."""
    u, v = torch.tensor([0.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    report = optimizer.check_hypergradient(
        lambda: (v**2).sum(), lambda: (2 * v**2 - 3 * u * v).sum()
    )
    # H = 4, J = -3, q = 0, a = 2v = 4: the estimate is 0, exact is 3/4 * 4 = 3.
    assert report.adjoint_residual_norm == 4.0
    assert float(report.estimate[0]) == 0.0
    assert float(report.exact[0]) == pytest.approx(3.0, rel=1e-12)
    assert report.relative_error == pytest.approx(1.0)
    assert math.isnan(report.cosine)


def test_distance_to_the_solved_hypergradient_is_lipschitz_in_the_residual():
    """On a quadratic ||exact(v) - exact(v*)|| <= ||J H^-1 F H^-1|| ||r|| (f has no u v term)."""
    u, v, optimizer, f, g = warm("quadratic")
    report = optimizer.check_hypergradient(f, g)
    _, _, _, _, _, H, J = derivatives(*PROBLEMS["quadratic"], u.detach(), v.detach())
    solved = -torch.linalg.solve(H, J.T @ u.detach())
    true, _ = exact_hypergradient(*PROBLEMS["quadratic"], u.detach(), solved)
    second = torch.func.hessian(PROBLEMS["quadratic"][0], 1)(u.detach(), solved)
    mixed = torch.func.jacrev(torch.func.grad(PROBLEMS["quadratic"][0], 0), 1)(u.detach(), solved)
    inverse = torch.linalg.inv(H)
    c = float(torch.linalg.matrix_norm((mixed - J @ inverse @ second) @ inverse, 2))
    transfer = float(torch.linalg.matrix_norm(J @ inverse, 2))
    error = float((report.estimate[0] - true).norm())
    assert error <= transfer * report.adjoint_residual_norm + c * report.residual_norm
    assert float((report.exact[0] - true).norm()) <= c * report.residual_norm * (1 + 1e-9)
    assert float((report.exact[0] - true).norm()) > 0.05 * c * report.residual_norm


def test_certificate_orders_the_true_errors_along_a_run():
    """Weighted logistic regression: rank correlation of ||a|| and the true error above 0.9."""
    x, clean = normal(60, 5, seed=1), normal(40, 5, seed=2)
    truth = normal(5, seed=3)
    y, y_clean = (x @ truth > 0).double(), (clean @ truth > 0).double()
    y[:15] = 1 - y[:15]
    u, v = torch.zeros(60, requires_grad=True), torch.zeros(5, requires_grad=True)
    # A fixed u, so that the error falls with the multiplier over five orders of magnitude.
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.05)

    def f(u, v):
        return F.binary_cross_entropy_with_logits(clean @ v, y_clean)

    def g(u, v):
        each = F.binary_cross_entropy_with_logits(x @ v, y, reduction="none")
        return (u.sigmoid() * each).mean() + 0.05 * v.square().sum()

    certificates, errors = [], []
    for _ in range(40):
        for _ in range(5):
            optimizer.lower_step(lambda: f(u, v), lambda: g(u, v))
        report = optimizer.check_hypergradient(lambda: f(u, v), lambda: g(u, v), resolve=False)
        exact, _ = exact_hypergradient(f, g, u.detach(), v.detach())
        certificates.append(report.adjoint_residual_norm)
        errors.append(float((report.estimate[0] - exact).norm()))
    assert max(errors) > 100 * min(errors)
    assert spearmanr(certificates, errors).statistic > 0.9


# Nothing moves.


@pytest.mark.parametrize("curvature", ["auto", "double_backward", "finite_difference"])
@pytest.mark.parametrize("resolve", [True, False])
def test_nothing_moves(curvature, resolve):
    """Parameters, gradients, buffers, generators, state, metrics, and the next step: bit-equal."""
    task = noisy_task(curvature=curvature).run(3)
    before = everything(task)
    gradients = [None if p.grad is None else p.grad.clone() for p in task.net.parameters()]
    held = [p.grad for p in task.net.parameters()]
    metrics = task.optimizer.metrics

    def drawing():
        random.random()
        return task.lower()

    report = task.optimizer.check_hypergradient(task.upper, drawing, resolve=resolve)
    assert bool(report.slopes) == resolve
    assert "random" in names(report)  # dropout
    assert report.repeats == "with the same random numbers"
    assert_unchanged(before, task)
    assert task.optimizer.metrics is metrics
    for p, same, value in zip(task.net.parameters(), held, gradients, strict=True):
        assert p.grad is same
        assert value is None or torch.equal(p.grad, value)
    after = task.run(2).point()
    assert torch.equal(after, noisy_task(curvature=curvature).run(5).point())


@pytest.mark.parametrize("cold", [True, False])
def test_nothing_moves_when_a_closure_raises_at_any_call(cold):
    reference = noisy_task(curvature="auto")
    for fatal in [*range(1, 15), 20, 40, 80]:
        task = reference if cold else noisy_task(curvature="auto").run(2)
        before, calls = everything(task), 0

        def trap(closure, fatal=fatal):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise KeyError("stop")
            return closure()

        with pytest.raises(KeyError):
            task.optimizer.check_hypergradient(
                lambda trap=trap, task=task: trap(task.upper),
                lambda trap=trap, task=task: trap(task.lower),
            )
        assert_unchanged(before, task)


def test_engine_is_left_as_it_was():
    """A switch to finite differences happens in a copy, and without a warning."""
    task = Task()
    scale = torch.ones((), requires_grad=True)

    def lower():
        return task.lower() + Once.apply(task.net[0].weight * scale).sum()

    report = task.optimizer.check_hypergradient(task.upper, lower)
    assert report.engine == "finite_difference"
    assert math.isnan(report.engine_difference)
    assert not task.optimizer.curvature.switched


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_functional_mode_moves_nothing_and_takes_names():
    task = Task()
    optimizer = PenaltyBilevelOptimizer(
        [("w", task.weights)], task.net.named_parameters(), curvature="functional"
    )

    def f(upper, lower):
        return (
            (torch.func.functional_call(task.net, lower, task.x[8:]) - task.y[8:]).square().mean()
        )

    def g(upper, lower):
        out = torch.func.functional_call(task.net, lower, task.x[:8])
        each = (out - task.y[:8]).square().squeeze(1)
        return (upper["w"].sigmoid() * each).mean() + 0.05 * sum(
            v.square().sum() for v in lower.values()
        )

    for _ in range(5):
        optimizer.step(f, g)
    before, state = task.point(), torch.get_rng_state()
    report = optimizer.check_hypergradient(f, g, damping=0.1)
    assert torch.equal(task.point(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.slopes
    assert report.engine == "functional"
    assert report.engine_difference < 1e-6


@pytest.mark.parametrize("fails", [False, True])
def test_batch_norm_behind_pure_functions_equals_the_live_module(fails):
    """Buffers move once per step and never in a check, also where it raises."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    twin = copy.deepcopy(net)
    x, y = normal(8, 3, seed=1), normal(8, 1, seed=2)
    w, w2 = torch.zeros(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    pure = PenaltyBilevelOptimizer(
        [("w", w)], net.named_parameters(), curvature="functional", upper_lr=0.1
    )
    live = PenaltyBilevelOptimizer([w2], twin.parameters(), upper_lr=0.1)

    def losses(out, weights, parameters):
        decay = 0.5 * sum(p.square().sum() for p in parameters)
        return (weights.sigmoid() * (out - y).square().squeeze(1)).mean() + decay

    def f(upper, lower):
        return (torch.func.functional_call(net, lower, x) - 1).square().mean()

    def g(upper, lower):
        return losses(torch.func.functional_call(net, lower, x), upper["w"], lower.values())

    def live_f():
        return (twin(x) - 1).square().mean()

    def live_g():
        return losses(twin(x), w2, twin.parameters())

    for _ in range(3):
        pure.step(f, g)
        live.step(live_f, live_g)
    buffers = [b.clone() for b in net.buffers()]
    calls = []

    def trapped(upper, lower):
        calls.append(1)
        if fails and len(calls) == 5:
            raise KeyError("stop")
        return g(upper, lower)

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        report = pure.check_hypergradient(f, trapped)
        other = live.check_hypergradient(live_f, live_g)
        torch.testing.assert_close(report.exact, other.exact, rtol=1e-9, atol=1e-12)
    for before, after, here in zip(buffers, net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(before, after)
        torch.testing.assert_close(after, here, rtol=1e-12, atol=1e-12)


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


# Causes, each provoked once.


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


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
    assert report.agrees
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
    assert report.products == 1 or not report.positive_definite
    assert "solve" in names(report)


# Options and errors.


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


def test_the_lower_solver_averages_over_workers():
    """Its residual is the averaged one: three times this worker's where reduce says so."""
    u, v = leaf(0.3), leaf(0.4)
    losses = Losses(lambda u, v: v[0].sum(), lambda u, v: (v[0] - u[0]).square().sum())
    problem = ImplicitProblem(
        losses, Pair((u,), (v,)), DoubleBackward(), lambda tensors: tuple(3 * t for t in tensors)
    )
    value, gradient = problem._lower_gradient()
    assert float(value) == pytest.approx(3 * 0.01)
    assert float(gradient[0]) == pytest.approx(3 * 0.2)
