"""The problem of ``denoise_digits.py`` and the rows of its table that are not the optimizer."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# Of the weight decays 3e-3, 1e-2 and 3e-2 the best for each baseline, on seeds from 100 on: it
# matters most to "noisy + validation".
SMALL_DECAY, DECAY = 3e-3, 1e-2
WARMUP = 100  # lower steps of torchopt's row before its first upper step


class Problem(NamedTuple):
    """Images as rows of numbers in [0, 1]; ``labels`` are given, ``truth`` is hidden."""

    images: Tensor
    labels: Tensor
    truth: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    seed: int

    @property
    def is_right(self) -> Tensor:
        """Which given labels are the true ones."""
        return self.labels == self.truth


def make_problem(
    seed: int, noise: float, clean: int, systematic: bool = False, train: int = 1000
) -> Problem:
    """``train`` digits, a share ``noise`` of them with a wrong label; the rest are for tests.

    The wrong label is random or, if ``systematic``, the next digit. The clean images hold equally
    many of each digit.
    """
    data, generator = load_digits(), np.random.default_rng(seed)
    order = generator.permutation(len(data.target))
    rank = np.zeros(len(order), dtype=int)
    for digit in range(10):
        members = data.target[order] == digit
        rank[members] = np.arange(members.sum())
    is_clean = rank < clean // 10
    order = np.concatenate([order[is_clean], order[~is_clean]])
    images = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    truth = torch.tensor(data.target[order])
    chosen, rest = slice(clean, clean + train), slice(clean + train, None)
    wrong = torch.tensor(generator.permutation(train) < round(noise * train))
    shift = torch.tensor(generator.integers(1, 10, train))
    if systematic:
        shift = torch.ones_like(shift)
    labels = torch.where(wrong, (truth[chosen] + shift) % 10, truth[chosen])
    return Problem(
        *(images[chosen], labels, truth[chosen]),
        *(images[:clean], truth[:clean], images[rest], truth[rest], seed),
    )


def make_model(seed: int) -> nn.Sequential:
    """A small network, the same for every row."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def decay(parameters: list[Tensor], strength: float = DECAY) -> Tensor:
    """The weight decay that is part of every training loss."""
    return 0.5 * strength * sum(p.square().sum() for p in parameters)


def fit(
    images: Tensor, labels: Tensor, weights: Tensor, seed: int, strength: float
) -> nn.Sequential:
    """The recipe with which every row ends: a fresh network on weighted samples."""
    model = make_model(seed + 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    weights = weights / weights.sum()
    for _ in range(300):
        optimizer.zero_grad()
        losses = cross_entropy(model(images), labels, reduction="none")
        (weights @ losses + decay(list(model.parameters()), strength)).backward()
        optimizer.step()
        schedule.step()
    return model


def fit_with_clean(problem: Problem, weights: Tensor, strength: float = DECAY) -> nn.Sequential:
    """``fit`` on the weighted training samples together with the clean ones."""
    return fit(
        torch.cat([problem.images, problem.clean_images]),
        torch.cat([problem.labels, problem.clean_labels]),
        torch.cat([weights, torch.ones(len(problem.clean_labels))]),
        problem.seed,
        strength,
    )


@torch.no_grad()
def confidence(model: nn.Module, problem: Problem) -> Tensor:
    """The model's probability of each given label."""
    return model(problem.images).softmax(1).gather(1, problem.labels[:, None])[:, 0]


# Each row returns (model, score per training sample); a score above one half says "right".


def validation_only(problem: Problem) -> tuple[nn.Module, Tensor]:
    """Train on the clean images alone."""
    ones = torch.ones(len(problem.clean_labels))
    model = fit(problem.clean_images, problem.clean_labels, ones, problem.seed, SMALL_DECAY)
    return model, confidence(model, problem)


def noisy_and_validation(problem: Problem) -> tuple[nn.Module, Tensor]:
    """Train on everything as if all labels were right."""
    model = fit_with_clean(problem, torch.ones(len(problem.labels)))
    return model, confidence(model, problem)


@torch.no_grad()
def _agrees(model: nn.Module, problem: Problem) -> Tensor:
    return (model(problem.images).argmax(1) == problem.labels).float()


def agreement_filter(problem: Problem) -> tuple[nn.Module, Tensor]:
    """Keep the samples that the validation-only model agrees with, then retrain."""
    kept = _agrees(validation_only(problem)[0], problem)
    return fit_with_clean(problem, kept, SMALL_DECAY), kept


def self_filter(problem: Problem) -> tuple[nn.Module, Tensor]:
    """Keep the samples that the model of noisy + validation agrees with, then retrain."""
    kept = _agrees(noisy_and_validation(problem)[0], problem)
    return fit_with_clean(problem, kept), kept


def oracle(problem: Problem) -> tuple[nn.Module, Tensor]:
    """Keep exactly the right labels: what no method can know."""
    kept = problem.is_right.float()
    return fit_with_clean(problem, kept, SMALL_DECAY), kept


def implicit(
    problem: Problem, steps: int, batch: int, upper_lr: float, ridge: float, iterations: int
) -> tuple[nn.Module, Tensor]:
    """Implicit differentiation by torchopt: warm-started lower steps, conjugate gradients."""
    import torchopt

    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    model = make_model(problem.seed + 2000)
    lower = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    upper = torch.zeros(len(problem.labels), requires_grad=True)
    upper_rule = torch.optim.Adam([upper], lr=upper_lr)
    lower_rule = torch.optim.Adam(lower, lr=1e-2)

    def loss(values: tuple[Tensor, ...], scores: Tensor, rows: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        outputs = torch.func.functional_call(model, named, (problem.images[rows],))
        losses = cross_entropy(outputs, problem.labels[rows], reduction="none")
        return (scores.sigmoid() * losses).mean() + decay(list(values))

    @torchopt.diff.implicit.custom_root(
        lambda values, scores, rows: torch.func.grad(loss)(values, scores, rows),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=iterations, ridge=ridge),
    )
    def solve(start: tuple[Tensor, ...], scores: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            lower_rule.zero_grad()
            loss(tuple(lower), scores.detach(), rows).backward()
        lower_rule.step()
        return tuple(p.detach().clone().requires_grad_() for p in lower)

    for _ in range(WARMUP):
        rows = torch.randperm(len(upper))[:batch]
        solve(tuple(lower), upper[rows], rows)
    for _ in range(steps):
        rows = torch.randperm(len(upper))[:batch]
        values = dict(zip(names, solve(tuple(lower), upper[rows], rows), strict=True))
        outputs = torch.func.functional_call(model, values, (problem.clean_images,))
        upper_rule.zero_grad()
        cross_entropy(outputs, problem.clean_labels).backward()
        upper_rule.step()
    weights = upper.detach().sigmoid()
    return fit_with_clean(problem, weights), weights
