"""Parts of one's own, an engine, a rule and a penalty, given to both optimizers; not run.

``examples/extending`` has them at length; here they are as short as they can be typed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.curvature import Curvature, DoubleBackward, Linearised, Loss
from torch_penalty_bilevel.evaluation import Evaluation, Norms
from torch_penalty_bilevel.multipliers import ZEROS, DualState, MultiplierRule, along
from torch_penalty_bilevel.penalties import Losses, Penalty, Reduce
from torch_penalty_bilevel.tensors import OptionalPair, Pair, Tensors, axpy


class Counting(Curvature):
    """Another engine's products, counted."""

    name = "counting"

    def __init__(self) -> None:
        self.inner, self.calls = DoubleBackward(), 0

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        return self.inner.gradient(loss, at)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        self.calls += 1
        return self.inner.linearise(loss, at, reusable=reusable)


@dataclass(frozen=True, eq=False)
class Velocity(DualState):
    velocity: Tensors = along(ZEROS)


class Richardson(MultiplierRule):
    shares_evaluation = True

    def start(self, lower: Tensors) -> Velocity:
        return Velocity.at(lower, damping=1.0)

    def adjoint(self, state: Velocity, residual: Tensors) -> Tensors:
        return state.multiplier

    def lower_update(
        self, state: Velocity, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, Velocity]:
        multiplier = axpy(-0.1, evaluation.adjoint_residual, state.multiplier)
        return evaluation.residual, state.but(multiplier=multiplier)


class Twice:
    """A penalty that has another do its work."""

    name = "twice"
    lower_is_map = False
    takes_lower_constraints = False

    def __init__(self) -> None:
        self.inner = Stationarity(Richardson())

    @property
    def rule(self) -> MultiplierRule:
        return self.inner.rule

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        return self.inner.evaluate(losses, at, state, curvature, reduce)


def given(model: nn.Module) -> None:
    u = torch.zeros(2, requires_grad=True)
    penalty: Penalty = Twice()
    optimizer = PenaltyBilevelOptimizer(
        [u], model.parameters(), penalty=penalty, curvature=Counting()
    )
    assert_type(optimizer.penalty, Penalty)
    assert_type(optimizer.curvature, Curvature)
    HypergradientOptimizer([u], model.parameters(), curvature=Counting())
