"""The rows of the table that learn no weights, and the training with which every row ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.denoise.formulation import BATCH
from examples.denoise.problem import Problem, make_model

# Epochs over the kept and the clean images, by row: the best test accuracy of 2, 5, 10, 20, 40
# (validation: 20, 50, 100) on seeds 100 and 101 of MNIST, the MLP, 50 % noise, never on those
# reported. A model that trains on wrong labels must stop early, one that is to tell them sooner.
EPOCHS = {"validation": 100, "noisy": 10, "filter": 5}
OTHERS = 40


def epochs_of(row: str, share: float = 1.0) -> int:
    """Of a row's plain training, by a share of the tuned number; "filter" is self_filter's own."""
    return max(1, round(share * EPOCHS.get(row, OTHERS)))


def fit(problem: Problem, kept: Tensor, epochs: int) -> nn.Module:
    """How every row ends: a fresh network, by Adam, on the images kept and the clean ones.

    Args:
        problem: the data.
        kept: which of the noisy images, a mask (N,).
        epochs: over these images.
    """
    images = torch.cat([problem.images[kept], problem.clean_images])
    labels = torch.cat([problem.labels[kept], problem.clean_labels])
    model = make_model(problem, problem.seed + 1000)
    rule = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(problem.seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            rule.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            rule.step()
    return model


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Scores of all images, in parts that fit into memory."""
    return torch.cat([model(part) for part in images.split(2000)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images told right."""
    return (outputs(model, images).argmax(1) == labels).float().mean().item()


def _agrees(model: nn.Module, problem: Problem) -> Tensor:
    return (outputs(model, problem.images).argmax(1) == problem.labels).float()


# Each gives a score in [0, 1] per noisy image; above one half it says "this label is right".
# ``share``: of the epochs of its own training.


def validation(problem: Problem, share: float = 1.0) -> Tensor:
    """The clean images alone."""
    return torch.zeros(len(problem.labels), device=problem.labels.device)


def noisy(problem: Problem, share: float = 1.0) -> Tensor:
    """Everything, as if all labels were right."""
    return torch.ones(len(problem.labels), device=problem.labels.device)


def agreement(problem: Problem, share: float = 1.0) -> Tensor:
    """What a model of the clean images agrees with."""
    return _agrees(
        fit(problem, validation(problem).bool(), epochs_of("validation", share)), problem
    )


def self_filter(problem: Problem, share: float = 1.0) -> Tensor:
    """What a model of everything, stopped early, agrees with."""
    return _agrees(fit(problem, noisy(problem).bool(), epochs_of("filter", share)), problem)


def oracle(problem: Problem, share: float = 1.0) -> Tensor:
    """Exactly the right labels: what no method can know."""
    return problem.is_right.float()


ROWS: dict[str, Callable[[Problem, float], Tensor]] = {
    "validation": validation,
    "noisy": noisy,
    "agreement": agreement,
    "self_filter": self_filter,
    "oracle": oracle,
}
