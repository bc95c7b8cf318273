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
    problem: Problem, scores: Tensor, row: str, how: Training, seed: int | None = None
) -> nn.Module:
    """How every row ends: a fresh network, by Adam, on the images kept and the clean ones.

    Args:
        problem: the data.
        scores: of the noisy images (N,), in [0, 1] or a mask; kept are those above one half, or
            all, with their score for a weight, where this data set has it so.
        row: whose, for the number of epochs and the decay.
        how: rates, epochs and decay of this data set.
        seed: of the network; by default another one than where learned weights began.
    """
    kept = scores > (0.0 if how.weighted else 0.5)
    images = torch.cat([problem.images[kept], problem.clean_images])
    ones = torch.ones(len(problem.clean_labels), device=images.device)
    weights = torch.cat([scores[kept].to(ones.dtype), ones])
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
            found, given = model(images[rows]), labels[rows]
            if how.weighted:
                w = weights[rows]
                loss = w @ cross_entropy(found, given, reduction="none") / w.sum()
            else:
                loss = cross_entropy(found, given)
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
