"""MNIST: 70,000 handwritten digits of 28 x 28 grey pixels, in 10 classes.

The four original files of LeCun, Cortes and Burges, from the mirror that PyTorch keeps. Licence:
CC BY-SA 3.0 is commonly given.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.data.mirrors import Mirror, fetched

MIRROR = Mirror(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        f"{name}-ubyte.gz": f"sha256:{value}"
        for name, value in {
            "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        }.items()
    },
)


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """All images as rows of 784 numbers, float32 in [0, 1], and their labels, int64.

    The first 60,000 of 70,000 are for training.
    """
    paths = fetched(folder, MIRROR)

    def values(kind: str, header: int) -> np.ndarray:
        parts = []
        for name, path in paths.items():
            if kind in name:
                with gzip.open(path) as file:
                    parts.append(np.frombuffer(file.read(), np.uint8, offset=header))
        return np.concatenate(parts)

    pixels = torch.from_numpy(values("images", 16).reshape(-1, 784)).float() / 255
    return pixels, torch.from_numpy(values("labels", 8)).long()
