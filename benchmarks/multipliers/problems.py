"""What the rules are compared on: losses on all data, batches of them, and exact solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import digits_l2
from benchmarks.multipliers import reference
from benchmarks.multipliers.reference import Loss
from benchmarks.shared import mnist_rows as rows
from torch_penalty_bilevel import testing

Batch = Callable[[], tuple[Loss, Loss]]


@dataclass(frozen=True)
class Task:
    """A problem and how it is run: Adam on both levels."""

    u: Tensor
    v: Tensor
    f: Loss
    g: Loss
    """Both of all data."""
    adjoint: Loss
    """The exact adjoint at (u, v)."""
    score: Loss
    """How good an end is, 0-d; smaller is better."""
    solved: Loss | None
    """(u, v) -> v*(u), where v is what it may start from; None where that is out of reach."""
    batch: Batch | None = None
    """Draws f and g of fresh batches; None: the runs see all data."""
    steps: int = 150
    lower_steps: int = 5
    upper_lr: float = 0.1
    lower_lr: float = 0.1
    looks: int = 20
    decays: bool = True
    """Do the rates fall to 0 by a cosine, after a warm-up of at most a 20th of the steps?"""


_ANALYTIC: dict[str, tuple[str, dict[str, float]]] = {
    "quadratic1": ("quadratic", {"kappa": 1e1}),
    "quadratic3": ("quadratic", {"kappa": 1e3}),
    "smd20": ("smd20", {}),
    "smd22": ("smd22", {}),
    "smd23": ("smd23", {}),
    "smd24": ("smd24", {}),
    "least_squares": ("least_squares", {}),
}
NAMES = (*_ANALYTIC, "digits", "digits_batches", "mnist")


def make(name: str, seed: int, data: Path) -> Task:
    """The problem of that name; torch's default dtype is set to that of the problem."""
    torch.set_default_dtype(torch.float32 if name == "mnist" else torch.float64)
    if name == "mnist":
        return _mnist(seed, data)
    if name.startswith("digits"):
        return _digits(seed, batches=name == "digits_batches")
    return _analytic(name, seed)


def _analytic(name: str, seed: int) -> Task:
    kind, options = _ANALYTIC[name]
    problem = testing.get(kind, **options, seed=seed)
    lower = problem.lower_loss
    assert lower is not None
    u, v = problem.start(torch.Generator().manual_seed(seed))
    H = reference.lower_hessian(lower, u, v)  # everywhere: all of them are quadratic in v
    return Task(
        u,
        v,
        problem.upper_loss,
        lower,
        adjoint=partial(reference.exact_adjoint, problem.upper_loss, lambda u, v: H),
        score=problem.error,
        solved=lambda u, v: problem.best_lower(u),
    )


def _digits(seed: int, batches: bool) -> Task:
    f, g = digits_l2.losses(seed)
    x, y = digits_l2.shuffled(seed)
    hessian = partial(softmax_hessian, x[:600])
    solved = partial(reference.solve_lower, g, hessian)
    task = Task(
        torch.full((64,), -7.0),
        torch.zeros(64, 10),
        f,
        g,
        adjoint=partial(reference.exact_adjoint, f, hessian),
        score=lambda u, v: f(u, solved(u, v)),
        solved=solved,
        steps=100,
        looks=5,
    )
    if not batches:
        return task
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Loss, Loss]:
        training = torch.randperm(600, generator=generator)[:100]
        validation = 600 + torch.randperm(400, generator=generator)[:100]
        return digits_l2.losses_on(x, y, training, validation)

    return replace(task, batch=batch, steps=200, lower_steps=1, upper_lr=0.03, lower_lr=0.03)


def softmax_hessian(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """H of the mean cross entropy of the rows x v with sum_j e^{u_j} |v_j|^2 / 2.

    With p the probabilities it is X'(diag p - p p')X / n + diag(e^u): one matrix product, where a
    derivative of the loss takes one for every column.
    """
    n, pixels, classes = len(x), *v.shape
    p = (x @ v).softmax(1)
    both = (x[:, :, None] * p[:, None, :]).reshape(n, -1)
    blocks = (-both.T @ both).reshape(pixels, classes, pixels, classes)
    own = torch.einsum("ni,na,nj->aij", x, p, x)
    for label in range(classes):
        blocks[:, label, :, label] += own[label]
    H = (blocks / n).reshape(pixels * classes, -1)
    H.diagonal().add_(u.exp().repeat_interleave(classes))
    return H


def _mnist(seed: int, data: Path) -> Task:
    problem = rows.make_problem(rows.mnist(data), seed, model="linear")
    (weight, bias) = rows.make_model(problem, seed).parameters()
    images, clean = (_with_ones(x) for x in (problem.images, problem.clean_images))

    def losses(here: Any, there: Any) -> tuple[Loss, Loss]:
        def f(u: Tensor, v: Tensor) -> Tensor:
            return cross_entropy(clean[there] @ v, problem.clean_labels[there])

        def g(u: Tensor, v: Tensor) -> Tensor:
            found = cross_entropy(images[here] @ v, problem.labels[here], reduction="none")
            return (u[here].sigmoid() * found).mean()

        return f, g

    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Loss, Loss]:
        labels = problem.labels, problem.clean_labels
        drawn = [torch.randperm(len(y), generator=generator)[: rows.BATCH] for y in labels]
        return losses(*drawn)

    def score(u: Tensor, v: Tensor) -> Tensor:
        return torch.tensor(1.0 - rows.score(u.sigmoid(), problem)["auc"])

    f, g = losses(slice(None), slice(None))
    return Task(
        torch.zeros(len(problem.labels)),
        torch.cat([weight, bias[:, None]], 1).detach().T.contiguous(),  # as behind the images
        f,
        g,
        # v has 7,850 numbers, and H, without weight decay, eigenvalues of all sizes down to 0.
        adjoint=partial(reference.damped_adjoint, f, g, damping=1e-2),
        score=score,
        solved=None,
        batch=batch,
        lower_steps=1,
        lower_lr=1e-3,
        looks=5,
        decays=False,
    )


def _with_ones(images: Tensor) -> Tensor:
    flat = images.reshape(len(images), -1)
    return torch.cat([flat, torch.ones(len(flat), 1)], 1)
