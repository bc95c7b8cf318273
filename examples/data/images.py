"""Images of several data sets: their form, and pictures out of a zip."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class LabelledImages(NamedTuple):
    """Images and the class of each."""

    images: Tensor
    """(N, C, H, W), uint8."""
    labels: Tensor
    """(N,), int64, from 0."""


def labelled(images: np.ndarray, labels: np.ndarray) -> LabelledImages:
    """Of arrays (N, C, H, W) and (N,).

    Raises:
        ValueError: they are not of such a form, or not equally many.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images {images.dtype} {images.shape} and labels {labels.shape}: "
            "they should be uint8 (N, C, H, W) and (N,)"
        )
    contiguous = torch.from_numpy(np.ascontiguousarray(images))
    return LabelledImages(contiguous, torch.from_numpy(labels.astype(np.int64)))


def to_float(images: Tensor) -> Tensor:
    """From 0, ..., 255 to float32 in [0, 1]."""
    return images.float() / 255


def pictures(archive: Path, names: Sequence[str]) -> Iterator[Image.Image]:
    """The pictures ``names`` of a zip, in this order, with a progress bar."""
    with zipfile.ZipFile(archive) as file:
        for name in tqdm(names, desc=archive.name, unit="image"):
            with Image.open(io.BytesIO(file.read(name))) as picture:
                yield picture


def rgb(archive: Path, names: Sequence[str], side: int) -> np.ndarray:
    """Square colour pictures of a zip, uint8 (N, 3, side, side).

    Raises:
        ValueError: a picture has another size.
    """
    images = np.empty((len(names), 3, side, side), np.uint8)
    for place, (name, picture) in enumerate(zip(names, pictures(archive, names), strict=True)):
        if picture.size != (side, side):
            raise ValueError(f"{name} of {archive} is {picture.size}, should be {side} x {side}")
        images[place] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    return images
