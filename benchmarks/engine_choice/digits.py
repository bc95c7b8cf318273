"""Cleaning scikit-learn's digits with any kind of network, for comparing engines.

1,000 samples, half of them with a wrong label, 50 clean ones, one weight u per sample, batches of
100, Adam 1e-2 below and 1e-1 above.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.engine_choice.kinds import KINDS
from torch_penalty_bilevel import PenaltyBilevelOptimizer

CLEAN, TRAIN, BATCH = 50, 1000, 100


class Cleaning:
    """One run; the same seed draws the same data, network and batches for every engine."""

    def __init__(self, kind: str, engine: str, seed: int) -> None:
        self.x, self.y, self.given, self.wrong = _noisy(seed)
        torch.manual_seed(seed)
        self.model = KINDS[kind]()
        self.u = torch.zeros(TRAIN, requires_grad=True)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u], self.model.parameters(), upper_lr=0.1, lower_lr=1e-2, curvature=engine
        )

    def f(self) -> Tensor:
        clean = slice(TRAIN, TRAIN + CLEAN)
        return cross_entropy(self.model(self.x[clean]), self.y[clean])

    def g(self, i: Tensor) -> Tensor:
        losses = cross_entropy(self.model(self.x[i]), self.given[i], reduction="none")
        return (self.u[i].sigmoid() * losses).mean()

    def epoch(self) -> None:
        for i in torch.randperm(TRAIN).split(BATCH):
            self.optimizer.step(self.f, lambda i=i: self.g(i))

    def in_float64(self) -> Cleaning:
        """A copy at the same point, in which the problem can be differentiated; it has no rule."""
        twin = self.using(self.u.detach().double().requires_grad_(), self.model)
        twin.model, twin.x = copy.deepcopy(self.model).double(), self.x.double()
        return twin

    def using(self, u: Tensor, model: Callable[[Tensor], Tensor]) -> Cleaning:
        """The same losses of another point."""
        twin = copy.copy(self)
        twin.u, twin.model = u, model
        return twin

    @property
    def told_right(self) -> float:
        """The share of labels; 0.5 is guessing."""
        return float(((self.u > 0) != self.wrong).float().mean())


def _noisy(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, true labels, given labels, which of those are wrong."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(y), generator=draw)
    x, y = (x.float() / 16).reshape(-1, 1, 8, 8)[order], y[order]
    wrong = torch.rand(TRAIN, generator=draw) < 0.5
    other = (y[:TRAIN] + torch.randint(1, 10, (TRAIN,), generator=draw)) % 10
    return x, y, torch.where(wrong, other, y[:TRAIN]), wrong
