"""The problem of ``cleaning.py``: MNIST with wrong labels, the models and the simple rows."""

from __future__ import annotations

import time

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.data.mirrors import default_folder as default_folder
from examples.data.mnist import mnist as mnist
from examples.shared.digits_rows import Problem as Problem

BATCH = 200
# C of scikit-learn's softmax regression and epochs of the MLP's Adam, per row: good test accuracy
# on seed 100 (linear: and 101), never on those reported. The validation set cannot tune them:
# learned weights and filter have used it already. "learned" is tuned for the default optimizer.
STRENGTH = {"none": 0.1, "all": 0.01, "filter": 0.3, "oracle": 0.1, "learned": 0.03}
EPOCHS = {"none": 30, "all": 10, "filter": 20, "oracle": 30, "learned": 12}


def make_problem(
    data: tuple[Tensor, Tensor],
    seed: int,
    train: int = 5000,
    clean: int = 1000,
    noise: float = 0.5,
) -> Problem:
    """``train`` samples, a share ``noise`` of whose labels is drawn anew from all ten classes.

    A tenth of those keeps its label by chance. Then ``clean`` validation samples; the rest is the
    test set.
    """
    images, truth = data
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(truth), generator=generator)
    first, second, rest = order[:train], order[train : train + clean], order[train + clean :]
    redrawn = torch.randperm(train, generator=generator) < round(noise * train)
    drawn = torch.randint(10, (train,), generator=generator)
    labels = torch.where(redrawn, drawn, truth[first])
    return Problem(
        *(images[first], labels, truth[first], images[second], truth[second]),
        *(images[rest], truth[rest], seed),
    )


def make_model(kind: str, seed: int) -> nn.Module:
    """``linear`` (784-10) or ``mlp`` (784-300-10, ReLU)."""
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Linear(784, 10)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def score(scores: Tensor, problem: Problem) -> dict[str, float]:
    """How well scores in [0, 1] tell right labels from wrong; above one half says "right"."""
    says, is_right = scores > 0.5, problem.is_right
    right, wrong = says[is_right].float().mean().item(), (~says[~is_right]).float().mean().item()
    return {
        "told_right": (says == is_right).float().mean().item(),
        "balanced": (right + wrong) / 2,
        "auc": float(roc_auc_score(is_right, scores)),
        "kept": says.float().mean().item(),
    }


def fit(kind: str, problem: Problem, kept: Tensor, row: str) -> nn.Module:
    """How every row ends: a fresh model on ``kept`` (a mask) and the validation samples."""
    images = torch.cat([problem.images[kept], problem.clean_images])
    labels = torch.cat([problem.labels[kept], problem.clean_labels])
    model = make_model(kind, problem.seed)
    if kind == "linear":
        found = LogisticRegression(C=STRENGTH[row], max_iter=500).fit(images, labels)
        values = {"weight": torch.tensor(found.coef_), "bias": torch.tensor(found.intercept_)}
        model.load_state_dict(values)
        return model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(problem.seed)
    for _ in range(EPOCHS[row]):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model


def baselines(kind: str, problem: Problem) -> dict[str, dict[str, float]]:
    """Test accuracy, scores and CPU seconds of training of the rows that learn no weights."""

    def agreement(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(problem.images).argmax(1) == problem.labels

    def probability(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(problem.images).softmax(1).gather(1, problem.labels[:, None])[:, 0]

    none = torch.zeros(len(problem.labels), dtype=torch.bool)
    seconds: dict[str, float] = {}

    def timed(kept: Tensor, row: str) -> nn.Module:
        began = time.process_time()
        model = fit(kind, problem, kept, row)
        seconds[row] = time.process_time() - began
        return model

    alone, noisy = timed(none, "none"), timed(~none, "all")
    agrees = agreement(alone)
    filtered = timed(agrees, "filter")
    seconds["filter"] += seconds["none"]
    best = timed(problem.is_right, "oracle")
    told = {
        "validation only": (alone, probability(alone), seconds["none"]),
        "noisy + validation": (noisy, probability(noisy), seconds["all"]),
        "agreement filter": (filtered, agrees.float(), seconds["filter"]),
        "oracle": (best, problem.is_right.float(), seconds["oracle"]),
    }
    return {
        name: {"retrained": accuracy(model, problem.test_images, problem.test_labels)}
        | score(scores, problem)
        | {"seconds": spent}
        for name, (model, scores, spent) in told.items()
    }
