"""The parts of minimize against dense twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from solving import (
    generator,
    lower_loss,
    square,
    vector,
)
from torch import Tensor
from torch.func import grad, jacrev
from torch.testing import assert_close

from torch_penalty_bilevel import testing
from torch_penalty_bilevel.linear_solve import conjugate_residual, lanczos_lowest
from torch_penalty_bilevel.newton import lower_hessian as hessian_module
from torch_penalty_bilevel.newton.counted_losses import CountedLosses
from torch_penalty_bilevel.newton.lower_hessian import Spectral
from torch_penalty_bilevel.newton.lower_level import solve_lower
from torch_penalty_bilevel.newton.manifold import ReducedHessian, linearise
from torch_penalty_bilevel.newton.trust_region import steihaug


def manifold_point(problem: testing.Problem) -> tuple[CountedLosses, Any]:
    losses = CountedLosses(
        problem.upper_loss, lower_loss(problem), *problem.start(generator(5)), math.inf
    )
    low = solve_lower(losses, losses.u, losses.v, 1e-12)
    return losses, linearise(losses, losses.u, low)


@pytest.mark.parametrize("dense", [1000, 0])
@pytest.mark.parametrize(
    "name", ["quadratic", "scalar_ridge", "feature_ridge", "weighted_cleaning"]
)
def test_reduced_derivatives(name: str, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G and B are gradient and Hessian of u -> f(u, v*(u)), v* in closed form."""
    monkeypatch.setattr(hessian_module, "DENSE", dense)
    problem = testing.get(name)
    losses, at = manifold_point(problem)
    assert_close(at.low.v, problem.best_lower(at.u), rtol=1e-9, atol=1e-10)
    assert_close(at.gradient, problem.exact_hypergradient(at.u), rtol=1e-7, atol=1e-9)
    B = ReducedHessian(losses, at)
    found = torch.stack([B.product(e) for e in torch.eye(len(at.u))])
    wanted = jacrev(grad(problem.hyperobjective))(at.u)
    assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_dense_hessian_of_a_singular_level() -> None:
    """Pseudo-inverse, kernel and J against dense algebra; H = A'A of rank 3 in 6."""
    problem = testing.get("least_squares")
    losses, at = manifold_point(problem)
    g = lower_loss(problem)
    H = jacrev(grad(g, 1), 1)(at.u, at.low.v)
    J = jacrev(grad(g, 1), 0)(at.u, at.low.v).T
    found, y, p = Spectral(losses.lower(at.u, at.low.v)), torch.randn(6), torch.randn(3)
    assert found.nullity == 3
    kernel = torch.stack([found.lift(e) for e in torch.eye(3)], 1)
    assert_close(kernel.T @ kernel, torch.eye(3), rtol=0, atol=1e-12)
    assert_close(H @ kernel, torch.zeros(6, 3), rtol=0, atol=1e-9)
    assert_close(found.drop(y), kernel.T @ y, rtol=0, atol=1e-12)
    b = H @ y
    assert_close(H @ found.solve(b), b, rtol=0, atol=1e-9)
    assert_close(found.cross(y), J @ y, rtol=0, atol=1e-11)
    assert_close(found.cross_transposed(p), J.T @ p, rtol=0, atol=1e-11)


def test_rank_is_blind_to_units() -> None:
    """H = D A D with units D from 3e-4 to 3e3: eigenvalues span 1e14, the rank is that of A."""
    root, D = torch.randn(6, 6, generator=generator(0)), torch.logspace(-3.5, 3.5, 6)
    zero = torch.zeros(6)
    for rank in (6, 5):
        loss = lambda u, v, rank=rank: square(root[:rank] @ (D * v) - u[:rank]) / 2  # noqa: E731
        losses = CountedLosses(loss, loss, zero, zero, math.inf)
        assert Spectral(losses.lower(zero, zero)).nullity == 6 - rank


