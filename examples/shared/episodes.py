"""Tasks of few-shot learning: images of a few classes, some to fit a head, others to judge it.

Images of a task come class by class; several tasks lie along the first dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def drawn(
    classes: int, per_class: int, count: int, each: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``count`` different classes, and ``each`` different images of every one.

    Args:
        classes: of the data.
        per_class: images of each.
        count: classes to draw.
        each: images of each to draw.
        generator: of random numbers; None: torch's own.

    Returns:
        Indices that together address images (classes, per_class, ...): (count, 1), (count, each).
    """
    chosen = torch.randperm(classes, generator=generator)[:count]
    order = torch.rand(count, per_class, generator=generator).argsort(1)[:, :each]
    return chosen[:, None], order


def mean_cross_entropy(scores: Tensor, ways: int) -> Tensor:
    """Over all tasks and images; ``scores`` are (tasks, ways * each, ways)."""
    tasks, images, _ = scores.shape
    labels = class_by_class(ways, images // ways, scores.device).repeat(tasks)
    return cross_entropy(scores.flatten(0, 1), labels)


def class_by_class(ways: int, each: int, device: torch.device | None = None) -> Tensor:
    """The labels of one task, (ways * each,)."""
    return torch.arange(ways, device=device).repeat_interleave(each)
