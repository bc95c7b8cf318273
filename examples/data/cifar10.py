"""CIFAR-10: colour photographs of 32 x 32 pixels in 10 classes, 50,000 and 10,000 for tests.

The original archive of Krizhevsky, or a zip of pictures in folders by split and class (10,000 of
the training images, all for tests). No licence is stated; cite Krizhevsky (2009), "Learning
multiple layers of features from tiny images".
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from examples.data.cache import Arrays, cached
from examples.data.images import LabelledImages, labelled, rgb
from examples.data.mirrors import Mirror, fetched

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ZIP = "cifar10_png_train10k_test10k.zip"
ARCHIVE = "cifar-10-python.tar.gz"
MIRROR = Mirror(
    "https://www.cs.toronto.edu/~kriz/",
    {ARCHIVE: "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
)
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def cifar10(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """(Training, test) images, uint8 (N, 3, 32, 32), and labels: places in ``CLASSES``.

    The original archive is read where ``folder`` has it, in its order; else the zip, class by
    class; where ``folder`` has neither, the archive is downloaded into it (163 MiB).
    """
    if (folder / ZIP).exists() and not (folder / ARCHIVE).exists():
        return _of_pictures(folder / ZIP)
    return _of_batches(fetched(folder, MIRROR)[ARCHIVE])


def _of_pictures(archive: Path) -> tuple[LabelledImages, LabelledImages]:
    def decode() -> Arrays:
        with zipfile.ZipFile(archive) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".png"))
        arrays: Arrays = {}
        for split in BATCHES:
            mine = [name for name in names if name.startswith(f"{split}/")]
            arrays[f"{split}_images"] = rgb(archive, mine, 32)
            labels = [CLASSES.index(name.split("/")[1]) for name in mine]
            arrays[f"{split}_labels"] = np.array(labels, np.int64)
        return arrays

    arrays = cached(archive, "by-class", decode)
    train, test = (labelled(arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in BATCHES)
    return train, test


def _of_batches(archive: Path) -> tuple[LabelledImages, LabelledImages]:
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(archive) as file:
        for member in file:
            name = member.name.removeprefix("cifar-10-batches-py/")
            if name in (*BATCHES["train"], *BATCHES["test"]):
                content = file.extractfile(member)
                assert content is not None
                found[name] = read_pickle(content)

    def joined(names: list[str]) -> LabelledImages:
        pixels = np.concatenate([found[name]["data"] for name in names])
        labels = np.concatenate([found[name]["labels"] for name in names])
        return labelled(pixels.reshape(-1, 3, 32, 32), labels)

    return joined(BATCHES["train"]), joined(BATCHES["test"])


_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # Numpy 2 has it elsewhere; the files were written by numpy 1.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Arrays(pickle.Unpickler):
    """Reads numbers, texts, lists and arrays; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array: not read")
        return _NUMPY[module, name]


def read_pickle(file: IO[bytes]) -> Any:
    """What a pickle of Python 2 holds, if that is arrays, numbers, texts and lists of them.

    Raises:
        pickle.UnpicklingError: it asks for any other object; nothing of it is run.
    """
    return _Arrays(file, encoding="latin1").load()
