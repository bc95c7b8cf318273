"""The rows of the table: ways to choose the weights while the transformer trains.

All begin with the same transformer and train it on as many letters of the sources, from the same
draws of windows where weights are equal. What some read besides (f's clean letters, a second and
third training) is in their seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from examples.mix_sources.formulation import (
    Mixing,
    letter_losses,
    penalty_optimizer,
    upper_rule,
    windows_of,
)

SMOOTHING = 1e-3  # of DoReMi's weights, as published
LOOK_AHEAD = 1e-4  # relative length of the difference for T1-T2


class Rates(NamedTuple):
    """What is tuned; of u, or the exponent's of DoReMi."""

    lower: float
    upper: float = 0.0


class Method:
    """Training with weights that stay as they are.

    Args:
        task: the problem.
        rates: of the method.
        every: m, a step of u every m steps of v.
    """

    stages = 1
    """How often the transformer trains for a whole budget."""
    length = 1.0
    """Steps of a training, in budgets."""

    def __init__(self, task: Mixing, rates: Rates, every: int = 1) -> None:
        self.task, self.rates, self.every = task, rates, every
        self.rule: torch.optim.Optimizer = torch.optim.Adam(task.model.parameters(), lr=rates.lower)
        self.begin()

    def begin(self) -> None:
        """Choose the weights, or the rules."""

    @property
    def rules(self) -> tuple[torch.optim.Optimizer, ...]:
        """Whose rates fall."""
        return (self.rule,)

    @property
    def kept(self) -> tuple[object, ...]:
        """What a checkpoint holds."""
        return (self.task.model, self.task.weights, *self.rules)

    def step(self, number: int, stage: int) -> None:
        """One step of training."""
        self.task.draw()
        plain_step(self.rule, self.task.plain_loss)

    def weights(self) -> Tensor:
        """As they are now, (K,)."""
        return self.task.held

    def refresh(self) -> None:
        """Train with the weights as they are now; also after a checkpoint was read."""
        self.task.hold(self.weights())


class Uniform(Method):
    """Equal weights."""


class Longer(Method):
    """Equal weights for about as many seconds as the penalty takes: what its u-steps cost."""

    length = 1.5


class Oracle(Method):
    """Equal weights of the sources that are not corrupted: what no method can know."""

    def begin(self) -> None:
        is_clean = self.task.mixture.of_kind("wanted", "other").to(self.task.held)
        self.task.hold(is_clean / is_clean.sum())


class Target(Method):
    """The clean text alone, over and over, as many letters of it per step."""

    def weights(self) -> Tensor:
        return torch.zeros_like(self.task.held)

    def refresh(self) -> None:
        """Nothing is drawn from the sources."""

    def step(self, number: int, stage: int) -> None:
        task = self.task
        task.clean = windows_of(task.mixture.clean, task.size.context + 1, task.windows)
        plain_step(self.rule, task.upper_loss)


class Learned(Method):
    """Weights that move every m steps, by the gradient of f with respect to u."""

    def step(self, number: int, stage: int) -> None:
        moves = (number + 1) % self.every == 0
        self.task.draw(equally=moves)
        if moves:
            self.both_levels()
            self.refresh()
        else:
            self.lower_level()

    def lower_level(self) -> None:
        """A step of v."""
        plain_step(self.rule, self.task.plain_loss)

    def both_levels(self) -> None:
        """A step of v and one of u."""
        raise NotImplementedError

    def weights(self) -> Tensor:
        return self.task.weights().detach()


class Penalty(Learned):
    """This package."""

    def begin(self) -> None:
        self.optimizer = penalty_optimizer(
            self.task, upper_lr=self.rates.upper, lower_lr=self.rates.lower
        )
        self.rule = self.optimizer.lower

    @property
    def rules(self) -> tuple[torch.optim.Optimizer, ...]:
        return (self.optimizer,)

    def lower_level(self) -> None:
        self.optimizer.plain_lower_step(self.task.plain_loss)

    def both_levels(self) -> None:
        self.optimizer.step(self.task.upper_loss, self.task.lower_loss)


class OneStep(Learned):
    """T1-T2: q = -grad_v f, so that a weight rises where its source's gradient looks like f's."""

    def begin(self) -> None:
        self.upper = upper_rule(self.task, self.rates.upper)

    @property
    def rules(self) -> tuple[torch.optim.Optimizer, ...]:
        return self.rule, self.upper

    def both_levels(self) -> None:
        self.lower_level()
        self.upper.zero_grad()
        self.task.weights().backward(-alignments(self.task))
        self.upper.step()


