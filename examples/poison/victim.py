"""The victim of every row: a linear softmax, trained from scratch to convergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from examples.shared.task import Values

GRADIENT = 1e-5  # largest entry at the end


class Samples(NamedTuple):
    """Rows of numbers, and the class of each."""

    inputs: Tensor
    labels: Tensor


def joined(*parts: Samples) -> Samples:
    """All of them."""
    return Samples(torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))


def fit(
    samples: Samples,
    classes: int,
    decay: float,
    bias: bool,
    weights: Tensor | None = None,
) -> Values:
    """The minimiser of sum_i w_i CE_i / sum_i w_i + decay ||W||^2: W, and b where there is one.

    By L-BFGS in double precision, from zero. The problem is convex; with decay > 0 the minimiser W
    is unique.

    Args:
        samples: the training set.
        classes: number of them.
        decay: > 0.
        bias: with b.
        weights: w; default: equal.
    """
    inputs, labels = samples.inputs.double(), samples.labels
    w = torch.ones_like(inputs[:, 0]) if weights is None else weights.double()
    shapes = [(classes, inputs.shape[1]), (classes,)][: 1 + bias]
    values = [inputs.new_zeros(shape).requires_grad_() for shape in shapes]
    rule = torch.optim.LBFGS(
        values,
        max_iter=2000,
        history_size=30,
        tolerance_grad=GRADIENT,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        rule.zero_grad()
        losses = cross_entropy(linear(inputs, *values), labels, reduction="none")
        total = (w * losses).sum() / w.sum() + decay * values[0].square().sum()
        total.backward()
        return total

    rule.step(loss)  # pyright: ignore[reportArgumentType]
    return tuple(p.detach().to(samples.inputs) for p in values)


def wrong_share(victim: Values, samples: Samples) -> float:
    """Share of samples that are not told as labelled."""
    told = linear(samples.inputs, *victim).argmax(1)
    return (told != samples.labels).float().mean().item()
