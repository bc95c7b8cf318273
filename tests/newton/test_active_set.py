"""The active-set equation of minimize, and the signed least squares that judge it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from solving import generator, square, vector
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.linear_solve.signed_least_squares import signed_least_squares
from torch_penalty_bilevel.newton.active_set import ActiveSet, Corner, guess
from torch_penalty_bilevel.newton.barrier import estimates
from torch_penalty_bilevel.newton.counted_losses import CountedLosses


@pytest.mark.parametrize("seed", range(20))
def test_signed_least_squares(seed: int) -> None:
    """Against every choice of unknowns that are zero; with dependent columns for odd seeds."""
    source = generator(seed)
    A, b = torch.randn(5, 4, generator=source), torch.randn(5, generator=source)
    if seed % 2:
        A[:, 3] = A[:, 0] - A[:, 1]
    signed = torch.rand(4, generator=source) < 0.7
    x, missed = signed_least_squares(A, b, signed)
    assert bool((x[signed] >= 0).all())
    assert missed == pytest.approx(float((A @ x - b).norm()), rel=1e-12)
    best = math.inf
    for kept in itertools.product([False, True], repeat=4):
        mask = torch.tensor(kept) | ~signed
        y = torch.zeros(4)
        y[mask] = torch.linalg.pinv(A[:, mask]) @ b
        if bool((y[signed] >= 0).all()):
            best = min(best, float((A @ y - b).norm()))
    assert missed == pytest.approx(best, rel=1e-9)


def test_signed_least_squares_without_unknowns() -> None:
    x, missed = signed_least_squares(torch.zeros(2, 0), vector(3.0, 4.0), torch.zeros(0) > 0)
    assert x.numel() == 0
    assert missed == pytest.approx(5)


def test_guess_by_the_rates_of_the_slacks() -> None:
    """Active like tau, kink like sqrt(tau), inactive constant; one upper, three lower."""
    tau = 1e-4
    slack = lambda t: torch.tensor([t, 3 * t, 2 * math.sqrt(t), 0.7])  # noqa: E731
    found = guess(slack(10 * tau), slack(tau), 1)
    held, zero = found[:4], found[4:]
    assert held.tolist() == [True, True, True, False]
    assert zero.tolist() == [False, True, True]
    outside = guess(slack(10 * tau), torch.full((4,), -1e-9), 1)
    assert outside[:4].all()


def test_multiplier_estimates_are_the_slope_of_the_barrier() -> None:
    """tau beta'(s), by autograd of the formula in ``barrier``, above and below delta."""
    tau = 1e-2
    delta = tau / 100
    s = vector(0.5, 1e-3, 5e-5, -0.3).requires_grad_()
    beta = torch.where(
        s > delta,
        -torch.log(s.clamp_min(delta)),
        ((s / delta - 2).square() - 1) / 2 - math.log(delta),
    )
    (slope,) = torch.autograd.grad(tau * beta.sum(), s)
    assert_close(estimates(s.detach(), tau), -slope, rtol=1e-12, atol=0)


def corner(
    f: Any, g: Any, h_upper: Any, h_lower: Any, at: tuple[float, float], working: list[bool]
) -> Corner | None:
    """Both levels with one variable; from ``at`` and the working set of (h_U, h_L, -z)."""
    u, v = vector(at[0]), vector(at[1])
    losses = CountedLosses(f, g, u, v, math.inf)
    equation = ActiveSet(losses, h_upper, h_lower, (1.0, 1.0))
    z = torch.zeros(0 if h_lower is None else len(h_lower(u, v)))
    return equation.solve(u, v, z, torch.tensor(working), 10.0, 1e-8)


def projection(u: Tensor, v: Tensor) -> Tensor:
    """g with v = min(u, 1) under v <= 1: a kink at u = 1."""
    return square(v - u) / 2


def below_one(u: Tensor, v: Tensor) -> Tensor:
    return v - 1


@pytest.mark.parametrize("working", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize(
    ("target", "wanted"),
    [((2.0, 3.0), (2.0, 1.0)), ((0.2, 0.4), (0.3, 0.3)), ((0.9, 2.0), (1.0, 1.0))],
    ids=["active", "inactive", "kink"],
)
def test_every_guess_ends_at_the_solution(
    target: tuple[float, float], wanted: tuple[float, float], working: list[bool]
) -> None:
    """F = (u - a)^2 + (v - b)^2 with v = min(u, 1).

    Right of the kink u = a if a > 1; left of it u = (a + b) / 2 if that is < 1; else the kink.
    """
    f = lambda u, v: square(u - target[0]) + square(v - target[1])  # noqa: E731
    found = corner(f, projection, None, below_one, (1.0, 1.0), working)
    assert found is not None
    assert_close(torch.cat([found.u, found.v]), vector(*wanted), rtol=0, atol=1e-10)
    assert found.unique
    for part in (found.residual, found.grad_u, found.grad_v):
        assert float(part.norm()) <= 1e-10


def test_a_minimum_at_the_bound_with_a_zero_multiplier() -> None:
    """F = (u - 1)^3 with u >= 1: no multiplier is needed, and no curvature speaks against it."""
    found = corner(
        lambda u, v: (u - 1).pow(3).sum() + square(v - u),
        lambda u, v: square(v - u),
        lambda u, v: 1 - u,
        None,
        (1.01, 1.0),
        [True],
    )
    assert found is not None
    assert_close(found.u, vector(1.0), rtol=0, atol=1e-12)


def test_a_maximum_is_refused() -> None:
    """F = -(u - 1)^2 has its gradient zero at u = 1, on the bound and inside."""
    f, g = lambda u, v: -square(u - 1) + square(v - u), lambda u, v: square(v - u)
    for bound in (1.0, 0.0):
        h = lambda u, v, bound=bound: bound - u  # noqa: E731
        assert corner(f, g, h, None, (1.0, 1.0), [bound == 1.0]) is None


def test_a_maximum_of_the_lower_level_is_refused() -> None:
    """g = -v^2 / 2 + u v is stationary at v = u, and largest."""
    g = lambda u, v: -square(v) / 2 + (u * v).sum()  # noqa: E731
    f = lambda u, v: square(u - 1) + square(v)  # noqa: E731
    assert corner(f, g, None, lambda u, v: v - 5, (0.5, 0.5), [False, True]) is None


def test_far_away_is_refused() -> None:
    """The solution u = 1000 is not what a path that ends near 0 points at."""
    f, g = lambda u, v: square(u - 1000.0), lambda u, v: square(v - u)
    assert corner(f, g, lambda u, v: u - 1e6, None, (0.0, 0.0), [False]) is None


def test_least_norm_step_where_u_is_not_determined() -> None:
    """u_2 enters nothing: it stays."""
    losses = CountedLosses(
        lambda u, v: square(v - 2),
        lambda u, v: square(v - u[0]),
        vector(0.7, 5.0),
        vector(0.7),
        math.inf,
    )
    equation = ActiveSet(losses, lambda u, v: u[:1] - 1, None, (1.0, 1.0))
    found = equation.solve(losses.u, losses.v, torch.zeros(0), torch.tensor([True]), 9.0, 1e-8)
    assert found is not None
    assert_close(found.u, vector(1.0, 5.0), rtol=0, atol=1e-10)
