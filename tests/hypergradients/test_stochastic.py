"""The stochastic hypergradient of data seen by batches, of pure functions and live."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypergradient_runs import Run
from problems import normal
from torch import Tensor

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer
from torch_penalty_bilevel.functional import hypergradient


@pytest.mark.long
def test_stochastic_draws_anew_for_every_product() -> None:
    """Lower data seen one batch at a time: the mean of many hypergradients is the exact one."""
    X, y = normal(40, 3, seed=1), normal(40, seed=2)
    u = torch.tensor(-0.5)

    def loss(u: Tensor, v: Tensor, rows: Any = slice(None)) -> Tensor:
        return (X[rows] @ v - y[rows]).square().mean() / 2 + u.exp() * v.square().sum() / 2

    calls = []

    def sampled(u: Tensor, v: Tensor) -> Tensor:
        calls.append(torch.randint(0, 40, (8,)))
        return loss(u, v, calls[-1])

    f = lambda u, v: (v + 3).square().sum()  # noqa: E731
    H = torch.func.hessian(loss, argnums=1)(u, torch.zeros(3))
    v = torch.linalg.solve(H, X.T @ y / 40)
    exact, _ = hypergradient(f, loss, u, v)
    options = {
        "linear_optimizer": lambda q: torch.optim.SGD(q, lr=0.02),
        "max_iterations": 200,
        "samples": 2,
    }
    found = []
    for _ in range(12):
        with pytest.warns(BilevelWarning, match="stopped"):
            gradient, info = hypergradient(f, sampled, u, v, method="stochastic", **options)
        assert not info.converged
        found.append(float(gradient))
    assert len({tuple(c.tolist()) for c in calls}) == len(calls) >= 12 * 400
    estimates = torch.tensor(found)
    # Within four standard errors of the mean, which are well below the value itself.
    error = float(estimates.std()) / math.sqrt(len(found))
    assert 0 < error < 0.1 * abs(float(exact))
    assert abs(float(estimates.mean()) - float(exact)) < 4 * error


def test_stochastic_draws_a_batch_for_every_product() -> None:
    draws = []
    run = Run(method="stochastic", lower_steps=2, inner_iterations=3, samples=1)
    run.closures = (run.closures[0], lambda: draws.append(0) or run.problem.g(run.u, run.v))
    run.optimizer._dependence.due = False
    run.optimizer._scope.knows = lambda *functions: True
    run.step()
    # 2 lower steps, one linearisation for the certificate, 1 + 3 products, 1 for J q.
    assert len(draws) == 2 + 1 + 4 + 1


@pytest.mark.long
def test_stochastic_bilevel_gradient_with_and_without_warm_start() -> None:
    """BSGM on batches: with a warm start and decreasing steps the iterates settle near u*."""
    X, noise = normal(200, 4, seed=1), normal(200, 4, seed=2)
    target, C = normal(4, seed=3), normal(3, 4, seed=4)

    def run(warm: bool, steps: int, T: int) -> float:
        torch.manual_seed(0)
        u, v = torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)
        rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=0.1)
        optimizer = HypergradientOptimizer(
            *rules, method="stochastic", lower_steps=T, inner_iterations=T, warm_start=warm
        )
        # Without a warm start v has as far to go in every step: only u's steps decrease.
        decreasing = optimizer if warm else optimizer.upper
        scheduler = torch.optim.lr_scheduler.LambdaLR(decreasing, lambda k: 20 / (20 + k))

        def g() -> Tensor:
            rows = torch.randint(0, 200, (16,))
            fit = ((v - noise[rows]).square() * X[rows].square()).sum(1).mean() / 2
            return fit + v.square().sum() / 2 - u @ C @ v

        def f() -> Tensor:
            rows = torch.randint(0, 200, (16,))
            return (v - target - noise[rows]).square().sum(1).mean() / 2 + u.square().sum() / 2

        for _ in range(steps):
            optimizer.step(f, g)
            scheduler.step()
        # The closed form: diagonal lower Hessian D, v* = D^{-1}(s + C'u).
        D = X.square().mean(0) + 1
        s, goal = (X.square() * noise).mean(0), target + noise.mean(0)
        S = C / D
        best = torch.linalg.solve(torch.eye(3) + S @ S.T, S @ (goal - s / D))
        return float((u.detach() - best).norm() / best.norm())

    warm, cold, hasty = run(True, 600, 1), run(False, 100, 30), run(False, 100, 1)
    # Noise of batches of 16 with steps down to 1/30 of 0.1, or 30 steps of 0.1 from zero.
    assert warm < 0.15
    assert cold < 0.15
    assert hasty > 2 * max(warm, cold)  # one step from zero: biased towards v = 0, q = 0
