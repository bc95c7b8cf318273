"""The certificate bounds and orders the error of the estimate."""

import math

import pytest
import torch
from checking import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import derivatives, exact_hypergradient
from problems import normal, spd
from scipy.stats import spearmanr
from stepping import PROBLEMS
from torch.nn import functional as F

from torch_penalty_bilevel import PenaltyBilevelOptimizer


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


@pytest.mark.long
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
