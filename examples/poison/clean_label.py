"""Clean label: one image that keeps its right label makes the victim err on one target.

    min over u in [0, 1]  f(u, v) = CE(v; phi(t), the other class) + ||phi(u) - phi(t)||^2
                                    + beta ||u - b||^2
    where v minimises     g(u, v) = CE(v; features of train and (phi(u), label of b)) + 1e-4 ||W||^2

phi is a small network, trained on other classes and frozen (``features.py``); v a linear softmax
on it. t is a test image that a clean victim tells right; the base b is the training image of the
other class with the nearest features, and u begins there. Published on dogs and fish with
InceptionV3, 2,048 features, beta = 0.01 and no decay of W; here two classes of mini-ImageNet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.poison.attack import Attack, Data, TrainingSet
from examples.poison.features import Features
from examples.poison.victim import Samples, fit, wrong_share
from examples.shared.task import Values

DECAY, BETA = 1e-4, 1e-2


class Pair(NamedTuple):
    """Images of two classes in [0, 1], and what the frozen network makes of them."""

    train: Samples
    test: Samples
    phi: Features
    train_features: Samples
    test_features: Samples
    trusted_features: Samples


@torch.no_grad()
def encode(phi: Features, part: Samples) -> Samples:
    """The features of images."""
    return Samples(torch.cat([phi(x) for x in part.inputs.split(256)]), part.labels)


class CleanLabel(Attack):
    """The two losses, for one target."""

    measure = "success"
    decay = DECAY
    bias = True
    rows = ("clean", "trusted", "random", "base")

    def __init__(self, pair: Pair, seed: int, target: int) -> None:
        self.phi = pair.phi
        train, test, trusted = pair.train_features, pair.test_features, pair.trusted_features
        clean = fit(train, 2, DECAY, self.bias)
        told = clean[0].mm(test.inputs.T).T.add(clean[1]).argmax(1)
        right = (told == test.labels).nonzero().flatten()
        if target >= len(right):
            raise SystemExit(
                f"--targets asks for more than the {len(right)} test images that a clean victim "
                f"tells right (seed {seed})"
            )
        order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
        chosen = right[order.to(right.device)[target]]
        self.target = Samples(test.inputs[chosen, None], test.labels[chosen, None])
        others = (train.labels != self.target.labels).nonzero().flatten()
        distances = (train.inputs[others] - self.target.inputs).square().sum(1)
        base = others[distances.argmin()]
        self.images, self.shown = pair.train.inputs, pair.test.inputs[chosen]
        label = train.labels[base, None]
        poison = Samples(pair.train.inputs[base, None], label)
        super().__init__(Data(train, self.target, test, trusted, poison, label), seed)

    def encode(self, images: Tensor) -> Tensor:
        """Phi."""
        return self.phi(images)

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        """CE(target, the other class) + |phi(u) - phi(target)|^2 + beta |u - base|^2."""
        poison, base = self.poisons(u), self.perturbation.inputs
        wrong = cross_entropy(self.scores(self.target.inputs, v), 1 - self.target.labels)
        collision = (self.encode(poison) - self.target.inputs).square().sum()
        return wrong + collision + BETA * (poison - base).square().sum()

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: object = None
    ) -> Tensor:
        """CE(train and poison) + decay ||W||^2."""
        return self.poisoned_loss(v, u) + self.decayed(v)

    def score(self, victim: Values) -> dict[str, float]:
        """Is the target told wrong (1) or not (0), and the error on all test images."""
        return {"success": wrong_share(victim, self.target)} | super().score(victim)

    def row(self, name: str) -> TrainingSet:
        """The base once more, or another image of its class, with a label that is right."""
        if name == "base":
            return self.with_poisons(self.data.poisons.inputs)
        if name == "random":
            same = (self.data.train.labels == self.data.truth).nonzero().flatten().cpu()
            place = same[torch.randint(len(same), (1,), generator=self.generator)]
            return self.with_poisons(self.images[place.to(self.images.device)])
        return super().row(name)


def split(
    images: Tensor, labels: Tensor, seed: int, shares: tuple[float, float, float]
) -> list[Samples]:
    """Parts of both classes with these shares of their images, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    for label in (0, 1):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(share * len(members)) for share in shares[:2]]
        cut = members.split([*sizes, len(members) - sum(sizes)])
        for part, rows in zip(parts, cut, strict=True):
            part.append(rows)
    return [Samples(images[torch.cat(part)], labels[torch.cat(part)]) for part in parts]