def random_symmetric(n: int, low: float, seed: int = 0) -> Tensor:
    """Eigenvalues evenly from ``low`` to 3."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed))).Q
    return Q @ torch.diag(torch.linspace(low, 3, n)) @ Q.T


def model_decrease(B: Tensor, gradient: Tensor, s: Tensor) -> float:
    return -float(gradient @ s + s @ B @ s / 2)


def test_steihaug_inside_is_newton() -> None:
    B, gradient = random_symmetric(7, 0.1), torch.randn(7)
    metric = torch.rand(7) + 0.5
    for precondition in (lambda x: x, lambda x: x / metric):
        step = steihaug(
            lambda s: B @ s, gradient, 1e9, tolerance=1e-12, limit=50, precondition=precondition
        )
        assert step.interior
        assert_close(step.value, -torch.linalg.solve(B, gradient), rtol=1e-9, atol=1e-9)
        assert step.decrease == pytest.approx(model_decrease(B, gradient, step.value), rel=1e-9)


@pytest.mark.parametrize("low", [-2.0, 0.1])
def test_steihaug_on_the_boundary(low: float) -> None:
    """Length, decrease, and at least the decrease of the best step along the gradient."""
    B, gradient, radius = random_symmetric(7, low), torch.randn(7), 0.3
    step = steihaug(lambda s: B @ s, gradient, radius, tolerance=1e-12, limit=50)
    assert not step.interior
    assert float(step.value.norm()) == pytest.approx(radius, rel=1e-12)
    assert step.decrease == pytest.approx(model_decrease(B, gradient, step.value), rel=1e-9)
    length = float(gradient.norm())
    steepest = -radius * gradient / length
    cauchy = max(model_decrease(B, gradient, t * steepest) for t in torch.linspace(0, 1, 99))
    assert step.decrease >= cauchy


def test_steihaug_does_not_follow_rounding() -> None:
    B, gradient = vector(1.0, 1e-17), vector(1.0, 1e-12)
    step = steihaug(lambda s: B * s, gradient, 1e9, tolerance=1e-15, limit=9)
    assert_close(step.value, vector(-1.0, 0.0), rtol=0, atol=1e-11)
    linear = steihaug(lambda s: 0 * s, gradient, 2.0, tolerance=1e-9, limit=9)
    assert_close(linear.value, -2 * gradient, rtol=1e-9, atol=1e-20)
    assert linear.decrease == pytest.approx(2)


def test_conjugate_residual_splits_range_and_kernel() -> None:
    root = torch.randn(4, 9, generator=generator(1))
    A, b = root.T @ root, torch.randn(9, generator=generator(2))
    x, rest = conjugate_residual(lambda y: A @ y, b, max_iterations=50)
    inverse = torch.linalg.pinv(A, rtol=1e-10)
    assert_close(x, inverse @ b, rtol=1e-6, atol=1e-6)
    assert_close(rest, b - A @ (inverse @ b), rtol=0, atol=1e-7)
    x, rest = conjugate_residual(lambda y: 0 * y, b, max_iterations=50)
    assert torch.equal(rest, b)
    assert not x.any()


def test_lanczos_finds_the_lowest() -> None:
    A = random_symmetric(12, -0.7, seed=4)
    ratio, x = lanczos_lowest(lambda y: A @ y, torch.zeros(12))
    assert ratio == pytest.approx(-0.7 / 3, rel=1e-9)
    assert_close(A @ x, -0.7 * x, rtol=0, atol=1e-8)
    assert lanczos_lowest(lambda y: 2 * y, torch.zeros(5))[0] == pytest.approx(1)
    assert lanczos_lowest(lambda y: 0 * y, torch.zeros(5))[0] == 0  # not 0 / 0


def test_scales_are_homogeneous_and_never_zero() -> None:
    u, v = torch.ones(2), torch.ones(3)

    def scales(c: float) -> tuple[float, float]:
        f = lambda u, v: c * (u.sum() ** 2 + v.sum())  # noqa: E731
        g = lambda u, v: 3 * c * (v - u.sum()).square().sum()  # noqa: E731
        losses = CountedLosses(f, g, u, v, math.inf)
        return losses.scales(losses.u, losses.v)

    assert scales(1e-6) == pytest.approx([1e-6 * s for s in scales(1.0)], rel=1e-12)
    assert scales(0.0) == (1.0, 1.0)
