"""The whole step against a slow twin, closed forms and the identity behind the certificate."""

import pytest
import torch
from oracles import EpsilonTestTwin, LeastSquaresTwin, derivatives, exact_hypergradient
from stepping import (
    N_U,
    N_V,
    PROBLEMS,
    A,
    C,
    build,
    closures,
    curved_f,
    curved_g,
    quadratic_f,
    quadratic_g,
    start,
)

from torch_penalty_bilevel import EpsilonTest, FiniteDifference, LeastSquares, Stationarity

# Exact engines agree to rounding. The central difference errs by about h^2 = 4e-11 relative in
# each product, and Adam's sign-like first steps amplify differences in small entries.
TOLERANCE = {
    "auto": 1e-11,
    "double_backward": 1e-11,
    "functional": 1e-11,
    # The correction divides the error of a product by the length of a move: 1e-10 over 1e-5.
    "finite_difference": 1e-4,
}


@pytest.mark.parametrize("curvature", TOLERANCE)
@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_least_squares_step_equals_its_twin_after_every_step(name, lower_steps, curvature):
    u0, v0 = start()
    twin = LeastSquaresTwin(*PROBLEMS[name], u0, v0, lr=0.02, lower_steps=lower_steps)
    u, v, optimizer = build(
        u0, v0, upper_lr=0.02, lower_lr=0.02, lower_steps=lower_steps, curvature=curvature
    )
    f, g = closures(name, u, v, curvature)
    tolerance = TOLERANCE[curvature]
    for _ in range(30):
        loss = optimizer.step(f, g)
        twin.step()
        torch.testing.assert_close(u.detach(), twin.u, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(v.detach(), twin.v, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(u.grad, twin.upper_grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(optimizer.adjoint[0], twin.nu, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(loss, twin.value, rtol=tolerance, atol=tolerance)
        metrics = optimizer.metrics
        for mine, theirs in (
            (metrics.adjoint_residual_norm, twin.certificate),
            (metrics.residual_norm, twin.residual),
            (metrics.upper_grad_norm, twin.upper_grad.norm()),
        ):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_ridge_step_equals_its_twin():
    options = {"damping": 0.7, "share": 0.5, "ridge": 0.2}
    u0, v0 = start()
    twin = LeastSquaresTwin(*PROBLEMS["curved"], u0, v0, lr=0.02, **options)
    rule = Stationarity(LeastSquares(**options))
    u, v, optimizer = build(u0, v0, upper_lr=0.02, lower_lr=0.02, penalty=rule)
    for _ in range(30):
        optimizer.step(*closures("curved", u, v, "auto"))
        twin.step()
        torch.testing.assert_close(u.detach(), twin.u, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(v.detach(), twin.v, rtol=1e-11, atol=1e-11)


def test_ridge_solves_the_damped_adjoint_equation():
    """(H + mu I) nu = -grad_v f with mu = ridge * L, and L is near ||H||_2."""
    rule = LeastSquares(share=0.0, ridge=0.1)
    u, v, optimizer = build(*start(), penalty=Stationarity(rule), lower_lr=0.0)
    for _ in range(400):  # v does not move, so H and grad_v f are fixed
        optimizer.lower_step(*closures("quadratic", u, v, "auto"))
    _, _, _, f_v, _, H, _ = derivatives(quadratic_f, quadratic_g, u.detach(), v.detach())
    mu = 0.1 * torch.linalg.matrix_norm(H, 2)
    expected = -torch.linalg.solve(H + mu * torch.eye(N_V), f_v)
    # L fades by 0.999 per step between two probes, 20 steps apart: 2 % in mu.
    torch.testing.assert_close(optimizer.adjoint[0], expected, rtol=0.02, atol=0)
    undamped = -torch.linalg.solve(H, f_v)
    assert float((undamped - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.long
def test_paper_step_equals_its_twin_after_every_step(name, lower_steps):
    u0, v0 = start()
    options = {"weight": 0.5, "damping": 0.7, "tolerance": 5.0}
    twin = EpsilonTestTwin(*PROBLEMS[name], u0, v0, 0.02, lower_steps, **options)
    rule = Stationarity(EpsilonTest(**options))
    u, v, optimizer = build(
        u0, v0, upper_lr=0.02, lower_lr=0.02, lower_steps=lower_steps, penalty=rule
    )
    f, g = closures(name, u, v, "auto")
    for _ in range(60):
        optimizer.step(f, g)
        twin.step()
        torch.testing.assert_close(u.detach(), twin.u, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(v.detach(), twin.v, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(u.grad, twin.upper_grad, rtol=1e-11, atol=1e-11)
    assert 3 < twin.advances < 60  # the test has seen both outcomes


def test_paper_metrics_report_the_schedule():
    u, v, optimizer = build(*start(), penalty="paper", lower_lr=0.01, upper_lr=0.01)
    optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v))
    assert float(optimizer.metrics.penalty_weight) == 1e-2
    assert float(optimizer.metrics.damping) == 1e-2


@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
def test_identity_upper_gradient_is_exact_up_to_the_certificate(penalty):
    """grad_u F = exact hypergradient + J H^-1 e for e = grad_v f + H q, whatever q is."""
    u, v, optimizer = build(*start(), penalty=penalty, upper_lr=0.01, lower_lr=0.01)
    f, g = closures("curved", u, v, "auto")
    for _ in range(5):
        optimizer.lower_step(f, g)
    at = u.detach().clone(), v.detach().clone()
    optimizer.upper_step(f, g)
    exact, _ = exact_hypergradient(curved_f, curved_g, *at)
    _, _, _, f_v, _, H, J = derivatives(curved_f, curved_g, *at)
    error = f_v + H @ optimizer.adjoint[0]
    expected = exact + J @ torch.linalg.solve(H, error)
    torch.testing.assert_close(u.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.metrics.adjoint_residual_norm, error.norm())
    assert float(error.norm()) > 1e-3  # the identity was not tested at a trivial point


@pytest.mark.long
@pytest.mark.parametrize("curvature", TOLERANCE)
def test_solution_of_the_quadratic_and_its_adjoint(curvature):
    """Closed form: u solves dF/du = 0 with v = -A^-1 C' u."""
    u, v, optimizer = build(
        *start(), upper_lr=0.07, lower_lr=0.07, lower_steps=3, curvature=curvature
    )
    f, g = closures("quadratic", u, v, curvature)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.step(f, g)
        scheduler.step()
    # F(u) = f(u, S u) with S = -A^-1 C' is quadratic: its stationary point is one solve.
    S = -torch.linalg.solve(A, C.T)
    zero = torch.zeros(N_U)
    reduced = torch.func.grad(lambda x: quadratic_f(x, S @ x))
    hessian = torch.func.jacrev(reduced)(zero)
    best = -torch.linalg.solve(hessian, reduced(zero))
    exact_adjoint = exact_hypergradient(quadratic_f, quadratic_g, best, S @ best)[1]
    torch.testing.assert_close(u.detach(), best, rtol=0, atol=1e-8)
    torch.testing.assert_close(v.detach(), S @ best, rtol=0, atol=1e-8)
    torch.testing.assert_close(optimizer.adjoint[0], exact_adjoint, rtol=0, atol=1e-8)
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-8


@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
def test_step_is_its_halves(penalty):
    """paper: exactly lower_steps lower halves and a fresh upper half; default: v and nu only."""
    results = []
    for halves in (False, True):
        u, v, optimizer = build(
            *start(), penalty=penalty, upper_lr=0.01, lower_lr=0.02, lower_steps=2
        )
        f, g = closures("curved", u, v, "auto")
        if halves:
            optimizer.lower_step(f, g)
            optimizer.lower_step(f, g)
            before = u.detach().clone()
            optimizer.upper_step(f, g)
        else:
            optimizer.step(f, g)
        results.append((u.detach().clone(), v.detach().clone(), optimizer))
    (u1, v1, one), (u2, v2, two) = results
    assert torch.equal(v1, v2)
    assert not torch.equal(before, u2)
    if penalty == "paper":
        assert torch.equal(u1, u2)
        assert one.metrics.gradient_evaluations == two.metrics.gradient_evaluations == 9
    else:  # two evaluations with a probe each, against three
        assert one.metrics.gradient_evaluations == 8
        assert two.metrics.gradient_evaluations == 12


def test_upper_half_leaves_lower_level_alone():
    u, v, optimizer = build(*start(), upper_lr=0.1)
    f, g = closures("curved", u, v, "auto")
    optimizer.lower_step(f, g)
    lower, dual = v.detach().clone(), optimizer.adjoint[0].clone()
    optimizer.upper_step(f, g)
    assert torch.equal(v.detach(), lower)
    assert torch.equal(optimizer.adjoint[0], dual)
    assert not torch.equal(u.detach(), start()[0])


def test_lower_half_leaves_upper_level_alone():
    u, v, optimizer = build(*start(), lower_lr=0.1)
    optimizer.lower_step(*closures("curved", u, v, "auto"))
    assert torch.equal(u.detach(), start()[0])
    assert u.grad is None
    assert not torch.equal(v.detach(), start()[1])


@pytest.mark.parametrize("curvature", TOLERANCE)
def test_both_gradients_of_a_quadratic_in_every_engine(curvature):
    """1e-10 also for differences: the gradient is linear, so only rounding / h is left."""
    rule = EpsilonTest(weight=0.3, damping=0.2)
    u, v, optimizer = build(*start(), penalty=Stationarity(rule), curvature=curvature)
    f, g = closures("quadratic", u, v, curvature)
    f_u, f_v, r, H, J = derivatives(quadratic_f, quadratic_g, u.detach(), v.detach())[2:]
    optimizer.lower_step(f, g)
    torch.testing.assert_close(v.grad, f_v + H @ (0.3 * r) + 0.2 * r, rtol=1e-10, atol=1e-10)
    at = u.detach().clone(), v.detach().clone()
    f_u, f_v, r, H, J = derivatives(quadratic_f, quadratic_g, *at)[2:]
    optimizer.upper_step(f, g)
    torch.testing.assert_close(u.grad, f_u + J @ (0.3 * r), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.adjoint[0], 0.3 * r, rtol=1e-12, atol=1e-12)
    certificate = (f_v + H @ (0.3 * r)).norm()
    torch.testing.assert_close(
        optimizer.metrics.adjoint_residual_norm, certificate, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LeastSquares(), LeastSquares(damping=0.5)),
        (LeastSquares(), LeastSquares(share=0.0)),
        (LeastSquares(), LeastSquares(ridge=0.1)),
        (EpsilonTest(), EpsilonTest(weight=1.0)),
        (EpsilonTest(), EpsilonTest(damping=1.0)),
        (EpsilonTest(tolerance=9.0), EpsilonTest(tolerance=1e-9)),
        (EpsilonTest(tolerance=9.0), EpsilonTest(tolerance=9.0, growth=2.0)),
        (EpsilonTest(tolerance=9.0), EpsilonTest(tolerance=9.0, decay=0.1)),
    ],
)
def test_every_option_of_a_rule_has_an_effect(one, other):
    ends = []
    for rule in (one, other):
        u, v, optimizer = build(
            *start(), penalty=Stationarity(rule), upper_lr=0.05, lower_lr=0.05, lower_steps=2
        )
        for _ in range(10):
            optimizer.step(*closures("curved", u, v, "auto"))
        ends.append(torch.cat([u.detach(), v.detach()]))
    assert float((ends[0] - ends[1]).norm()) > 1e-5


def test_share_zero_leaves_v_to_g():
    """With w = 0 the lower level solves g at fixed u whatever f says."""
    u, v, optimizer = build(*start(), penalty=Stationarity(LeastSquares(share=0.0)), lower_lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.lower, 800)
    for _ in range(800):
        optimizer.lower_step(*closures("quadratic", u, v, "auto"))
        scheduler.step()
    torch.testing.assert_close(
        v.detach(), -torch.linalg.solve(A, C.T @ u.detach()), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("scaled", ["f", "g"])
def test_default_rule_does_not_care_about_units(scaled, factor):
    """Adam divides each level's units away; nu, w and 1/L must do so too."""
    ends = []
    for scale in (1.0, factor):
        f_scale, g_scale = (scale, 1.0) if scaled == "f" else (1.0, scale)
        u, v, optimizer = build(*start(), upper_lr=0.05, lower_lr=0.05, lower_steps=2)
        for _ in range(40):
            optimizer.step(
                lambda u=u, v=v, s=f_scale: s * curved_f(u, v),
                lambda u=u, v=v, s=g_scale: s * curved_g(u, v),
            )
        ends.append(torch.cat([u.detach(), v.detach()]))
    # Adam's eps = 1e-8 is the only quantity with units left.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


def test_gradient_evaluations_are_counted():
    """3 per evaluation (f, g, product), 4 with a central difference, 1 more per probe."""
    for engine, cost in (("double_backward", 3), (FiniteDifference(central=True), 4)):
        u, v, optimizer = build(*start(), curvature=engine, penalty="paper")
        optimizer.lower_step(*closures("curved", u, v, "auto"))
        assert optimizer.metrics.gradient_evaluations == cost
    u, v, optimizer = build(*start(), curvature="double_backward")
    for _ in range(25):  # probes in steps 1-10 and in step 21
        optimizer.lower_step(*closures("curved", u, v, "auto"))
    assert optimizer.metrics.gradient_evaluations == 25 * 3 + 11


def test_metrics_before_the_first_step_are_nan():
    _, _, optimizer = build(*start())
    assert torch.isnan(optimizer.metrics.upper_loss)
    assert optimizer.metrics.gradient_evaluations == 0
