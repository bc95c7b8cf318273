"""Tables of the UCI repository, made binary.

The files of github.com/treforevans/uci_datasets (MIT), at a fixed commit; each table's own terms
are on its page at the UCI repository.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from examples.data.mirrors import Mirror, fetched

ADDRESS = (
    "https://raw.githubusercontent.com/treforevans/uci_datasets/"
    "f0737523712fe66a1640e4b980b927e8490b58eb/uci_datasets/"
)
UCI = {
    "breastcancer": "2513d5f1037967b10e34972e0bf2ae3a57cf6b2d3a250b2001da10115db4f8e1",
    "gas": "bd82bee47199d3952bee30a59739794b26baa742e1da7f7bd42b9a34552321a1",
}


def uci(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the table ``name`` all columns but the last, and whether that is above its median.

    Returns:
        Float64 (N, columns), as they stand in the file, and int64 (N,) of 0 and 1: breastcancer
        (194, 33), gas (2565, 128).
    """
    path = folder / f"treforevans_{name}.csv.gz"
    if not path.exists():
        mirror = Mirror(f"{ADDRESS}{name}/", {"data.csv.gz": f"sha256:{UCI[name]}"})
        path = fetched(folder / name, mirror)["data.csv.gz"]
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    target = table[:, -1]
    return table[:, :-1], (target > np.median(target)).astype(int)
