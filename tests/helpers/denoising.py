"""Small problems of ``examples.denoise``."""

import torch

from examples.data.images import LabelledImages
from examples.denoise.problem import make_problem


def shapes(count, seed, side=28, channels=1):
    """Ten classes: a bright square of 5 x 5 whose place is the class, on noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (count, channels, side, side), generator=generator)
    labels = torch.arange(count) % 10
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[:, 5 + 12 * row : 10 + 12 * row, 2 + 5 * column : 6 + 5 * column] += 150
    return LabelledImages(images.to(torch.uint8), labels)


def problem(seed=0, *, model="linear", flip="uniform", train=400, clean=100, noise=0.5, **sizes):
    data = shapes(700, 0, **sizes), shapes(300, 1, **sizes)
    return make_problem(data, seed, model=model, train=train, clean=clean, noise=noise, flip=flip)
