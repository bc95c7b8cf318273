"""Four problems on data: scikit-learn's digits, 20 Newsgroups and two UCI tables.

    digits        ``benchmarks.digits_l2``: 64 log L2 weights from -7, softmax regression
    newsgroups    ``examples.tune_l2``: a log L2 weight per word from 0, softmax regression;
                  the 300 most frequent words, 500 training and 500 validation posts
    autompg       a log ridge weight per column from 0, linear regression; halves
    breastcancer  a weight sigmoid(u_i) per training row from u = 0, logistic regression (target
                  above its median or not) with ridge 0.01; halves

f is the validation loss. A uniquely solvable lower level, by its L2 terms, in all of them.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from benchmarks import digits_l2
from examples.data.newsgroups import newsgroups as read_newsgroups

Loss = Callable[[Tensor, Tensor], Tensor]
FEATURES, POSTS = 300, 1000
RIDGE = 0.01
# Of a softmax's curvature p (1 - p) where the fit is good, for ``unit``.
FLAT = 3e-3


class Table(NamedTuple):
    """Two losses, a start, and about 1 / sqrt(curvature of g) in v at u."""

    f: Loss
    g: Loss
    u: Tensor
    v: Tensor
    unit: Callable[[Tensor], Tensor]


def digits(seed: int, data: Path) -> Table:
    """One L2 weight per pixel."""
    f, g = digits_l2.losses(seed)
    pixels = torch.tensor(load_digits().data) / 16

    def unit(u: Tensor) -> Tensor:
        return (FLAT * pixels.square().mean(0) + u.exp()).rsqrt()[:, None]

    return Table(f, g, torch.full((64,), -7.0), torch.zeros(64, 10), unit)


def newsgroups(seed: int, data: Path) -> Table:
    """One L2 weight per word."""
    x, y = _posts(data / "20newsgroups")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:POSTS]
    first, second = order.chunk(2)
    rows, labels = x[first], y[first]
    others, theirs = x[second], y[second]

    def f(u: Tensor, v: Tensor) -> Tensor:
        return cross_entropy(others @ v, theirs)

    def g(u: Tensor, v: Tensor) -> Tensor:
        return cross_entropy(rows @ v, labels) + (u.exp()[:, None] * v.square()).mean() / 2

    def unit(u: Tensor) -> Tensor:
        curvature = FLAT * rows.square().mean(0) + u.exp() / v.numel()
        return curvature.rsqrt()[:, None]

    v = torch.zeros(FEATURES, 20)
    return Table(f, g, torch.zeros(FEATURES), v, unit)


def autompg(seed: int, data: Path) -> Table:
    """One ridge weight per column."""
    x, y, _ = _uci("autompg", seed, data)
    half = len(y) // 2
    y = (y - y[:half].mean()) / y[:half].std()

    def f(u: Tensor, v: Tensor) -> Tensor:
        return (x[half:] @ v - y[half:]).square().mean() / 2

    def g(u: Tensor, v: Tensor) -> Tensor:
        fit = (x[:half] @ v - y[:half]).square().mean()
        return (fit + (u.exp() * v.square()).sum()) / 2

    width = x.shape[1]
    return Table(f, g, torch.zeros(width), torch.zeros(width), lambda u: (1 + u.exp()).rsqrt())


def breastcancer(seed: int, data: Path) -> Table:
    """One weight per training row."""
    x, _, y = _uci("breastcancer", seed, data)
    half = len(y) // 2

    def f(u: Tensor, v: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x[half:] @ v, y[half:])

    def g(u: Tensor, v: Tensor) -> Tensor:
        losses = binary_cross_entropy_with_logits(x[:half] @ v, y[:half], reduction="none")
        return (u.sigmoid() * losses).mean() + RIDGE * v.square().sum() / 2

    v = torch.zeros(x.shape[1])
    return Table(f, g, torch.zeros(half), v, lambda u: torch.tensor(1.0))


TABLES: dict[str, Callable[[int, Path], Table]] = {
    "digits": digits,
    "newsgroups": newsgroups,
    "autompg": autompg,
    "breastcancer": breastcancer,
}


def _uci(name: str, seed: int, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled rows, scaled by their first half, with a column of ones; the target; is it high?"""
    with gzip.open(data / "uci" / f"treforevans_{name}.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    x, y = table[order, :-1], table[order, -1]
    half = x[: len(x) // 2]
    x = (x - half.mean(0)) / half.std(0).clamp_min(1e-12)
    return torch.cat([x, torch.ones(len(x), 1)], 1), y, (y > y.median()).to(y)


@functools.cache
def _posts(folder: Path) -> tuple[Tensor, Tensor]:
    """Training posts as dense TF-IDF rows, and their groups; read once per process."""
    if not (folder / "20news-bydate.tar.xz").exists():
        raise FileNotFoundError(f"no 20news-bydate.tar.xz in {folder}")
    rows, labels, *_ = read_newsgroups(folder, FEATURES)
    return torch.from_numpy(rows.toarray()).double(), torch.from_numpy(labels)
