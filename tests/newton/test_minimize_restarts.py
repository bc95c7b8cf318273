"""minimize with restarts: global solutions of problems with several wells; the search's rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from solving import BUDGET, generator, quadratic_start, solve, square, vector
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import MinimizeResult, constraints, minimize, testing
from torch_penalty_bilevel.newton.restarts import _draw

# Each has starts from which the local method ends elsewhere; mirrlees and mb_2007_14 have their
# solution on a jump of the lower minimiser, where no descent ends.
WELLS = ["sine", "ripple", "cw_1990_02", "b_1988_01", "mirrlees", "mb_2007_14"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", WELLS)
@pytest.mark.long
def test_global_solution(name: str, seed: int) -> None:
    problem = testing.get(name)
    result = solve(problem, seed, restarts=40)
    assert float(problem.error(result.upper, result.lower)) <= 1e-9
    assert result.upper_loss == pytest.approx(problem.optimal_value, abs=1e-9)
    assert result.lower_loss == pytest.approx(
        float(problem.lower_loss(result.upper, problem.best_lower(result.upper))), abs=1e-9
    )
    assert result.converged
    assert result.lower.shape == result.multiplier.shape == problem.solutions[0][1].shape
    assert result.evaluations <= BUDGET


def test_a_jump_is_named() -> None:
    result = solve(testing.get("mirrlees"), 0, restarts=40)
    assert "second minimiser that is as deep" in result.message


def test_no_restart_is_the_local_method() -> None:
    problem = testing.get("ripple")
    start = vector(2.9), vector(-2.9)
    local, best = (solve(problem, start, restarts=n) for n in (0, 20))
    assert local.solutions == 1
    assert best.solutions >= 2
    assert best.upper_loss <= local.upper_loss
    assert best.evaluations > local.evaluations


def double_well(u: Tensor, v: Tensor) -> Tensor:
    return square(v.square() - 1)


def test_a_tie_is_followed() -> None:
    """g has its minima at -1 and 1, both zero; f wants 1."""
    f = lambda u, v: square(v - 1) + square(u)  # noqa: E731
    result = minimize(f, double_well, vector(0.0), vector(-1.0), restarts=2)
    assert_close(result.lower, vector(1.0), rtol=0, atol=1e-8)
    assert result.converged


def test_pytrees_and_inequalities_on_the_cut() -> None:
    """A tilted double well: v is the right one only where u <= 0, and f wants u = 1, v = 1.

    By symmetry both wells are equally deep at u = 0, where v = 1, w = -1: f = 1.
    """
    result = minimize(
        lambda u, v: (u["a"] - 1).square().sum() + square(v[0] - 1),
        lambda u, v: double_well(u["a"], v[0]) + 0.3 * (u["a"] * v[0]).sum(),
        {"a": vector(0.5)},
        [vector(0.9)],
        upper_constraint=constraints.Inequality(lambda u, v: u["a"] - 3),
        lower_constraint=[
            constraints.Box(-2.0, 2.0),
            constraints.Inequality(lambda u, v: v[0] - 2 - u["a"].square()),
        ],
        restarts=10,
        max_evaluations=10000,
    )
    assert result.converged
    assert_close(result.upper["a"], vector(0.0), rtol=0, atol=1e-8)
    assert_close(result.lower[0], vector(1.0), rtol=0, atol=1e-8)
    assert len(result.multiplier) == 1
    assert result.lower_loss == pytest.approx(0.0, abs=1e-8)


def points(seed: int) -> list[Tensor]:
    """All u at which a search evaluates g."""
    seen = list[Tensor]()

    def g(u: Tensor, v: Tensor) -> Tensor:
        seen.append(u.detach().clone())
        return square(v - u)

    start = torch.full((3,), 1 / 3)
    minimize(lambda u, v: square(v), g, start, start, restarts=3, seed=seed)
    return seen


def test_seed_draws_the_starts() -> None:
    once, again, other = (points(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once, other, strict=False))


def test_random_starts_keep_to_the_sets() -> None:
    x, source = torch.full((4, 3), 1 / 3), generator(0)
    for constraint in (
        constraints.Simplex(),
        constraints.Ball(0.5),
        constraints.NonNegative(),
        constraints.Box(torch.tensor([-1.0, -math.inf, 0.0]), 2.0),
    ):
        drawn = [_draw(x, [constraint], 0.5, source) for _ in range(20)]
        assert all(torch.equal(constraint.project(y), y) or _near(constraint, y) for y in drawn)
        assert len({float(y[0, 0]) for y in drawn}) > 5
    box = torch.stack([_draw(x, [constraints.Box(-1.0, 3.0)], 1.0, source) for _ in range(500)])
    # Uniform: mean 1 and deviation 4 / sqrt(12), to five standard errors of 6,000 draws.
    assert float(box.mean()) == pytest.approx(1, abs=0.08)
    assert float(box.std()) == pytest.approx(4 / math.sqrt(12), abs=0.05)


def _near(constraint: Any, y: Tensor) -> bool:
    """In the set up to rounding."""
    return float((constraint.project(y) - y).abs().max()) <= 1e-15


def test_callback_stops_the_whole_search() -> None:
    f, g, u, v = quadratic_start()
    seen = list[int]()

    def stop(result: MinimizeResult) -> bool:
        seen.append(result.evaluations)
        return len(seen) == 4

    result = minimize(f, g, u, v, restarts=20, callback=stop)
    assert result.status == "stopped"
    assert len(seen) == 4
    assert seen == sorted(seen)  # evaluations go on counting from run to run


@pytest.mark.parametrize("budget", [1, 50, 100, 500])
def test_budget_covers_all_runs(budget: int) -> None:
    problem = testing.get("fixed_point")
    result = solve(problem, 0, restarts=20, max_evaluations=budget)
    assert result.evaluations <= budget
    assert result.status == ("budget" if budget < 500 else "converged")


def test_an_unfinished_run_does_not_win() -> None:
    """The best result is a finished one, whatever the others promise."""
    problem = testing.get("ripple")
    alone = solve(problem, 0)
    result = solve(problem, 0, restarts=20, max_evaluations=int(2.5 * alone.evaluations))
    assert result.converged
    assert result.upper_loss <= alone.upper_loss


def test_restarts_are_checked() -> None:
    f, g, u, v = quadratic_start()
    with pytest.raises(ValueError, match="restarts must be an integer >= 0"):
        minimize(f, g, u, v, restarts=-1)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got 'x'"):
        minimize(f, g, u, v, seed="x")  # type: ignore[arg-type]
