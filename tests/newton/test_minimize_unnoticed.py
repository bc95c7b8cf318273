"""Changes to minimize that nothing else notices: each part by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.optimize import nnls
from solving import generator, square, vector
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import MinimizeResult, minimize
from torch_penalty_bilevel.constraints import Box
from torch_penalty_bilevel.linear_solve.signed_least_squares import signed_least_squares
from torch_penalty_bilevel.newton.active_set import ActiveSet
from torch_penalty_bilevel.newton.counted_losses import CountedLosses
from torch_penalty_bilevel.newton.lower_hessian import Spectral
from torch_penalty_bilevel.newton.lower_level import solve_lower
from torch_penalty_bilevel.newton.restarts import Ended, Task, _best, _cut
from torch_penalty_bilevel.newton.run import Solver


def lower_model(g: Any, v: Tensor) -> Any:
    losses = CountedLosses(lambda u, v: square(v), g, torch.zeros(1), v, math.inf)
    return losses.lower(losses.u, losses.v)


def result(**changes: Any) -> MinimizeResult:
    numbers = {
        "upper": vector(1.0),
        "lower": vector(2.0),
        "multiplier": vector(3.0),
        "upper_loss": 1.0,
        "lower_loss": 0.0,
        "residual_norm": 0.0,
        "adjoint_residual_norm": 0.0,
        "upper_grad_norm": 0.0,
        "evaluations": 10,
        "iterations": 1,
        "status": "converged",
        "message": "",
    }
    return MinimizeResult(**numbers | changes)


@pytest.mark.parametrize("seed", range(20))
def test_signed_least_squares_of_many_unknowns(seed: int) -> None:
    """Where several bounds block one step the way ends at the first; against scipy's."""
    source = generator(seed)
    A, b = torch.randn(20, 15, generator=source).abs(), torch.randn(20, generator=source)
    x, missed = signed_least_squares(A, b, torch.ones(15, dtype=torch.bool))
    expected, norm = nnls(A.numpy(), b.numpy())
    assert_close(x, torch.from_numpy(expected), rtol=0, atol=1e-8)
    assert missed == pytest.approx(norm, rel=1e-9)


def test_an_indefinite_hessian_has_an_inverse_and_a_positive_preconditioner() -> None:
    D = vector(4.0, -2.0, 1.0)
    H = Spectral(lower_model(lambda u, v: (D * v * v).sum() / 2 + 0 * u.sum(), torch.ones(3)))
    b = vector(1.0, 2.0, 3.0)
    assert H.nullity == 0
    assert_close(H.solve(b), b / D)
    assert H.lowest < 0
    for x in torch.eye(3):
        assert float(x @ H.precondition(x)) > 0


@pytest.mark.parametrize("tilt", [0.3, -0.3])
def test_a_saddle_is_left_towards_the_lower_side(tilt: float) -> None:
    """g = v^4 / 4 - v^2 / 2 + tilt v^3 / 3 at 0: the deeper well is on the side of -tilt."""
    g = lambda u, v: (v**4 / 4 - v**2 / 2 + tilt * v**3 / 3).sum() + 0 * u.sum()  # noqa: E731
    losses = CountedLosses(lambda u, v: square(v), g, torch.zeros(1), torch.zeros(1), math.inf)
    low = solve_lower(losses, losses.u, losses.v, 1e-10)
    assert low.converged
    assert float(low.v) * tilt < 0


def test_a_corner_out_of_reach_is_none() -> None:
    """F = (u - 1)^2 + (v - 1)^2 with v = u: the solution is one root of 2 away from 0."""
    f = lambda u, v: square(u - 1) + square(v - 1)  # noqa: E731
    losses = CountedLosses(f, lambda u, v: square(v - u), torch.zeros(1), torch.zeros(1), math.inf)
    corners = ActiveSet(losses, lambda u, v: u - 5, None, (1.0, 1.0))
    none, outside = torch.zeros(0), torch.zeros(1, dtype=torch.bool)
    for reach, found in ((2.0, True), (1.0, False)):
        corner = corners.solve(losses.u, losses.v, none, outside, reach, 1e-8)
        assert (corner is not None) == found


def test_a_run_whose_second_look_was_cut_short_does_not_win() -> None:
    sure, unsure = result(upper_loss=1.0), result(upper_loss=0.5)
    ended = [Ended(unsure, None, checked=False), Ended(sure, None, checked=True)]
    assert _best(ended) is sure
    assert _best(ended[:1]) is unsure


def test_the_result_of_a_cut_is_one_of_the_problem() -> None:
    g = lambda u, v: square(v - u)  # noqa: E731
    task = Task(lambda u, v: square(v), g, vector(0.0), vector(0.0), None, None)
    cut = _cut(task, result(), (vector(1.0), vector(4.0)))
    pair = result(lower=(vector(1.5), vector(4.0)), multiplier=(vector(7.0), vector(8.0)))
    restored = cut.restore(pair)
    assert_close(restored.lower, vector(1.5))
    assert_close(restored.multiplier, vector(7.0))
    assert restored.lower_loss == pytest.approx(0.25)


def barred(callback: Any = None) -> MinimizeResult:
    """F = (u - 2)^2 with u <= 1: the multiplier is 2."""
    return minimize(
        lambda u, v: square(v - 2),
        lambda u, v: square(v - u) / 2,
        vector(0.5),
        vector(0.5),
        upper_constraint=Box(-1.0, 1.0),
        callback=callback,
    )


def test_the_barrier_is_followed_to_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the corner at its end the bound is missed by weight * scale / multiplier, 6e-8."""
    monkeypatch.setattr(Solver, "find_corner", lambda *_: False)
    missed = 1 - float(barred().upper)
    assert 0 < missed < 1e-7


def test_a_callback_sees_losses_without_the_barrier() -> None:
    seen: list[MinimizeResult] = []
    barred(lambda now: seen.append(now))
    assert len(seen) > 3
    for now in seen:
        assert now.upper_loss == pytest.approx(float(square(now.lower - 2)), rel=1e-12)


def test_a_step_onto_a_saddle_of_the_lower_loss_is_refused():
    """g = u a^2 / 2 + a^4 / 4 + (b - u)^2 / 2 has its minimum at a = 0 for u >= 0, a saddle below:
    restoring a step ends there too, as the gradient in a vanishes. f falls towards u = -1."""
    found = minimize(
        lambda u, v: (u + 1).square().sum() + (v[1] - u).square().sum(),
        lambda u, v: u[0] * v[0] ** 2 / 2 + v[0] ** 4 / 4 + (v[1] - u[0]) ** 2 / 2,
        torch.tensor([1.0]),
        torch.tensor([0.0, 0.3]),
    )
    assert found.status == "stalled"
    assert float(found.upper) == pytest.approx(0.0, abs=1e-6)
