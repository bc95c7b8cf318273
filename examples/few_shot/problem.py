"""The data of ``few_shot``: classes to learn from, classes never seen, and tasks drawn from them.

Omniglot: 1,623 characters in an order drawn once, the first 1,200 to learn from, 423 for tests,
each turned by 0, 90, 180 and 270 degrees: 4,800 and 1,692 classes of 20 images, 28 x 28, ink 1.
(The published order is that of somebody's folder.)

Mini-ImageNet: 64, 16 and 20 classes, 84 x 84, colours in [0, 1], as many images per class as the
archive has (100 in the small one, 600 published).

With ``validation`` knobs can be chosen: test classes are then the last 100 of the 1,200 characters,
which are not learned from, or mini-ImageNet's 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.data.images import to_float
from examples.data.miniimagenet import miniimagenet
from examples.data.mirrors import default_folder
from examples.data.omniglot import omniglot
from examples.shared.episodes import drawn

LEARNED, HELD_OUT = 1200, 100
POOL = 100  # test classes that the looks along a run draw from


class Split(NamedTuple):
    """Images (classes, per class, channels, height, width): uint8, or bool where they are ink."""

    learned: Tensor
    unseen: Tensor


class Size(NamedTuple):
    """Of a task: classes, and images of each to fit a head and to judge it."""

    ways: int
    shots: int
    queries: int


class Images(NamedTuple):
    """Of several tasks, float, class by class, the first dimension over tasks and images."""

    support: Tensor
    query: Tensor


class Tasks(NamedTuple):
    """Indices (tasks, ways, 1) of classes and (tasks, ways, shots + queries) of images."""

    classes: Tensor
    images: Tensor


def load(dataset: str, data_dir: Path | None, validation: bool = False) -> Split:
    """The classes to learn from, and those to judge by.

    Args:
        dataset: "omniglot" or "miniimagenet".
        data_dir: a folder of data sets.
        validation: hold back test classes.
    """
    folder = default_folder(dataset, data_dir)
    if dataset == "miniimagenet":
        unseen = "val" if validation else "test"
        return Split(miniimagenet(folder, "train").images, miniimagenet(folder, unseen).images)
    bits = omniglot(folder).bits.unsqueeze(2)
    order = torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))
    learned = order[: LEARNED - HELD_OUT * validation]
    unseen = order[LEARNED - HELD_OUT : LEARNED] if validation else order[LEARNED:]
    return Split(turned(bits[learned]), turned(bits[unseen]))


def turned(images: Tensor) -> Tensor:
    """By 0, 90, 180 and 270 degrees, each a class of its own."""
    return torch.cat([images.rot90(quarters, (-2, -1)) for quarters in range(4)])


def prepared(images: Tensor, device: torch.device) -> Tensor:
    """(n, channels, height, width), float in [0, 1], as convolutions like them on a CPU."""
    there = images.to(device)
    values = there.float() if there.dtype == torch.bool else to_float(there)
    return values.contiguous(memory_format=torch.channels_last)


def tasks_of(images: Tensor, size: Size, count: int, generator: torch.Generator) -> Tasks:
    """``count`` tasks; one may have classes of another, as they are drawn independently."""
    each = size.shots + size.queries
    classes, there = images.shape[:2]
    pairs = [drawn(classes, there, size.ways, each, generator) for _ in range(count)]
    return Tasks(*(torch.stack(indices) for indices in zip(*pairs, strict=True)))


def test_tasks(split: Split, size: Size, count: int) -> Tasks:
    """The same for all methods and seeds."""
    return tasks_of(split.unseen, size, count, torch.Generator().manual_seed(1))


def meta_batch(
    images: Tensor, size: Size, count: int, generator: torch.Generator, device: torch.device
) -> Images:
    """``count`` tasks without a class in common, as published, ready for the encoder."""
    each = size.shots + size.queries
    classes, there = images.shape[:2]
    chosen = images[drawn(classes, there, count * size.ways, each, generator)]
    support, query = chosen[:, : size.shots], chosen[:, size.shots :]
    return Images(*(prepared(part.flatten(0, 1), device) for part in (support, query)))


def check(split: Split, size: Size, count: int) -> None:
    """Raise ``SystemExit`` for tasks that the data cannot have."""
    for name, images, classes in (
        ("--meta-batch * --ways", split.learned, count * size.ways),
        ("--ways", split.unseen, size.ways),
    ):
        if classes > len(images):
            raise SystemExit(f"{name} asks for {classes} classes; there are {len(images)}")
    there = split.learned.shape[1]
    if size.shots + size.queries > there:
        raise SystemExit(
            f"--shots {size.shots} and --queries {size.queries} ask for more than the {there} "
            "images of a class"
        )
