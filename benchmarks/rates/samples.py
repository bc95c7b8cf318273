"""Stochastic implicit differentiation on samples of the problem of ``problem.py``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rates.curves import KAPPA, Curve
from benchmarks.rates.problem import Quadratic, spectral
from torch_penalty_bilevel import BilevelWarning
from torch_penalty_bilevel.functional import hypergradient


class Sampled(Quadratic):
    """The problem seen through samples: A + noise diag(+-1) and (1 + mixed_noise (+-1)) C.

    Every call draws anew, for each of the copies. The noise in A q has the size of noise ||q||.
    """

    def __init__(self, kappa: float, noise: float, mixed_noise: float, copies: int) -> None:
        super().__init__(kappa, 20)
        self.noise, self.mixed_noise, self.copies = noise, mixed_noise, copies
        self.draws = torch.Generator().manual_seed(1)

    def signs(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.draws).double() * 2 - 1

    def lower_loss(self, u: Tensor, v: Tensor) -> Tensor:
        shaken = (self.signs(*v.shape) * v.square()).sum() / 2
        mixed = (self.signs(len(v), 1) * (u @ self.C) * v).sum()
        return super().lower_loss(u, v) + self.noise * shaken + self.mixed_noise * mixed

    def mean_square(self, **options: Any) -> float:
        """The mean over the copies of ||p - p*||^2 at v*."""
        u, v = (t.expand(self.copies, -1).clone() for t in (self.u, self.best))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            losses, options = (self.upper_loss, self.lower_loss), options | {"tolerance": 1e-15}
            p, _ = hypergradient(*losses, u, v, method="stochastic", **options)
        return float((p - self.exact).square().sum(1).mean())


def decreasing(first: float, offset: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """SGD with the steps first * offset / (offset + k)."""

    def make(unknowns: list[Tensor]) -> torch.optim.Optimizer:
        rule = torch.optim.SGD(unknowns, lr=first)
        scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda k: offset / (offset + k))
        rule.register_step_post_hook(lambda *_: scheduler.step())
        return rule

    return make


def sampled(kappa: float = KAPPA, copies: int = 400) -> Iterable[Curve]:
    r"""Mean squared errors: 1 / k with decreasing steps, 1 / J with J samples and a constant one.

    With eta_k = 2 / (mu (m + k)), noise s and m so large that eta_0 contracts on average,

    .. math::
        E\lVert q_{k+1} - q^*\rVert^2 \le (1 - \eta_k\mu) E\lVert q_k - q^*\rVert^2 +
        2 \eta_k^2 s^2 \lVert q^*\rVert^2 \quad\Rightarrow\quad
        E\lVert q_k - q^*\rVert^2 \le \frac{\max(m, 8 s^2/\mu^2) \lVert q^*\rVert^2}{m + k}

    by induction. With the constant step eta the error settles at X with

    .. math::
        X \le q^2 X + \frac{\eta^2 s^2}{J} (\lVert q^*\rVert^2 + X)
    """
    noise = 2.0
    problem = Sampled(kappa, noise, 0.0, copies)
    mu, size = problem.mu, float(problem.adjoint.norm())
    through = spectral(problem.J) ** 2
    offset = 2 / mu / min(problem.step, mu / (mu**2 + 2 * noise**2))
    rule = decreasing(2 / mu / offset, offset)
    counts = [2**i for i in range(2, 10)]
    errors = [problem.mean_square(linear_optimizer=rule, max_iterations=k) for k in counts]
    bounds = [through * max(offset, 8 * noise**2 / mu**2) * size**2 / (offset + k) for k in counts]
    law = lambda k: 1 / (offset + k)  # noqa: E731
    yield Curve("k steps", "sampled", counts, errors, bounds, law, "1/k", 60, True)

    problem = Sampled(kappa, noise, noise, copies)
    counts = [2**i for i in range(4)]
    errors = [
        problem.mean_square(step_size=problem.step, max_iterations=30, samples=J) for J in counts
    ]
    bounds = []
    for J in counts:
        share = problem.step**2 * noise**2 / J / (1 - problem.q**2)
        settled = share * size**2 / (1 - share)
        final = noise**2 / J * spectral(problem.C) ** 2 * (size**2 + settled)
        bounds.append(through * settled + final)
    yield Curve("J samples", "sampled", counts, errors, bounds, lambda J: 1 / J, "1/J", 2, True)
