"""The fixed-point formulation: its twin after every step, and equilibria in closed form."""

import pytest
import torch
from oracles import FixedPointTwin, map_derivatives
from problems import normal
from stepping import LIVE, build, close, curved_phi, start, target_f, wrap

from torch_penalty_bilevel import (
    EpsilonTest,
    FixedPoint,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)


@pytest.mark.parametrize("curvature", [*LIVE, "functional"])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_fixed_point_step_equals_its_twin_after_every_step(lower_steps, curvature):
    options = {"damping": 0.8, "share": 0.5, "ridge": 0.05}
    u0, v0 = start()
    twin = FixedPointTwin(target_f, curved_phi, u0, v0, 0.02, lower_steps, **options)
    u, v, optimizer = build(
        u0,
        v0,
        upper_lr=0.02,
        lower_lr=0.02,
        lower_steps=lower_steps,
        curvature=curvature,
        penalty=FixedPoint(LeastSquares(**options)),
    )
    f, phi = wrap(target_f, curved_phi, u, v, curvature)
    for _ in range(25):
        at = u.detach().clone(), v.detach().clone()
        close(optimizer.step(f, phi), (twin.step(), twin.value)[1])
        close(u.detach(), twin.u)
        close(v.detach(), twin.v)
        close(u.grad, twin.upper_grad)
        close(optimizer.adjoint[0], twin.nu)
        close(optimizer.metrics.residual_norm, twin.residual)
        close(optimizer.metrics.adjoint_residual_norm, twin.certificate)
        if lower_steps == 1:
            r = at[1] - curved_phi(*at)
            close(optimizer.metrics.lower_loss, 0.5 * r @ r)


def test_fixed_point_under_the_published_schedule():
    """q = gamma r and the v-gradient grad_v f + B q + lambda r, B = (I - Phi_v)'."""
    rule = EpsilonTest(weight=0.3, damping=0.2)
    u, v, optimizer = build(*start(), penalty=FixedPoint(rule))
    at = u.detach().clone(), v.detach().clone()
    _, _, _, f_v, r, B, _ = map_derivatives(target_f, curved_phi, *at)
    optimizer.lower_step(*wrap(target_f, curved_phi, u, v, "auto"))
    close(v.grad, f_v + B @ (0.3 * r) + 0.2 * r)


