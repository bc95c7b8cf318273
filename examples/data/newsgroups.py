"""20 Newsgroups, split by date: 11,314 training and 7,532 test posts in 20 groups.

The archive of Lang and Rennie, or scikit-learn's download of it. No licence is stated; the posts
are their authors'.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.datasets import fetch_20newsgroups
from sklearn.feature_extraction.text import TfidfVectorizer

from examples.data.mirrors import absent

ARCHIVE = "20news-bydate.tar.xz"


def newsgroups(
    folder: Path, features: int
) -> tuple[csr_matrix, np.ndarray, csr_matrix, np.ndarray]:
    """(Training rows, groups, test rows, groups); rows are sparse (N, features), float64.

    TF-IDF, logarithmic in the counts, of the ``features`` most frequent words of the training
    posts, without English stop words; a row has length 1, its numbers are in [0, 1]. Groups are
    0, ..., 19, by name. ``folder`` holds the archive ``20news-bydate.tar.xz``, else scikit-learn
    downloads the posts into it.
    """
    (train, train_groups), (test, test_groups) = raw_posts(folder)
    vectors = TfidfVectorizer(max_features=features, sublinear_tf=True, stop_words="english")
    rows = vectors.fit_transform(train), vectors.transform(test)
    groups = np.unique(train_groups)
    labels = [np.searchsorted(groups, names) for names in (train_groups, test_groups)]
    return rows[0], labels[0], rows[1], labels[1]


def raw_posts(folder: Path) -> list[tuple[list[str], list[str]]]:
    """(Posts, their groups) for training, and for testing; headers are part of a post.

    From ``folder``, as ``newsgroups``.
    """
    archive = folder / ARCHIVE
    return _posts(archive) if archive.exists() else _downloaded(folder)


def _downloaded(folder: Path) -> list[tuple[list[str], list[str]]]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [fetch_20newsgroups(data_home=folder, subset=part) for part in ("train", "test")]
    except OSError as error:
        reason = f"scikit-learn could not download 20 Newsgroups: {error}"
        files = f"{ARCHIVE}, with the folders 20news-bydate-train and 20news-bydate-test"
        raise absent(folder, [files], "http://qwone.com/~jason/20Newsgroups/", reason) from error
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
