"""What the tests of hypergradients share: the methods, a dense quadratic and a live run over it."""

from __future__ import annotations

from typing import Any

import torch
from problems import normal, spd
from torch import Tensor

from torch_penalty_bilevel import HypergradientOptimizer

SOLVERS = ("cg", "cg_normal", "neumann", "fixed_point", "stochastic", "approx_grad")


UNROLLED = ("reverse", "forward")


METHODS = (*SOLVERS, "reverse", "one_step", "alternating")


class Quadratic:
    """Dense and small: v*(u), H, J and the slopes are matrices here."""

    def __init__(self, seed: int = 0) -> None:
        self.A, self.C = spd(4, seed, 5.0), normal(3, 4, seed=seed + 1)
        self.target, self.offset = normal(4, seed=seed + 2), normal(3, seed=seed + 3)

    def f(self, u: Tensor, v: Tensor) -> Tensor:
        return (v - self.target).square().sum() / 2 + (u - self.offset).square().sum() / 2

    def g(self, u: Tensor, v: Tensor) -> Tensor:
        return v @ self.A @ v / 2 + u @ self.C @ v

    def residual(self, u: Tensor, v: Tensor) -> Tensor:
        return self.A @ v + self.C.T @ u

    def exact(self, u: Tensor) -> Tensor:
        slope = -torch.linalg.solve(self.A, self.C.T @ u) - self.target
        return u - self.offset - self.C @ torch.linalg.solve(self.A, slope)


class Run:
    """Live tensors with an optimizer over them."""

    def __init__(self, problem: Any = None, lr: float = 0.1, **options: Any) -> None:
        self.problem = problem or Quadratic()
        self.u = normal(3, seed=8).requires_grad_()
        self.v = normal(4, seed=9).requires_grad_()
        upper = torch.optim.SGD([self.u], lr=options.pop("upper_lr", 0.05))
        lower = torch.optim.SGD([self.v], lr=lr, momentum=options.pop("momentum", 0.0))
        self.optimizer = HypergradientOptimizer(upper, lower, **options)
        self.closures = (
            lambda: self.problem.f(self.u, self.v),
            lambda: self.problem.g(self.u, self.v),
        )

    def step(self, times: int = 1) -> Tensor:
        for _ in range(times):
            loss = self.optimizer.step(*self.closures)
        return loss