class DoReMi(Method):
    """Weights by excess loss over a reference (Xie et al. 2023), without looking at f.

    Three trainings: a reference with equal weights; a proxy, whose weights are multiplied by
    exp(rate * excess loss of the source), the part above 0 of each letter's loss less the
    reference's; and the transformer itself, with the mean of the proxy's weights. Published: the
    first two are smaller than the third; here all are of one size, as those of the other rows.
    """

    stages = 3

    def begin(self) -> None:
        equal = self.task.held
        self.logs, self.sum = equal.log(), torch.zeros_like(equal)
        self.reference, self.proxy = (copy.deepcopy(self.task.model) for _ in range(2))
        self.scores = [self.task.ready(model) for model in (self.reference, self.proxy)]
        self.others = [
            torch.optim.Adam(model.parameters(), lr=self.rates.lower)
            for model in (self.reference, self.proxy)
        ]

    @property
    def rules(self) -> tuple[torch.optim.Optimizer, ...]:
        return self.rule, *self.others

    @property
    def kept(self) -> tuple[object, ...]:
        return (*super().kept, self.reference, self.proxy, self.logs, self.sum)

    def step(self, number: int, stage: int) -> None:
        if stage == 2:
            self.task.hold(self.sum / self.sum.sum())
            return super().step(number, stage)
        self.task.draw()
        plain_step(self.others[stage], (self._reference_loss, self._proxy_loss)[stage])

    def refresh(self) -> None:
        """The first two trainings see equally much of all sources."""

    def weights(self) -> Tensor:
        return self.sum / self.sum.sum() if self.sum.any() else self.task.held

    def _reference_loss(self) -> Tensor:
        return self.task.held @ self._source_losses(0)[0]

    def _proxy_loss(self) -> Tensor:
        of_sources, losses = self._source_losses(1)
        with torch.no_grad():
            excess = (losses - self._source_losses(0)[1]).clamp(min=0)
            self.logs += self.rates.upper * self.task.per_source(excess)
            weights = self.logs.softmax(0).lerp(self.task.held, SMOOTHING)
            self.logs.copy_(weights.log())
            self.sum += weights
        return weights @ of_sources

    def _source_losses(self, which: int) -> tuple[Tensor, Tensor]:
        """Of each source, and of each letter."""
        losses = letter_losses(self.scores[which], self.task.drawn)
        return self.task.per_source(losses), losses


def plain_step(rule: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """What training is."""
    rule.zero_grad()
    loss().backward()
    rule.step()


def alignments(task: Mixing) -> Tensor:
    """<grad_v f, grad_v L_k> of every source, (K,).

    A derivative of L_k along grad_v f: two forward passes, no gradient of a single source.
    """
    v = [p for p in task.model.parameters() if p.requires_grad]
    slope = torch.autograd.grad(task.upper_loss(), v)
    sizes = [torch.cat([t.detach().flatten() for t in ts]).norm() for ts in (v, slope)]
    shift = LOOK_AHEAD * sizes[0] / sizes[1]
    before = [p.detach().clone() for p in v]
    found = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            torch._foreach_copy_(
                v, [b + sign * shift * s for b, s in zip(before, slope, strict=True)]
            )
            found.append(task.source_losses())
        torch._foreach_copy_(v, before)
    return (found[0] - found[1]) / (2 * shift)


# Tuned on seeds 100 and 101, both rows by the same grid; those reported are others. Of v 3e-3 and
# 1e-2, which learns more slowly. Of u 0.05, 0.1, 0.15: held-out loss of seed 100 by the penalty
# 2.22, 2.27, 2.34 (equal weights 2.33: at high rates one wanted source gets nearly all the weight,
# and the model sees too little text), by T1-T2 2.23, 2.24, 2.27. DoReMi's is what is published.
METHODS: dict[str, tuple[type[Method], Rates]] = {
    "penalty": (Penalty, Rates(3e-3, 0.05)),
    "t1_t2": (OneStep, Rates(3e-3, 0.05)),
    "doremi": (DoReMi, Rates(3e-3, 1.0)),
    "uniform": (Uniform, Rates(3e-3)),
    "longer": (Longer, Rates(3e-3)),
    "target": (Target, Rates(3e-3)),
    "oracle": (Oracle, Rates(3e-3)),
}
