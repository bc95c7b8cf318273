"""Targeted: images added to the training set so that the victim takes eights for threes.

    min over u in [0, 1]  f(W) = CE(W; eights of the validation images, called 3)
    where W minimises     g(u, W) = CE(W; train and (u, y')) + 0.0025 ||W||^2

Half of the poisons begin as threes and are called 8, half are eights called 3. As published: 1,000
training images, 60 poisons, 400 eights for f; success is the share of the test file's eights that
the victim calls 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.poison.attack import Attack, Data
from examples.poison.victim import Samples, wrong_share
from examples.shared.task import Values

SOURCE, GOAL = 8, 3


class Targeted(Attack):
    """The two losses."""

    measure = "success"
    decay = 0.0025

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        """CE(eights as 3)."""
        images, labels = self.data.validation
        return cross_entropy(self.scores(images, v), labels)

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: object = None
    ) -> Tensor:
        """CE(train and poisons) + decay ||W||^2."""
        return self.poisoned_loss(v, u) + self.decayed(v)

    def score(self, victim: Values) -> dict[str, float]:
        """The share of the test eights that are called 3, and the error on all test images."""
        images, labels = self.data.test
        eights = images[labels == SOURCE]
        called = Samples(eights, torch.full((len(eights),), GOAL, device=labels.device))
        return {"success": 1 - wrong_share(victim, called)} | super().score(victim)


def make(digits: Samples, seed: int, train: int, validation: int, poisons: int) -> Data:
    """Draw the data of a seed; ``validation`` is the number of eights in f."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(60000, generator=generator)
    labels = digits.labels[order]
    threes, eights = (order[labels == digit] for digit in (GOAL, SOURCE))
    half = poisons // 2
    begun = torch.cat([threes[:half], eights[:half]])
    seen = eights[half : half + validation]
    taken = torch.zeros(60000, dtype=torch.bool)
    taken[begun] = taken[seen] = True
    rest = order[~taken[order]]  # in training the copies that become poisons come first
    first, trusted = torch.cat([begun, rest[: train - len(begun)]]), rest[train : train + 500]

    def part(rows: Tensor) -> Samples:
        return Samples(digits.inputs[rows], digits.labels[rows])

    goals = torch.cat([torch.full((half,), SOURCE), torch.full((half,), GOAL)])
    validated = Samples(digits.inputs[seen], torch.full((len(seen),), GOAL))
    test = Samples(digits.inputs[60000:], digits.labels[60000:])
    return Data(
        *(part(first), validated, test, part(trusted)),
        *(Samples(digits.inputs[begun], goals), digits.labels[begun]),
    )