def test_fixed_point_takes_the_rules_of_stationarity_and_leaves_them_as_they_were():
    rule = LeastSquares(share=0.1)
    FixedPoint(rule)
    Stationarity(rule)
    assert rule._least_curvature == 0.0
    with pytest.raises(ValueError, match="multiplier must be one of"):
        FixedPoint("newton")
    ends = []
    for multiplier in ("least_squares", LeastSquares(share=0.0), "paper"):
        u, v, optimizer = build(*start(), penalty=FixedPoint(multiplier))
        for _ in range(3):
            optimizer.step(*wrap(target_f, curved_phi, u, v, "auto"))
        ends.append(v.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# Closed forms.


@pytest.mark.long
@pytest.mark.parametrize("curvature", ["auto", "functional"])
def test_hypergradient_and_solution_of_a_tanh_equilibrium(curvature):
    """z = tanh(Wz + Uu), n = 8, non-symmetric; dF = (DU)' (I - DW)^-T grad_z f."""
    n, m = 8, 5
    weight, inject = normal(n, n, seed=41), 0.5 * normal(n, m, seed=42)
    weight = 0.9 * weight / torch.linalg.matrix_norm(weight, 2)
    goal = 0.3 * normal(n, seed=43)

    def phi(u, z):
        return torch.tanh(weight @ z + inject @ u)

    def f(u, z):
        return 0.5 * ((z - goal) ** 2).sum() + 0.05 * u @ u

    def equilibrium(u):
        z = torch.zeros(n)
        for _ in range(400):
            z = phi(u, z)
        return z

    def exact(u):
        z = equilibrium(u)
        D = torch.diag(1 - z**2)
        slope = torch.linalg.solve((torch.eye(n) - D @ weight).T, z - goal)
        return 0.1 * u + (D @ inject).T @ slope

    u0 = 0.5 * normal(m, seed=44)
    u, z = u0.clone().requires_grad_(), torch.zeros(n, requires_grad=True)
    functions = wrap(f, phi, u, z, curvature)
    still = PenaltyBilevelOptimizer(
        [u],
        torch.optim.SGD([z], lr=1.0),
        penalty=FixedPoint(LeastSquares(share=0.0)),
        curvature=curvature,
    )
    for _ in range(400):
        still.lower_step(*functions)
    still.upper_step(*functions)
    close(u.grad, exact(u0), 1e-9)
    # The whole problem, against a Newton step on the exact hypergradient.
    u, z = u0.clone().requires_grad_(), torch.zeros(n, requires_grad=True)
    lower = torch.optim.SGD([z], lr=0.5)
    optimizer = PenaltyBilevelOptimizer(
        [u], lower, upper_lr=0.02, penalty="fixed_point", curvature=curvature, lower_steps=2
    )
    functions = wrap(f, phi, u, z, curvature)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.upper, 1200)
    for _ in range(1200):
        optimizer.step(*functions)
        scheduler.step()
    best = u.detach()
    for _ in range(6):
        best = best - torch.linalg.solve(torch.func.jacrev(exact)(best), exact(best))
    assert float(exact(best).norm()) < 1e-12
    torch.testing.assert_close(u.detach(), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.detach(), equilibrium(best), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turn", [0.1, 0.3])
def test_multiplier_of_a_rotating_map(turn):
    """Phi_v = 0.9 I + turn K: B's eigenvalues are 0.1 +- i turn, so a step 1 / ||B|| diverges.

    At turn = 0.3, |1 - (0.1 + 0.3 i) / 0.316| = 1.17; with L = 1 the modulus is that of Phi_v's
    eigenvalues, 0.95.
    """
    K = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    jacobian = 0.9 * torch.eye(2) + turn * K
    push = torch.tensor([[0.05, 0.02], [0.0, 0.04]])
    u, v, optimizer = build(
        torch.tensor([0.4, -0.3]),
        torch.tensor([1.0, 2.0]),
        penalty="fixed_point",
        upper_lr=0.0,
        lower_lr=0.0,
    )
    functions = wrap(target_2, lambda a, b: jacobian @ b + push @ a, u, v, "auto")
    for _ in range(600):
        optimizer.lower_step(*functions)
    exact = -torch.linalg.solve((torch.eye(2) - jacobian).T, 2 * (v.detach() - 0.2))
    close(optimizer.adjoint[0], exact, 1e-9)
    optimizer.upper_step(*functions)
    close(u.grad, 2 * u.detach() - push.T @ exact, 1e-9)


def target_2(u, v):
    return ((v - 0.2) ** 2).sum() + (u**2).sum()


@pytest.mark.long
def test_linear_map_in_closed_form():
    """v = Mv + Pu: v* = Su with S = (I - M)^-1 P, so u solves (S'S + rho I) u = S' t."""
    M = torch.tensor([[0.5, 0.3, 0.0], [-0.4, 0.2, 0.1], [0.2, 0.0, -0.3]])
    P, goal = normal(3, 2, seed=51), normal(3, seed=52)
    S = torch.linalg.solve(torch.eye(3) - M, P)
    best = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(2), S.T @ goal)
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    lower = torch.optim.SGD([v], lr=0.5)
    optimizer = PenaltyBilevelOptimizer([u], lower, upper_lr=0.02, penalty="fixed_point")
    functions = wrap(
        lambda a, b: 0.5 * ((b - goal) ** 2).sum() + 0.05 * a @ a,
        lambda a, b: M @ b + P @ a,
        u,
        v,
        "auto",
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.upper, 1500)
    for _ in range(1500):
        optimizer.step(*functions)
        scheduler.step()
    torch.testing.assert_close(u.detach(), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(v.detach(), S @ best, rtol=0, atol=1e-6)
    adjoint = -torch.linalg.solve((torch.eye(3) - M).T, S @ best - goal)
    torch.testing.assert_close(optimizer.adjoint[0], adjoint, rtol=0, atol=1e-6)
