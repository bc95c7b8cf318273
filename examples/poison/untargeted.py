"""Untargeted: images added to the training set so that the victim errs on everything.

    min over u in [0, 1]  f(W) = -CE(W; validation)
    where W minimises     g(u, W) = CE(W; train and (u, y')) + 0.0025 ||W||^2

u are the pixels of the poisons, which begin as the first training images; y' are wrong labels,
drawn once. As published: MNIST, 1,000 + 1,000 images, 60 poisons; but the test images are those
of the test file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.poison.attack import Attack, Data
from examples.poison.victim import Samples
from examples.shared.task import Values

CLASSES = 10


class Untargeted(Attack):
    """The two losses."""

    decay = 0.0025

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        """-CE(validation)."""
        images, labels = self.data.validation
        return -cross_entropy(self.scores(images, v), labels)

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: object = None
    ) -> Tensor:
        """CE(train and poisons) + decay ||W||^2."""
        return self.poisoned_loss(v, u) + self.decayed(v)


def make(digits: Samples, seed: int, train: int, validation: int, poisons: int) -> Data:
    """Draw the data of a seed; ``digits`` are MNIST's, the last 10,000 for tests."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(60000, generator=generator)
    first, second, third = order.split([train, validation, 60000 - train - validation])[:3]

    def part(rows: Tensor) -> Samples:
        return Samples(digits.inputs[rows], digits.labels[rows])

    begun = part(first[:poisons])
    shift = torch.randint(1, CLASSES, (poisons,), generator=generator)
    wrong = (begun.labels + shift) % CLASSES
    test = Samples(digits.inputs[60000:], digits.labels[60000:])
    trusted = part(third[: validation // 2])
    return Data(
        part(first), part(second), test, trusted, Samples(begun.inputs, wrong), begun.labels
    )
