"""The bilevel problems of ``synthetic``.

    min over u of  f(u, v)   where v minimises  g(u, .); of several minimisers f takes its best

u and v have 20 entries (one each in ``figure1``). A has two blocks of 5 x 10 standard normal
numbers, P projects on the span of its rows; what A does not see, g does not see either. The errors
are the distances that were published. ``FORMULAS`` says it as the paper does, the code is in
``torch_penalty_bilevel.testing``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_penalty_bilevel import PenaltyBilevelOptimizer, testing


class Formula(NamedTuple):
    """A problem as a person writes it."""

    f: str
    g: str
    error: str


FORMULAS = {
    "figure1": Formula("v² - (u - v)²", "(u - v)²", "√(u² + v²)"),
    "smd20": Formula("|u|² + |v|² - 1", "|1 - u - v|²", "√(|u - ½|² + |v - ½|²)"),
    "smd21": Formula("|v|² - |u - v|²", "|u - v|²", "√(|u|² + |v|²)"),
    "smd22": Formula("|Av|² - |A(u - v)|²", "|A(u - v)|²", "√(|Pu|² + |Pv|²)"),
    "smd23": Formula("|v|² - |A(u - v)|²", "|A(u - v)|²", "√(|Pu|² + |v|²)"),
    "smd24": Formula("|u|² + |v|²", "|A(1 - u - v)|²", "√(|P(u - ½)|² + |P(v - ½)|²)"),
}


def problem(name: str, seed: int) -> testing.Problem:
    """The problem, with the A of this seed."""
    if name == "figure1":
        return testing.get("mehra_hamm_indefinite")
    return testing.get(name, seed=seed)


def start(of: testing.Problem, seed: int) -> tuple[Tensor, Tensor]:
    """U and v, every entry uniform in [-5, 5]; float64."""
    # Not the random numbers of A.
    u, v = of.start(torch.Generator().manual_seed(1_000_000 + seed))
    return u.requires_grad_(), v.requires_grad_()


@torch.no_grad()
def error(of: testing.Problem, u: Tensor, v: Tensor) -> float:
    """The published one."""
    return (of.published_error or of.error)(u, v).item()


def penalty_optimizer(u: Tensor, v: Tensor, rate: float, steps: int) -> PenaltyBilevelOptimizer:
    """All that the penalty method asks for; a step is ``optimizer.step(f, g)``."""
    return PenaltyBilevelOptimizer([u], [v], upper_lr=rate, lower_lr=rate, lower_steps=steps)
