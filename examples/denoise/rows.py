"""The rows of the table that learn no weights, and the training with which every row ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.denoise.formulation import decay
from examples.denoise.problem import Problem, make_model
from examples.denoise.settings import Training
from examples.shared.solvers import anneal


def fit(
    problem: Problem, kept: Tensor, row: str, how: Training, seed: int | None = None
) -> nn.Module:
    """How every row ends: a fresh network, by Adam, on the images kept and the clean ones.

    Args:
        problem: the data.
        kept: which of the noisy images, a mask (N,).
        row: whose, for the number of epochs and the decay.
        how: rates, epochs and decay of this data set.
        seed: of the network; by default another one than where learned weights began.
    """
    images = torch.cat([problem.images[kept], problem.clean_images])
    labels = torch.cat([problem.labels[kept], problem.clean_labels])
    model = make_model(problem, problem.seed + 1000 if seed is None else seed)
    rule = torch.optim.Adam(model.parameters(), lr=how.rate)
    generator = torch.Generator().manual_seed(problem.seed)
    epochs, strength = how.epochs_of(row), how.decay_of(row)
    for epoch in range(epochs):
        if how.falls:
            anneal([rule], epoch / epochs)
        for rows in torch.randperm(len(labels), generator=generator).split(how.batch):
            rule.zero_grad()
            loss = cross_entropy(model(images[rows]), labels[rows])
            (loss + decay(model.parameters(), strength) if strength else loss).backward()
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
# ``how``: of its own training.


def validation(problem: Problem, how: Training) -> Tensor:
    """The clean images alone."""
    return torch.zeros(len(problem.labels), device=problem.labels.device)


def noisy(problem: Problem, how: Training) -> Tensor:
    """Everything, as if all labels were right."""
    return torch.ones(len(problem.labels), device=problem.labels.device)


def agreement(problem: Problem, how: Training) -> Tensor:
    """What a model of the clean images agrees with."""
    none = torch.zeros_like(problem.is_right)
    return _agrees(fit(problem, none, "validation", how), problem)


def self_filter(problem: Problem, how: Training) -> Tensor:
    """What a model of everything, stopped early, agrees with."""
    everything = torch.ones_like(problem.is_right)
    return _agrees(fit(problem, everything, "filter", how), problem)


def oracle(problem: Problem, how: Training) -> Tensor:
    """Exactly the right labels: what no method can know."""
    return problem.is_right.float()


ROWS: dict[str, Callable[[Problem, Training], Tensor]] = {
    "validation": validation,
    "noisy": noisy,
    "agreement": agreement,
    "self_filter": self_filter,
    "oracle": oracle,
}
