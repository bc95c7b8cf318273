"""Omniglot: 1,623 handwritten characters of 50 alphabets, each by 20 drawers.

The original zips of github.com/brendenlake/omniglot (MIT) at a fixed commit, or their 28 x 28
pixels as bits. Lake, Salakhutdinov and Tenenbaum (2015), "Human-level concept learning through
probabilistic program induction".
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.data.cache import cached
from examples.data.images import pictures
from examples.data.mirrors import Mirror, fetched

BITS = "omniglot_28x28_bits.npz"
BACKGROUND, EVALUATION = "images_background.zip", "images_evaluation.zip"
MIRROR = Mirror(
    "https://raw.githubusercontent.com/brendenlake/omniglot/"
    "057f034baf2ecb8530bc5710e5a23584d2a519cc/python/",
    {
        BACKGROUND: "sha256:ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
        EVALUATION: "sha256:1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    },
)
DRAWERS, SIDE = 20, 28


class Omniglot(NamedTuple):
    """Characters by name: "Alphabet/characterNN", in alphabetical order."""

    bits: Tensor
    """(1623, 20, 28, 28), bool: is there ink? Images of a character are in the drawers' order."""
    names: tuple[str, ...]
    is_evaluation: Tensor
    """(1623,), bool: of the 20 evaluation alphabets (659 characters), not the 30 background."""


def omniglot(folder: Path) -> Omniglot:
    """All characters, from the bits where ``folder`` has them, else from the original zips."""
    if (folder / BITS).exists():
        with np.load(folder / BITS, allow_pickle=False) as file:
            bits = np.unpackbits(file["bits"], axis=-1).reshape(-1, DRAWERS, SIDE, SIDE)
            return _sorted(bits, file["classes"], file["is_evaluation"])
    paths = fetched(folder, MIRROR)
    parts = [read(paths[name]) for name in (BACKGROUND, EVALUATION)]
    bits, names = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _sorted(bits, names, np.arange(len(names)) >= len(parts[0][1]))


def read(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """The characters of one original zip: bits (N, 20, 28, 28), names (N,).

    A picture of 105 x 105 black and white pixels shrinks by taking the nearest pixel, as in the
    preprocessing of MAML, whose resize of such pictures can do no other.

    Raises:
        ValueError: a character has not 20 images.
    """
    with zipfile.ZipFile(archive) as file:
        members = sorted(name for name in file.namelist() if name.endswith(".png"))
    found = ["/".join(member.split("/")[-3:-1]) for member in members]
    names, counts = np.unique(found, return_counts=True)
    if (counts != DRAWERS).any():
        wrong = names[counts != DRAWERS][0]
        raise ValueError(f"{wrong} of {archive} has not {DRAWERS} images: not an original zip")
    order = np.argsort(found, kind="stable")

    def decode() -> dict[str, np.ndarray]:
        small = [
            ~np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), dtype=bool)
            for picture in pictures(archive, [members[i] for i in order])
        ]
        return {"bits": np.stack(small).reshape(-1, DRAWERS, SIDE, SIDE)}

    return cached(archive, "ink-28x28", decode)["bits"], names


def _sorted(bits: np.ndarray, names: np.ndarray, is_evaluation: np.ndarray) -> Omniglot:
    order = np.argsort(names)
    return Omniglot(
        torch.from_numpy(bits[order].astype(bool)),
        tuple(names[order].tolist()),
        torch.from_numpy(is_evaluation[order]),
    )
