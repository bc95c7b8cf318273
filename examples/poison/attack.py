"""What all attacks share: u changes pixels, v is a linear softmax, trained on what u made.

A subclass holds its data and the formulas of f and g. Each is a ``Task``, so that every solver can
take it.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from examples.poison.victim import Samples, fit, joined, wrong_share
from examples.shared.task import Values
from torch_penalty_bilevel.nn import BoundedPerturbation


class TrainingSet(NamedTuple):
    """What a victim is given."""

    samples: Samples
    is_poison: Tensor
    """(N,), bool: what the attacker put there or changed."""


class Data(NamedTuple):
    """What an attack needs. The inputs of a victim are rows of pixels, or of features."""

    train: Samples
    """Without those that are changed."""
    validation: Samples
    """The attacker's, with the labels that f reads."""
    test: Samples
    trusted: Samples
    """The defender's: clean, and not seen by the attacker."""
    poisons: Samples
    """As they are before the attack, with the labels that they are given."""
    truth: Tensor
    """Right labels of the poisons."""

    def to(self, device: torch.device) -> Data:
        """The same on another device."""
        moved = [
            Samples(part.inputs.to(device), part.labels.to(device))
            if isinstance(part, Samples)
            else part.to(device)
            for part in self
        ]
        return Data(*moved)  # pyright: ignore[reportArgumentType]


class Attack:
    """Its rows are the simple baselines, by name: each gives the training set of a victim."""

    measure = "error"
    """What the attacker wants much of, of those that ``score`` returns."""
    decay: float
    """Of the victim: g has decay * ||W||^2 beside the mean cross entropy."""
    bias = False
    radius: float | None = None
    rows: tuple[str, ...] = ("clean", "trusted", "random", "flip", "flip_in_place")
    is_new = False
    gradient_unit = 1.0
    adjoint_step = None

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        self.generator = torch.Generator().manual_seed(seed + 1000)
        self.classes = 1 + int(max(part.labels.max() for part in (data.train, data.test)))
        self.perturbation = BoundedPerturbation(data.poisons.inputs, 0.0, 1.0, self.radius)
        self.upper_constraint = self.perturbation.constraint
        self.clean = self.victim(self.without())
        self.module = self.model(data.train.inputs)
        with torch.no_grad():
            for p, value in zip(self.module.parameters(), self.clean, strict=True):
                p.copy_(value)  # the attack starts where a victim of clean data is
        self.upper, self.lower = [self.perturbation.delta], list(self.module.parameters())

    def model(self, inputs: Tensor) -> nn.Linear:
        """One for rows like these."""
        like = {"device": inputs.device, "dtype": inputs.dtype}
        return nn.Linear(inputs.shape[1], self.classes, self.bias, **like)

    def encode(self, images: Tensor) -> Tensor:
        """What a linear victim is given of an image: its pixels."""
        return images

    def poisons(self, u: Values | None = None) -> Tensor:
        """The poisoned images."""
        return self.perturbation() if u is None else self.perturbation.inputs + u[0]

    def scores(self, inputs: Tensor, v: Values | None = None) -> Tensor:
        """Of every class, by the model v."""
        return linear(inputs, *(v or self.lower))

    def poisoned_loss(self, v: Values | None, u: Values | None) -> Tensor:
        """CE(train and poisons), the mean."""
        inputs = torch.cat([self.data.train.inputs, self.encode(self.poisons(u))])
        labels = torch.cat([self.data.train.labels, self.data.poisons.labels])
        return cross_entropy(self.scores(inputs, v), labels)

    def decayed(self, v: Values | None) -> Tensor:
        """Decay * ||W||^2."""
        return self.decay * (v or self.lower)[0].square().sum()

    def begin(self) -> None:
        """V goes on where it ended."""

    def draw(self) -> None:
        """All images, always."""

    def held_upper(self, graph: bool = False) -> contextlib.AbstractContextManager[object]:
        """Nothing is kept of u."""
        return contextlib.nullcontext()

    def victim(self, training: TrainingSet, weights: Tensor | None = None) -> Values:
        """A model trained from scratch to convergence, the same way for every row."""
        return fit(training.samples, self.classes, self.decay, self.bias, weights)

    def score(self, victim: Values) -> dict[str, float]:
        """What the attack did to a victim: here its share of wrong answers on the test images."""
        return {"error": wrong_share(victim, self.data.test)}

    # The rows.

    def with_poisons(self, inputs: Tensor, labels: Tensor | None = None) -> TrainingSet:
        """The training set with these poisons, by default with the labels they are given."""
        given = self.data.poisons.labels if labels is None else labels
        poisons = Samples(self.encode(inputs).detach(), given)
        return _set(joined(self.data.train, poisons), len(given))

    def without(self) -> TrainingSet:
        """No poison."""
        return _set(self.data.train, 0)

    def row(self, name: str) -> TrainingSet:
        """The training set of a simple row."""
        poisons = self.data.poisons
        if name == "clean":
            return self.without()
        if name == "trusted":
            return _set(self.data.trusted, 0)
        if name == "random":
            return self.with_poisons(self.random_images())
        if name == "flip":
            return self.with_poisons(poisons.inputs)
        assert name == "flip_in_place", name
        return self.flipped()

    def random_images(self) -> Tensor:
        """Noise, within what the attacker may do."""
        inputs = self.data.poisons.inputs
        return torch.rand(inputs.shape, generator=self.generator).to(inputs)

    def flipped(self) -> TrainingSet:
        """Training images with the labels of the poisons, which are their copies."""
        train, poisons = self.data.train, self.data.poisons
        labels, count = train.labels.clone(), len(poisons.labels)
        labels[:count] = poisons.labels
        is_poison = torch.arange(len(labels), device=labels.device) < count
        return TrainingSet(Samples(train.inputs, labels), is_poison)


def _set(samples: Samples, poisons: int) -> TrainingSet:
    order = torch.arange(len(samples.labels), device=samples.labels.device)
    return TrainingSet(samples, order >= len(order) - poisons)
