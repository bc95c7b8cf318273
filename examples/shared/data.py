"""Data of the examples: a folder of shared data beside the checkout, else a download by hash."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import requests
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import fetch_20newsgroups
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


class Mirror(NamedTuple):
    """Where files can be had, and the SHA-256 of each."""

    address: str
    hashes: dict[str, str]


MNIST = Mirror(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {  # the original files
        f"{name}-ubyte.gz": f"sha256:{value}"
        for name, value in {
            "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        }.items()
    },
)
_UCI = "https://raw.githubusercontent.com/treforevans/uci_datasets/"
_UCI += "f0737523712fe66a1640e4b980b927e8490b58eb/uci_datasets/"
UCI = {
    "breastcancer": "2513d5f1037967b10e34972e0bf2ae3a57cf6b2d3a250b2001da10115db4f8e1",
    "gas": "bd82bee47199d3952bee30a59739794b26baa742e1da7f7bd42b9a34552321a1",
}


def default_folder(name: str) -> Path:
    """The folder of shared data beside the checkout where there is one, else a user cache."""
    beside = BESIDE / name
    return beside if beside.is_dir() else Path(pooch.os_cache("torch_penalty_bilevel")) / name


def fetched(folder: Path, mirror: Mirror) -> dict[str, Path]:
    """Every file of ``mirror`` in ``folder``; those that it lacks are downloaded into it.

    Raises:
        SystemExit: a file is neither there nor to be had; the message says what to put where.
    """
    store = pooch.create(folder, mirror.address, registry=mirror.hashes)
    try:
        return {name: Path(store.fetch(name)) for name in mirror.hashes}
    except (requests.RequestException, OSError, ValueError) as error:
        raise SystemExit(
            f"the data are not complete in {folder} and could not be downloaded from "
            f"{mirror.address}\n({error})\nPut these files there, or name the folder that "
            f"has them: {', '.join(mirror.hashes)}"
        ) from error


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """All 70,000 images as rows of 784 numbers in [0, 1], the first 60,000 for training; labels."""
    paths = fetched(folder, MNIST)

    def values(kind: str, header: int) -> np.ndarray:
        parts = []
        for name, path in paths.items():
            if kind in name:
                with gzip.open(path) as file:
                    parts.append(np.frombuffer(file.read(), np.uint8, offset=header))
        return np.concatenate(parts)

    pixels = torch.from_numpy(values("images", 16).reshape(-1, 784)).float() / 255
    return pixels, torch.from_numpy(values("labels", 8)).long()


def newsgroups(
    folder: Path, features: int
) -> tuple[csr_matrix, np.ndarray, csr_matrix, np.ndarray]:
    """20 Newsgroups, split by date: (training rows, groups, test rows, groups).

    TF-IDF, logarithmic in the counts, of the ``features`` most frequent words of the training
    posts, without English stop words. ``folder`` holds the archive ``20news-bydate.tar.xz``, else
    scikit-learn downloads the posts into it.
    """
    archive = folder / "20news-bydate.tar.xz"
    posts = _posts(archive) if archive.exists() else _downloaded(folder)
    (train, train_groups), (test, test_groups) = posts
    vectors = TfidfVectorizer(max_features=features, sublinear_tf=True, stop_words="english")
    rows = vectors.fit_transform(train), vectors.transform(test)
    groups = np.unique(train_groups)
    labels = [np.searchsorted(groups, names) for names in (train_groups, test_groups)]
    return rows[0], labels[0], rows[1], labels[1]


def _downloaded(folder: Path) -> list[tuple[list[str], list[str]]]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts = [fetch_20newsgroups(data_home=folder, subset=part) for part in ("train", "test")]
    except OSError as error:
        raise SystemExit(
            f"scikit-learn could not download 20 Newsgroups\n({error})\nPut 20news-bydate.tar.xz, "
            f"with the folders 20news-bydate-train and 20news-bydate-test, into {folder}, or name "
            "the folder that has it"
        ) from error
    return [(part.data, [part.target_names[i] for i in part.target]) for part in parts]


def _posts(archive: Path) -> list[tuple[list[str], list[str]]]:
    found: dict[str, tuple[list[str], list[str]]] = {"train": ([], []), "test": ([], [])}
    with tarfile.open(archive) as file:
        for member in file:
            if member.isfile():
                top, group, _ = member.name.split("/")
                content = file.extractfile(member)
                assert content is not None
                texts, groups = found[top.removeprefix("20news-bydate-")]
                texts.append(content.read().decode("latin-1"))
                groups.append(group)
    return list(found.values())


def uci(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A UCI table made binary: its columns but the last, and whether that is above its median."""
    path = folder / f"treforevans_{name}.csv.gz"
    if not path.exists():
        mirror = Mirror(f"{_UCI}{name}/", {"data.csv.gz": f"sha256:{UCI[name]}"})
        path = fetched(folder / name, mirror)["data.csv.gz"]
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    target = table[:, -1]
    return table[:, :-1], (target > np.median(target)).astype(int)
