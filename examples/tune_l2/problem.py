"""The problem of ``tune_l2``: softmax regression with one L2 weight per feature.

Letters: u the log weights (d,), v the coefficients (d, k), n the rows of the training set.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, issparse, vstack
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.data.newsgroups import newsgroups
from examples.data.uci import uci

CPU = torch.device("cpu")


class Pair:
    """A constant sparse matrix and its transposed; no tuple, for torch.func looks into those."""

    def __init__(self, matrix: Tensor, transposed: Tensor) -> None:
        self.matrix, self.transposed = matrix, transposed

    @property
    def swapped(self) -> Pair:
        """X' and X."""
        return Pair(self.transposed, self.matrix)


class Linear(torch.autograd.Function):
    """Products X v with a constant sparse X, for any number of derivatives.

    torch differentiates ``X @ v`` twice as well, but transposes X anew in every backward pass,
    which took ten times as long as all the rest here. The product is linear in v, so its backward
    is the product with X', kept beside X, and the backward of that is the product with X again.
    """

    @staticmethod
    def forward(v: Tensor, pair: Pair) -> Tensor:
        return pair.matrix @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.pair = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return Linear.apply(gradients[0], ctx.pair.swapped), None


class Rows:
    """Samples: X (n, d), dense or sparse, and their classes (n,)."""

    def __init__(
        self, values: Any, labels: np.ndarray, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        self.values, self.targets, self.device = values, labels, device
        self.labels = torch.from_numpy(labels).to(device)
        self._pair: Pair | None = None
        if issparse(values):
            self._matrix = _as_csr(values, dtype).to(device)
            self._pair = Pair(self._matrix, _as_csr(values.T, dtype).to(device))
        else:
            self._matrix = torch.from_numpy(values).to(device, dtype)

    @property
    def mean_squares(self) -> Tensor:
        """Mean of x_j^2 over the samples, (d,)."""
        squares = self.values.power(2) if issparse(self.values) else self.values**2
        mean = np.asarray(squares.mean(axis=0)).ravel()
        return torch.from_numpy(mean).to(self.device, self._matrix.dtype)

    def outputs(self, v: Tensor) -> Tensor:
        """X v, (n, k)."""
        if self._pair is None:
            return self._matrix @ v
        return Linear.apply(v, self._pair)

    def loss(self, v: Tensor) -> Tensor:
        """Mean cross entropy in nats."""
        return cross_entropy(self.outputs(v), self.labels)

    @torch.no_grad()
    def accuracy(self, v: Tensor) -> float:
        return (self.outputs(v).argmax(1) == self.labels).double().mean().item()

    def joined(self, other: Rows) -> Rows:
        """These samples and those of ``other``."""
        stack = vstack if issparse(self.values) else np.concatenate
        labels = np.concatenate([self.targets, other.targets])
        values = stack([self.values, other.values])
        return Rows(values, labels, self._matrix.dtype, self.device)


def _as_csr(matrix: Any, dtype: torch.dtype) -> Tensor:
    matrix = csr_matrix(matrix).sorted_indices()
    rows, columns = (torch.from_numpy(a.astype(np.int64)) for a in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state.*")
        return torch.sparse_csr_tensor(rows, columns, values, matrix.shape, check_invariants=True)


def lower_loss(rows: Rows, u: Tensor, v: Tensor) -> Tensor:
    """Cross entropy + mean_jc exp(u_j) v_jc^2 / 2: g on the training rows."""
    return rows.loss(v) + (u.exp()[:, None] * v.square()).mean() / 2


class Problem(NamedTuple):
    """Three sets of rows; validation chooses u, nothing chooses by the test rows."""

    train: Rows
    validation: Rows
    test: Rows
    features: int
    classes: int
    dtype: torch.dtype
    smoothness: float
    """An upper bound of the cross entropy's curvature, ||X||_2^2 / (2 n)."""

    @property
    def largest(self) -> float:
        """The u at which a feature's L2 term curves as much as the cross entropy can."""
        return float(np.log(self.smoothness * self.features * self.classes))

    def start(self) -> tuple[Tensor, Tensor]:
        """U = 0 and v = 0."""
        like: Any = {"dtype": self.dtype, "device": self.train.device, "requires_grad": True}
        u = torch.zeros(self.features, **like)
        v = torch.zeros(self.features, self.classes, **like)
        return u, v

    def solved(self, u: Tensor, start: Tensor, rows: Rows | None = None) -> Tensor:
        """V*(u), by L-BFGS from ``start``; ``rows`` in the place of the training rows."""
        rows, u = rows or self.train, u.detach()
        # L2 terms differ by orders of magnitude: unknowns in units of 1 / sqrt(curvature). The
        # cross entropy's is x^2 p (1 - p); 3e-3 for the latter is that of a good fit to twenty
        # classes. Only the speed depends on it.
        curvature = 3e-3 * rows.mean_squares + u.exp() / start.numel()
        unit = curvature.rsqrt()[:, None]

        def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
            scaled = torch.from_numpy(flat).to(start).view_as(start)
            v = (scaled * unit).requires_grad_()
            loss = lower_loss(rows, u, v)
            (gradient,) = torch.autograd.grad(loss, v)
            return loss.item(), (gradient * unit).double().cpu().numpy().ravel()

        x0 = (start.detach() / unit).double().cpu().numpy().ravel()
        # Losses are reported to 1e-4: two more digits, in float32's reach.
        options = {"maxiter": 1000, "gtol": 0.0, "ftol": 1e-7}
        best = minimize(value, x0, jac=True, method="L-BFGS-B", options=options).x
        return torch.from_numpy(best).to(start).view_as(start) * unit


def make_problem(
    data: str,
    seed: int,
    folder: Path,
    features: int,
    posts: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Problem:
    """Split: of newsgroups ``posts`` training posts, halved, and its test posts; UCI in thirds.

    UCI columns are scaled to mean 0 and variance 1 on the training rows; a column of ones follows.

    Raises:
        SystemExit: there are fewer words or posts.
    """
    generator = np.random.default_rng(seed)
    if data == "newsgroups":
        rows, labels, test_rows, test_labels = _newsgroups(folder, features)
        there = {"features": (features, rows.shape[1]), "posts": (posts, len(labels))}
        for name, (asked, most) in there.items():
            if asked > most:
                raise SystemExit(f"--{name} must be at most {most}, as many there are, got {asked}")
        first, second = np.array_split(generator.permutation(len(labels))[:posts], 2)
        test = Rows(test_rows, test_labels, dtype, device)
    else:
        rows, labels = uci(data, folder)
        first, second, third = np.array_split(generator.permutation(len(labels)), 3)
        scale = rows[first].std(axis=0)
        rows = (rows - rows[first].mean(axis=0)) / np.where(scale > 0, scale, 1.0)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        test = Rows(rows[third], labels[third], dtype, device)
    return assemble(rows, labels, first, second, test, dtype)


def assemble(
    rows: Any, labels: np.ndarray, first: Any, second: Any, test: Rows, dtype: torch.dtype
) -> Problem:
    """The problem whose training and validation rows are ``first`` and ``second``."""
    train, validation = (
        Rows(rows[part], labels[part], dtype, test.device) for part in (first, second)
    )
    largest = _largest_singular_value(rows[first])
    smoothness = largest**2 / (2 * len(first))
    sizes = rows.shape[1], int(labels.max()) + 1
    return Problem(train, validation, test, *sizes, dtype, smoothness)


def _largest_singular_value(matrix: Any) -> float:
    if issparse(matrix):
        return float(svds(matrix, k=1, return_singular_vectors=False, random_state=0)[0])
    return float(np.linalg.norm(matrix, 2))


_READ: dict[tuple[Path, int], Any] = {}


def _newsgroups(folder: Path, features: int) -> Any:
    """Read once per process."""
    if (folder, features) not in _READ:
        _READ[folder, features] = newsgroups(folder, features)
    return _READ[folder, features]
