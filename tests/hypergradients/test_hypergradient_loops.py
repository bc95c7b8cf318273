"""Loops of steps against a plain twin on matrices, warm starts, and where the runs end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypergradient_runs import METHODS, SOLVERS, Run
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.constraints import Box


def twin(run: Run, method: str, steps: int, T: int, K: int, warm: str) -> tuple[Tensor, Tensor]:
    p, u, v = run.problem, run.u.detach().clone(), run.v.detach().clone()
    lr, first, q = 0.1, v.clone(), torch.zeros(4)
    I = torch.eye(4)  # noqa: E741
    for _ in range(steps):
        v = v if warm in ("both", "lower") else first
        q = q if warm in ("both", "adjoint") else torch.zeros(4)
        for _ in range(T):
            v = v - lr * p.residual(u, v)
        slope = v - p.target
        if method == "fixed_point" or method == "stochastic":
            for _ in range(K):
                q = q - lr * (p.A @ q + slope)
        elif method == "neumann":
            left = slope + p.A @ q
            terms = [torch.linalg.matrix_power(I - lr * p.A, k) for k in range(K + 1)]
            q = q - lr * sum(terms) @ left
        elif method == "approx_grad":
            for _ in range(K // 2):
                s = p.A @ (p.A @ q + slope)
                q = q - (s @ s) / (p.A @ s).square().sum() * s
        elif method == "cg_normal":
            q = krylov_best(p.A, slope, q, K // 2, normal_equations=True)
        elif method == "cg":
            q = krylov_best(p.A, slope, q, K, normal_equations=False)
        elif method == "reverse":
            q = -lr * sum(torch.linalg.matrix_power(I - lr * p.A, k) for k in range(T)) @ slope
        elif method == "one_step":
            q = -lr * slope
        else:
            q = torch.zeros(4)
        u = u - 0.05 * (u - p.offset + p.C @ q)
    return u, v


def krylov_best(A: Tensor, slope: Tensor, q: Tensor, k: int, normal_equations: bool) -> Tensor:
    """What conjugate gradients minimise, by a dense solve on an orthogonal Krylov basis."""
    M = A @ A if normal_equations else A
    left = -(A @ q + slope)
    left = A @ left if normal_equations else left
    basis = torch.linalg.qr(
        torch.stack([torch.linalg.matrix_power(M, j) @ left for j in range(k)], 1)
    ).Q
    return q + basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ left)


@pytest.mark.parametrize("warm", ["both", "lower", "adjoint", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_loops_are_those_of_the_plain_twin(method: str, warm: str) -> None:
    T, K = 3, 2 if method in ("cg", "cg_normal", "approx_grad") else 4
    option = {"both": True, "none": False}.get(warm, warm)
    count = {"inner_iterations": K} if method in SOLVERS else {}
    run = Run(method=method, lower_steps=T, warm_start=option, **count)
    expected = twin(run, method, 4, T, K, warm)
    run.step(4)
    assert_close(run.u.detach(), expected[0], rtol=1e-10, atol=1e-12)
    assert_close(run.v.detach(), expected[1], rtol=1e-10, atol=1e-12)


def test_a_cold_start_forgets_the_moments_of_the_lower_rule() -> None:
    run = Run(method="cg", lower_steps=3, warm_start=False, momentum=0.9, upper_lr=0.0)
    run.step()
    first = run.v.detach().clone()
    run.step()
    assert torch.equal(run.v.detach(), first)
    run.optimizer.warm_start = True
    run.step()
    assert not torch.equal(run.v.detach(), first)


def test_counts_may_grow_with_the_step() -> None:
    calls = []
    run = Run(
        method="fixed_point",
        lower_steps=lambda k: calls.append(k) or k + 1,
        inner_iterations=lambda k: 2 * k + 1,
    )
    run.step(3)
    assert calls == [0, 1, 2]
    # Per step: T lower steps, f, g linearised, K products, and one for a start that is not zero.
    expected = sum((k + 1) + 2 + (2 * k + 1) + (k > 0) for k in range(3))
    assert run.optimizer.metrics.gradient_evaluations == expected
    run.optimizer.lower_steps = lambda k: 0
    with pytest.raises(ValueError, match="lower_steps must be an integer >= 1, got 0"):
        run.step()


@pytest.mark.long
def test_approx_grad_by_adam_comes_as_near_as_its_steps_are_long() -> None:
    """ApproxGrad with Adam, whose steps stay about lr long: it comes that near."""
    lr = 2e-3
    make = lambda q: torch.optim.Adam(q, lr=lr)  # noqa: E731
    run = Run(method="approx_grad", linear_optimizer=make, inner_iterations=30, lower_steps=20)
    near = 5.0 * 2 * lr  # ||A|| times lr for each of four unknowns
    run.step()
    assert float(run.optimizer.metrics.adjoint_residual_norm) > 5 * near
    run.step(150)
    assert float(run.optimizer.metrics.adjoint_residual_norm) < near


# Where they end.


@pytest.mark.long
def test_without_a_warm_start_accuracy_is_bought_by_iterations_with_one_it_is_free() -> None:
    """Grazzi et al. (2020): AID errs by O(q^T + q^K); a warm start carries it to zero."""

    def final(**options: Any) -> float:
        run = Run(method="fixed_point", lr=0.3, upper_lr=0.15, **options)
        run.step(150)
        return float(run.problem.exact(run.u.detach()).norm())

    q = 1 - 0.3 * 1.0  # ||I - lr A||, eigenvalues of A between 1 and 5: max(0.7, 0.5)
    biases = [final(lower_steps=k, inner_iterations=k, warm_start=False) for k in (5, 10, 20)]
    for shorter, longer, k in zip(biases, biases[1:], (5, 10), strict=False):
        # The bias shrinks by q^k from k to 2k iterations, T q^T at the worst.
        assert longer < 3 * q**k * shorter
        assert longer > 1e-3 * q**k * shorter
    assert final(lower_steps=5, inner_iterations=5) < 1e-9
    growing = final(
        lower_steps=lambda k: 2 + k // 2, inner_iterations=lambda k: 2 + k // 2, warm_start=False
    )
    assert growing < 1e-9


@pytest.mark.long
def test_projected_hypergradient_descent_ends_at_a_constrained_solution() -> None:
    run = Run(method="cg", lr=0.3, lower_steps=10, upper_constraint=Box(-2.0, 2.0))
    run.problem.offset = torch.tensor([10.0, 0.0, -10.0])
    free = Run(method="cg", lr=0.3, lower_steps=10)
    free.problem.offset = run.problem.offset
    run.step(300)
    free.step(300)
    u = run.u.detach()
    assert float(free.u.detach().abs().max()) > 2.5  # the bounds matter
    assert float(u.abs().max()) <= 2
    # Stationary: a projected step of the exact hypergradient stays where it is.
    moved = (u - run.problem.exact(u)).clamp(-2, 2)
    assert_close(moved, u, rtol=0, atol=1e-8)
    assert bool((u.abs() == 2).any())
