"""A multiplier rule of one's own: heavy-ball momentum on the adjoint equation.

    python -m examples.extending.multiplier_rule

A rule says how nu and v move. Its state is a frozen dataclass; a tensor for each lower parameter is
one line with ``along``, and freezing, added groups, restarts and checkpoints follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.evaluation import Evaluation, Norms
from torch_penalty_bilevel.multipliers import ZEROS, DualState, MultiplierRule, along
from torch_penalty_bilevel.tensors import Tensors, axpy, scale


@dataclass(frozen=True, eq=False)
class HeavyBallState(DualState):
    velocity: Tensors = along(ZEROS)


class HeavyBall(MultiplierRule):
    """p <- beta p - sigma (grad_v f + H nu), nu <- nu + p; v follows grad_v g."""

    shares_evaluation = True

    def __init__(self, sigma: float = 0.1, beta: float = 0.5) -> None:
        self.sigma, self.beta = sigma, beta

    def start(self, lower: Tensors) -> HeavyBallState:
        return HeavyBallState.at(lower, damping=1.0)

    def adjoint(self, state: HeavyBallState, residual: Tensors) -> Tensors:
        return state.multiplier

    def lower_update(
        self, state: HeavyBallState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, HeavyBallState]:
        a = evaluation.adjoint_residual
        velocity = axpy(-self.sigma, a, scale(state.velocity, self.beta))
        multiplier = axpy(1.0, velocity, state.multiplier)
        moved = state.but(velocity=velocity, multiplier=multiplier, steps=state.steps + 1)
        return evaluation.residual, moved


def main() -> None:
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    b, penalty = torch.tensor([1.0, -2.0]), Stationarity(HeavyBall())
    optimizer = PenaltyBilevelOptimizer([u], [v], penalty=penalty, upper_lr=0.02, lower_lr=0.1)
    for _ in range(1000):
        optimizer.step(lambda: (v - b).square().sum(), lambda: (v - u).square().sum())
    print(f"u = {u.tolist()}, should be {b.tolist()}")


if __name__ == "__main__":
    main()
