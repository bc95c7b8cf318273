"""Dogfish: photographs of dogs and of fish, 900 + 900 to train on and 300 + 300 for tests.

The file of Koh and Liang (2017), "Understanding black-box predictions via influence functions",
from their CodaLab worksheet. The images are ImageNet's, for non-commercial research only. No hash
of the file is known, so it is not downloaded.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from examples.data.cache import Arrays, cached
from examples.data.images import LabelledImages, labelled
from examples.data.mirrors import absent

CLASSES = ("dog", "fish")
FILE = "dataset_dog-fish_train-900_test-300.npz"
ADDRESS = "https://worksheets.codalab.org/rest/bundles/0x550cd344825049bdbb865b887381823c/"


def dogfish(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """(Training, test) images, uint8 (N, 3, 299, 299), and labels: places in ``CLASSES``.

    Raises:
        SystemExit: no file; the message says what to put where.
        ValueError: its arrays are not as in the original.
    """
    path = folder / FILE
    if not path.exists():
        reason = "for non-commercial research only, and no hash is known"
        raise absent(folder, [FILE], f"{ADDRESS}contents/blob/{FILE}", reason)
    arrays = cached(path, "uint8", lambda: read(path))
    return (
        labelled(arrays["X_train"], arrays["Y_train"]),
        labelled(arrays["X_test"], arrays["Y_test"]),
    )


def read(path: Path) -> Arrays:
    """X_train, Y_train, X_test and Y_test: X (N, H, W, 3) in [-1, 1] becomes uint8 (N, 3, H, W).

    Image by image, since the file holds float64: 4 GB of training images. The pixel p of 0, ...,
    255 is stored as 2 (p / 255 - 1 / 2).
    """
    with zipfile.ZipFile(path) as file, np.load(path, allow_pickle=False) as arrays:
        found: Arrays = {}
        for split in ("train", "test"):
            with file.open(f"X_{split}.npy") as images:
                found[f"X_{split}"] = _pixels(images, f"X_{split} of {path}")
            labels = arrays[f"Y_{split}"]
            if not np.isin(labels, (0, 1)).all():
                raise ValueError(f"Y_{split} of {path} has labels that are neither 0 nor 1")
            found[f"Y_{split}"] = labels.astype(np.int64)
    return found


def _pixels(file: IO[bytes], name: str) -> np.ndarray:
    header = np.lib.format
    first = header.read_magic(file) == (1, 0)
    read_header = header.read_array_header_1_0 if first else header.read_array_header_2_0
    shape, is_fortran, kind = read_header(file)
    if is_fortran or kind.kind != "f" or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{name} is {kind} {shape}, should be float (N, H, W, 3)")
    images = np.empty((shape[0], 3, *shape[1:3]), np.uint8)
    size = kind.itemsize * int(np.prod(shape[1:]))
    for image in tqdm(images, desc=name.split()[0], unit="image"):
        values = np.frombuffer(file.read(size), kind).reshape(shape[1:])
        pixels = (values / 2 + 0.5) * 255
        whole = pixels.round()
        # Rounding of float32 moves them by at most 1e-4.
        if not (abs(pixels - whole) < 1e-2).all() or whole.min() < 0 or whole.max() > 255:
            raise ValueError(f"{name} has values that are no pixels scaled to [-1, 1]")
        image[:] = whole.transpose(2, 0, 1)
    return images
