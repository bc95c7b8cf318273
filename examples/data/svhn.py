"""SVHN, cropped: colour photographs of house numbers, 32 x 32 pixels around a digit.

73,257 training and 26,032 test images in 10 classes, the digits. The original files of Netzer et
al. (2011), "Reading digits in natural images with unsupervised feature learning". The
files state no licence; non-commercial use only is commonly given.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from examples.data.images import LabelledImages, labelled
from examples.data.mirrors import Mirror, fetched

MIRROR = Mirror(
    "http://ufldl.stanford.edu/housenumbers/",
    {
        f"{name}_32x32.mat": f"sha256:{value}"
        for name, value in {
            "train": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            "test": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        }.items()
    },
)


def svhn(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """(Training, test) images, uint8 (N, 3, 32, 32), and labels: the digit in the middle."""
    paths = fetched(folder, MIRROR)
    return read(paths["train_32x32.mat"]), read(paths["test_32x32.mat"])


def read(path: Path) -> LabelledImages:
    """One original file: X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0.

    Raises:
        ValueError: its arrays are not so.
    """
    file = loadmat(path, variable_names=("X", "y"))
    labels = file["y"].reshape(-1).astype(np.int64)
    if file["X"].shape[:3] != (32, 32, 3) or not np.isin(labels, range(1, 11)).all():
        raise ValueError(
            f"{path} is not of SVHN's cropped digits: X is {file['X'].shape}, should be "
            f"(32, 32, 3, N); y is {labels.min()} to {labels.max()}, should be 1 to 10"
        )
    return labelled(file["X"].transpose(3, 2, 0, 1), labels % 10)
