"""Features of test tasks, and how sure their mean accuracy is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from examples.few_shot.encoders import Statistics, normalised_by
from examples.few_shot.formulation import Features
from examples.few_shot.problem import Images, Tasks, prepared

CHUNK = 320


@torch.no_grad()
def embedded(
    encoder: nn.Module,
    images: Tensor,
    tasks: Tasks,
    shots: int,
    statistics: Statistics | None,
) -> Features:
    """Phi of the images of ``tasks``, (tasks, ways * each, features).

    Args:
        encoder: phi.
        images: (classes, per class, ...).
        tasks: which.
        shots: images of a class in the support set; the others are the query set.
        statistics: "running": of training, then each image is seen once, whatever the tasks;
            "batch": of the support set for it, of the query set of the task for that; None: of the
            task's support set for both.
    """
    if statistics == "running":
        return _one_by_one(encoder, images, tasks, shots)
    parts: list[Features] = []
    for task in each_task(images, tasks, shots, encoder):
        if statistics == "batch":
            with normalised_by(encoder, "batch"):
                parts.append(Features(encoder(task.support), encoder(task.query)))
        else:
            count = len(task.support)
            with normalised_by(encoder, count):
                both = encoder(torch.cat(task))
            parts.append(Features(both[:count], both[count:]))
    return Features(*(torch.stack(part) for part in zip(*parts, strict=True)))


def each_task(images: Tensor, tasks: Tasks, shots: int, encoder: nn.Module) -> Iterator[Images]:
    """The images of one task after another, where ``encoder`` is."""
    device = next(encoder.parameters()).device
    for classes, chosen in zip(*tasks, strict=True):
        own = images[classes, chosen]
        parts = own[:, :shots].flatten(0, 1), own[:, shots:].flatten(0, 1)
        yield Images(*(prepared(part, device) for part in parts))


def _one_by_one(encoder: nn.Module, images: Tensor, tasks: Tasks, shots: int) -> Features:
    device = next(encoder.parameters()).device
    places, back = (tasks.classes * images.shape[1] + tasks.images).unique(return_inverse=True)
    pool = images.flatten(0, 1)
    with normalised_by(encoder, "running"):
        chunks = [encoder(prepared(pool[part], device)) for part in places.split(CHUNK)]
    phi = torch.cat(chunks)[back.to(device)]
    return Features(phi[:, :, :shots].flatten(1, 2), phi[:, :, shots:].flatten(1, 2))


def mean_and_interval(accuracies: Tensor) -> tuple[float, float]:
    """The mean over tasks, and half its 95 % interval, 1.96 s / sqrt(tasks)."""
    spread = accuracies.std(correction=1) if len(accuracies) > 1 else torch.tensor(math.nan)
    return accuracies.mean().item(), 1.96 * spread.item() / len(accuracies) ** 0.5
