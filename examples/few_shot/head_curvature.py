"""What is known of the curvature of softmax regression, as a rule for v and units for q.

The cross entropy of n images with features x, each longer by an entry 1 for the bias, curves in the
weights of any class by at most B = X'X / (2 n): diag(p) - pp' <= (I - 11'/C) / 2 (Böhning, 1992).
So steps -B^-1 grad descend whatever the features are, and where H is B times a number, all
directions get there together. B has as many directions as images, so its powers are cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_penalty_bilevel.tensors import Tensors


class HeadCurvature:
    """B = (X'X / (2 n) + decay) / T of every task, T tasks.

    Args:
        decay: of g.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def at(self, features: Tensor) -> None:
        """Of the support images' (tasks, n, features)."""
        tasks, count, _ = features.shape
        longer = torch.cat([features, torch.ones_like(features[..., :1])], -1)
        _, sizes, self._directions = torch.linalg.svd(longer, full_matrices=False)
        self._rest = self.decay / tasks
        self._values = sizes.square() / (2 * count * tasks) + self._rest

    def power(self, vectors: Tensors, exponent: float) -> Tensors:
        """B^exponent times vectors shaped like (weight, bias) of ``StackedHeads``."""
        weight, bias = vectors
        rows = torch.cat([weight, bias[..., None]], -1)
        rest = self._rest**exponent
        gain = (self._values**exponent - rest)[:, None]
        rows = rest * rows + ((rows @ self._directions.mT) * gain) @ self._directions
        return rows[..., :-1].contiguous(), rows[..., -1].contiguous()


class HeadSteps(Optimizer):
    """A torch rule: v <- v - lr B^-1 grad.

    Args:
        parameters: weight and bias.
        curvature: of the tasks at hand.
        lr: 1 is safe: B bounds the Hessian.
    """

    def __init__(
        self, parameters: Iterable[Tensor], curvature: HeadCurvature, lr: float = 1.0
    ) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.curvature = curvature

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step from ``grad``."""
        (group,) = self.param_groups
        # A slope of exactly 0, as of the biases at v = 0, is handed over as None.
        gradients = tuple(
            torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]
        )
        for parameter, move in zip(
            group["params"], self.curvature.power(gradients, -1.0), strict=True
        ):
            parameter.sub_(group["lr"] * move)
