"""Small problems whose answers are known, run far past convergence or through phases.

Letters: u upper, v lower, f upper loss, g lower loss. A phase changes f, g or the rates for a
while; ``Run.errors`` then says whether the run comes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_penalty_bilevel import PenaltyBilevelOptimizer

Loss = Callable[[Tensor, Tensor], Tensor]


class Known(NamedTuple):
    """f, g, a start and the distance to the solution."""

    f: Loss
    g: Loss
    u: Tensor
    v: Tensor
    error: Callable[[Tensor, Tensor], float]
    phi: Loss
    """A map whose fixed point is the minimiser of g, for ``penalty="fixed_point"``."""


class Phase(NamedTuple):
    """Factors of f, g, both learning rates and each of them for so many upper steps."""

    steps: int
    f: float = 1.0
    g: float = 1.0
    rate: float = 1.0
    upper: float = 1.0
    lower: float = 1.0


def followed(away: float = 1.0, dtype: torch.dtype = torch.float64) -> Known:
    """f = |v - b|^2, g = (v - u)'A(v - u) / 2: v* = u, u* = b, and grad_v f = 0 there."""
    A, b = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).to(dtype), torch.tensor([1.0, -2.0]).to(dtype)
    u = torch.full((2,), 3.0, dtype=dtype)
    return Known(
        lambda u, v: (v - b).square().sum(),
        lambda u, v: (v - u) @ A @ (v - u) / 2,
        u,
        u + away,
        lambda u, v: float((u - b).norm() + (v - b).norm()),
        lambda u, v: v - A @ (v - u) / 3,
    )


def sloped(dtype: torch.dtype = torch.float64) -> Known:
    """f = |v - b|^2 / 2 + |u|^2 / 2, g as above: u* = v* = b / 2, where grad_v f = -b / 2."""
    known, b = followed(dtype=dtype), torch.tensor([1.0, -2.0]).to(dtype)
    return known._replace(
        f=lambda u, v: (v - b).square().sum() / 2 + u.square().sum() / 2,
        error=lambda u, v: float((u - b / 2).norm() + (v - b / 2).norm()),
    )


def indefinite(dtype: torch.dtype = torch.float64) -> Known:
    """f = |v|^2 - |u - v|^2, g = |u - v|^2, 16 entries: u* = v* = 0; f is linear in v."""
    generator = torch.Generator().manual_seed(5)
    u, v = (10 * torch.rand(16, generator=generator).to(dtype) - 5 for _ in range(2))
    return Known(
        lambda u, v: v @ v - (u - v) @ (u - v),
        lambda u, v: (u - v) @ (u - v),
        u,
        v,
        lambda u, v: float(u.norm() + v.norm()),
        lambda u, v: (u + v) / 2,
    )


class Run:
    """A problem under an optimizer: ``go`` through phases, and the errors seen."""

    def __init__(
        self,
        known: Known,
        *,
        rates: tuple[float, float],
        rule: type[torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        self.known, self.rates = known, rates
        self.u, self.v = (t.clone().requires_grad_() for t in (known.u, known.v))
        self.is_map = options.get("penalty") == "fixed_point"
        self.optimizer = PenaltyBilevelOptimizer(
            rule([self.u], lr=rates[0]), rule([self.v], lr=rates[1]), **options
        )
        self.errors: list[float] = []

    def go(self, phases: Sequence[Phase], decay: Callable[[float], float] | None = None) -> Run:
        """Through ``phases``; ``decay`` maps the share of them that is over to a factor."""
        total, done = sum(phase.steps for phase in phases), 0
        for phase in phases:
            for _ in range(phase.steps):
                left = phase.rate * (decay(done / total) if decay else 1.0)
                upper, lower = self.rates
                self.optimizer.upper.param_groups[0]["lr"] = upper * phase.upper * left
                self.optimizer.lower.param_groups[0]["lr"] = lower * phase.lower * left
                self._step(phase)
                done += 1
                self.errors.append(self.known.error(self.u.detach(), self.v.detach()))
        return self

    def _step(self, phase: Phase) -> None:
        u, v, known = self.u, self.v, self.known
        lower = known.phi if self.is_map else lambda u, v: phase.g * known.g(u, v)
        with warnings.catch_warnings():
            # A solved state, and a flat g, have one.
            warnings.filterwarnings("ignore", message="the hypergradient was exactly zero")
            self.optimizer.step(lambda: phase.f * known.f(u, v), lambda: lower(u, v))


def stays(errors: Sequence[float], rounding: float) -> bool:
    """Is the last error at most ten times the least, or what rounding explains?"""
    return errors[-1] <= max(10 * min(errors), rounding)
