"""Perturbation: training images that keep their labels are changed a little, within a ball.

    min over u  f(W) = -CE(W; validation)
    where W minimises  g(u, W) = CE(W; x and x' + u) + 0.1 mean(W^2)
    with ||u_i||_2 <= 5 for each image i and x' + u in [0, 1]

As in the experiments of Grazzi et al. (JMLR 2023): there 9,000 of 45,000 images of MNIST, here
600 of 3,000 unless asked for. As many of each class are changed, up to one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.poison.attack import Attack, Data, TrainingSet
from examples.poison.victim import Samples, joined
from examples.shared.task import Values


class Perturbation(Attack):
    """The two losses; ``train`` are the images that stay as they are."""

    decay = 0.1 / 7840  # of the sum of squares
    radius = 5.0
    rows = ("clean", "trusted", "random", "flip_in_place")

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        """-CE(validation)."""
        images, labels = self.data.validation
        return -cross_entropy(self.scores(images, v), labels)

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: object = None
    ) -> Tensor:
        """CE(all training images) + 0.1 mean(W^2)."""
        return self.poisoned_loss(v, u) + self.decayed(v)

    def without(self) -> TrainingSet:
        """The images that would be changed are there, as they were."""
        samples = joined(self.data.train, self.data.poisons)
        return TrainingSet(samples, torch.zeros_like(samples.labels, dtype=torch.bool))

    def random_images(self) -> Tensor:
        """A step of length 5 in a random direction, then to the nearest point of the set."""
        inputs = self.data.poisons.inputs
        noise = torch.randn(inputs.shape, generator=self.generator).to(inputs)
        noise *= self.radius / noise.norm(dim=1, keepdim=True)
        return inputs + self.upper_constraint.project(noise)

    def flipped(self) -> TrainingSet:
        """The images that would be changed get a wrong label instead."""
        truth = self.data.truth
        shift = torch.randint(1, self.classes, truth.shape, generator=self.generator)
        wrong = (truth + shift.to(truth.device)) % self.classes
        return self.with_poisons(self.data.poisons.inputs, wrong)


def make(digits: Samples, seed: int, train: int, validation: int, poisons: int) -> Data:
    """Draw the data of a seed: of ``train`` images ``poisons`` may be changed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(60000, generator=generator)
    first, second = order[:train], order[train : train + validation]
    third = order[train + validation : train + validation + 500]
    # Class after class, one by one: the first of this order are stratified.
    labels = digits.labels[first]
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    share = rank / labels.bincount()[labels]
    first = first[share.argsort(stable=True)]

    def part(rows: Tensor) -> Samples:
        return Samples(digits.inputs[rows], digits.labels[rows])

    changed, test = part(first[:poisons]), Samples(digits.inputs[60000:], digits.labels[60000:])
    return Data(
        *(part(first[poisons:]), part(second), test, part(third)), *(changed, changed.labels)
    )
