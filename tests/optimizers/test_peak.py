"""How many vectors like v a step holds at once, counted from the allocator's events.

``BALLAST`` stands for the activations of a large network: closures take it and give it back, so
that the peak of all tensors is what was held while a gradient was under way, plus it.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from examples.shared.memory import changes
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.curvature import FiniteDifference

COUNT, SIZE = 16, 4000
COPY = 4 * COUNT * SIZE
BALLAST = 100 * COPY


class Run:
    """v in sixteen float32 tensors under losses whose graphs save nothing but v itself."""

    def __init__(self, subspace: bool, ballast: bool, **options) -> None:
        torch.manual_seed(0)
        self.v = [torch.randn(SIZE, dtype=torch.float32).requires_grad_() for _ in range(COUNT)]
        self.u = torch.ones(COUNT, dtype=torch.float32, requires_grad=True)
        self.ballast = ballast
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u],
            torch.optim.Adam(self.v, lr=1e-3),
            penalty=Stationarity(LeastSquares(subspace=subspace)),
            **{"curvature": "finite_difference", **options},
        )

    def f(self) -> Tensor:
        return self._weighed(torch.linspace(1, -1, COUNT).float())

    def g(self) -> Tensor:
        return self._weighed(self.u * torch.arange(1, COUNT + 1).float())

    def _weighed(self, by: Tensor) -> Tensor:
        loss = torch.stack([v.square().sum() for v in self.v]) @ by
        if self.ballast:
            torch.empty(BALLAST // 4, dtype=torch.float32)
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.step(self.f, self.g)

    def rest(self) -> None:
        """As after many batches for which the correction was worth nothing."""
        dual = self.optimizer._dual
        self.optimizer._dual = dual.but(forecast=replace(dual.forecast, gain=0.0, idle=100))


def copies(
    before: int, subspace: bool, ballast: bool = True, rests: bool = False, **options
) -> float:
    """The most copies of v at once in two steps after the first ``before``, v itself among them."""
    made: list[Run] = []

    def begin() -> None:
        made.append(Run(subspace, ballast, **options))
        made[0].steps(before)
        if rests:
            made[0].rest()
            made[0].steps(1)

    gc.collect()
    gc.disable()  # a cycle that waits for the collector would count, now here, now there
    try:
        held = sum(changes(begin))
        peak = held + max(accumulate(changes(lambda: made[0].steps(2))))
    finally:
        gc.enable()
    return (peak - ballast * BALLAST) / COPY


# v, its two moments, nu and the probe stay. While g is differentiated at the shifted point there
# are also v itself to be put back, r, and grad_v f or (when probing) grad_v f + H nu.
ALONE = 5 + 3
# And nu one step ago, its last move, and H times both; when probing H nu as well.
CORRECTION = 4


@pytest.mark.parametrize(
    ("before", "subspace", "expected"),
    [
        (2, False, ALONE),
        (14, False, ALONE),
        (2, True, ALONE + CORRECTION + 1),
        (14, True, ALONE + CORRECTION),
    ],
)
def test_beside_the_activations(before: int, subspace: bool, expected: int) -> None:
    """Steps 2 and 3 probe the curvature, steps 14 and 15 do not."""
    assert copies(before, subspace) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("before", [2, 14])
def test_a_correction_that_rests_holds_nothing(before: int) -> None:
    assert copies(before, True, rests=True) == pytest.approx(ALONE, abs=0.2)


@pytest.mark.parametrize(("subspace", "most"), [(False, 11), (True, 18)])
def test_where_parameters_are_all(subspace: bool, most: int) -> None:
    """Old state, which a failing step needs, and the new one beside r, grad_v f + H nu and d."""
    assert copies(2, subspace, ballast=False) == pytest.approx(most, abs=0.5)


def test_two_sided_differences_hold_one_gradient_more() -> None:
    found = copies(2, False, curvature=FiniteDifference(central=True))
    assert found == pytest.approx(ALONE + 1, abs=0.2)
