"""Mini-ImageNet: colour photographs of 84 x 84 pixels, 100 classes of 600.

The split of Ravi and Larochelle (2017), "Optimization as a model for few-shot learning": 64
classes to train on, 16 for validation, 20 for tests. The lists of its images are from their
repository (MIT). The images are ImageNet's, for non-commercial research only; they are not
downloaded: no public archive of them has a hash that is known.
"""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.data.cache import Arrays, cached
from examples.data.images import rgb
from examples.data.mirrors import Mirror, absent, fetched

SPLITS = ("train", "val", "test")
ZIPS = ("miniimagenet.zip", "miniimagenet_first100perclass.zip")
LISTS = Mirror(
    "https://raw.githubusercontent.com/twitter-research/meta-learning-lstm/"
    "0cffa2481619ce643d0951bd637bf05b23ef827a/data/miniImagenet/",
    {
        f"{name}.csv": f"sha256:{value}"
        for name, value in {
            "train": "498519cd8e49ce97ed26a4a3638966698ae41ab35e9c68538319fc9b46ba7d2f",
            "val": "5658a59921ca027ee76af92949869c5d6f41d77592ff3b18db325a9d10c893b9",
            "test": "2b7cfa78342995761a572a8158e539bc4e0a80f9bbd7d00c1e17a460fbbb93fa",
        }.items()
    },
)
SIDE = 84


class ClassImages(NamedTuple):
    """Equally many images of each class of a split."""

    images: Tensor
    """(classes, images of each, 3, 84, 84), uint8; in the order of the split's list."""
    names: tuple[str, ...]
    """WordNet's name of each class, as n01532829; in alphabetical order."""


def miniimagenet(folder: Path, split: str, per_class: int | None = None) -> ClassImages:
    """The first ``per_class`` images of each class of ``split``, all by default.

    ``folder`` holds a zip of JPEG files, in whatever folders, named as in the lists; all means as
    many as the class has with the fewest in it. Only the images asked for are decoded.

    Args:
        folder: with ``miniimagenet.zip``, or ``miniimagenet_first100perclass.zip``.
        split: "train", "val" or "test".
        per_class: how many.

    Raises:
        SystemExit: no zip; the message says what to put where.
        ValueError: no such split, or fewer images of a class than asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
    there = [folder / name for name in ZIPS if (folder / name).exists()]
    if not there:
        what = [f"{ZIPS[0]}, with the 84 x 84 JPEG files that {LISTS.address}{split}.csv names"]
        reason = "for non-commercial research only, so there is no public download"
        raise absent(folder, what, "ImageNet, https://image-net.org", reason)
    chosen = _chosen(there[0], fetched(folder, LISTS)[f"{split}.csv"], per_class)
    members = [member for mine in chosen.values() for member in mine]
    count = len(members) // len(chosen)

    def decode() -> Arrays:
        return {"images": rgb(there[0], members, SIDE)}

    images = cached(there[0], f"{split}-{count}", decode)["images"]
    shape = len(chosen), count, 3, SIDE, SIDE
    return ClassImages(torch.from_numpy(images).view(shape), tuple(chosen))


def _chosen(archive: Path, listed: Path, per_class: int | None) -> dict[str, list[str]]:
    """Members of the zip by class, equally many of each."""
    with zipfile.ZipFile(archive) as file:
        place = {name.split("/")[-1]: name for name in file.namelist()}
    found: dict[str, list[str]] = {}
    with listed.open(newline="") as lines:
        for row in csv.DictReader(lines):
            mine = found.setdefault(row["label"], [])
            if row["filename"] in place:
                mine.append(place[row["filename"]])
    fewest = min(found, key=lambda name: len(found[name]))
    there = len(found[fewest])
    count = there if per_class is None else per_class
    if not 0 < count <= there:
        raise ValueError(f"per_class={per_class}: {archive} has {there} images of {fewest}")
    return {name: found[name][:count] for name in sorted(found)}
