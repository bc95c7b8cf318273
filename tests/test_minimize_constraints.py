"""minimize with constraints, on problems with closed-form solutions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import MinimizeResult, minimize, testing
from torch_penalty_bilevel.solve.barrier import barrier

constraints = pytest.importorskip("torch_penalty_bilevel.constraints")


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


def restriction(box: Any, h: Any) -> Any:
    parts = [] if box is None else [constraints.Box(*box)]
    return (parts if h is None else [*parts, constraints.Inequality(h)]) or None


def solve(problem: testing.Problem, start: tuple[Tensor, Tensor], **options: Any) -> MinimizeResult:
    return minimize(
        problem.upper_loss,
        problem.lower_loss,
        *start,
        upper_constraint=restriction(problem.upper_box, problem.h_upper),
        lower_constraint=restriction(problem.lower_box, problem.h_lower),
        **options,
    )


# Starts in the branch of the global solution.
STARTS = {
    "ripple": (vector(1.3).double(), vector(-1.3).double()),
    "box": (vector(-0.5).double(), vector(1.0).double()),
    "cw_1990_02": (vector(1.5).double(), vector(3.0).double()),
    "b_1988_01": (vector(2.0).double(), vector(1.5).double()),
    "mb_2007_17": (vector(0.5).double(), vector(0.7).double()),
}


@pytest.mark.parametrize("name", STARTS)
def test_suite(name: str) -> None:
    problem = testing.get(name)
    result = solve(problem, STARTS[name], max_evaluations=5000)
    assert float(problem.error(result.upper, result.lower)) <= 1e-6
    assert result.upper_loss == pytest.approx(problem.optimal_value, abs=1e-6)
    assert result.converged


@pytest.mark.parametrize("name", ["d_1992_01", "d_1978_01", "sa_1981_01"])
def test_kinks_are_said(name: str) -> None:
    """No strict complementarity: the barrier's error is about sqrt(tolerance)."""
    problem = testing.get(name)
    start = problem.start(torch.Generator().manual_seed(0))
    result = solve(problem, start)
    assert float(problem.error(result.upper, result.lower)) <= 5e-3
    assert result.status == "weakly_active"
    assert not result.converged
    if name == "d_1978_01":
        finer = solve(problem, start, tolerance=1e-11)
        improved = problem.error(result.upper, result.lower) / 4
        assert problem.error(finer.upper, finer.lower) < improved


@pytest.mark.parametrize("name", ["mb_2007_14", "lmp_1987_01"])
def test_jumps_are_said(name: str) -> None:
    problem = testing.get(name)
    for seed in range(2):
        result = solve(problem, problem.start(torch.Generator().manual_seed(seed)))
        assert not result.converged


@pytest.mark.parametrize("feasible", [True, False])
def test_box_entry_by_entry(feasible: bool) -> None:
    """v = u and |v - t|^2 / 2: u = t clipped, from inside and from outside."""
    t = vector(2.0, -3.0, 0.5, 0.0, 1.5)
    low, high = vector(-1.0, -1.0, -1.0, -math.inf, -1.0), vector(1.0, 1.0, 1.0, 1.0, math.inf)
    result = minimize(
        lambda u, v: square(v - t) / 2,
        lambda u, v: square(v - u) / 2,
        torch.zeros(5) if feasible else 4 * torch.ones(5),
        torch.zeros(5),
        upper_constraint=constraints.Box(low, high),
    )
    wanted = torch.minimum(torch.maximum(t, low), high)
    assert_close(result.upper, wanted, rtol=0, atol=1e-6)
    assert result.upper_loss == pytest.approx(float(square(wanted - t) / 2), abs=1e-6)
    assert result.converged


def test_non_negative_in_the_lower_level() -> None:
    """v = max(u, 0): the negative target is not reached, the other one is."""
    t = vector(1.0, -1.0)
    result = minimize(
        lambda u, v: square(v - t) / 2 + square(u - t) / 2,
        lambda u, v: square(v - u) / 2,
        vector(0.5, 0.5),
        vector(1.0, 1.0),
        lower_constraint=constraints.NonNegative(),
    )
    assert_close(result.lower, vector(1.0, 0.0), rtol=0, atol=1e-6)
    assert_close(result.upper, t, rtol=0, atol=1e-6)
    assert result.lower_loss == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_ball(rows: bool) -> None:
    """f = |u - t|^2 / 2: t scaled down to the radius."""
    t = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    result = minimize(
        lambda u, v: square(v - t) / 2,
        lambda u, v: square(v - u) / 2,
        torch.zeros(2, 2),
        torch.zeros(2, 2),
        upper_constraint=constraints.Ball(2.0, rows=rows),
    )
    wanted = t * (2 / t.norm()) if not rows else torch.stack([t[0] * 0.4, t[1]])
    assert_close(result.upper, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1])
def test_simplex(level: int) -> None:
    """The projection of t on the simplex, through the upper level or by the lower one."""
    t = vector(0.9, 0.4, -0.5)
    wanted = vector(0.75, 0.25, 0.0)
    start, simplex = torch.full((3,), 1 / 3), constraints.Simplex()
    if level == 0:
        result = minimize(
            lambda u, v: square(v - t),
            lambda u, v: square(v - u),
            start,
            start,
            upper_constraint=simplex,
        )
        assert_close(result.upper, wanted, rtol=0, atol=1e-6)
        assert float(result.upper.sum()) == pytest.approx(1, abs=1e-14)
    else:
        result = minimize(
            lambda u, v: square(u - t) + square(v - wanted),
            lambda u, v: square(v - u),
            start,
            start,
            lower_constraint=simplex,
        )
        assert_close(result.upper, t, rtol=0, atol=1e-6)
        assert float(result.multiplier.sum()) == pytest.approx(0, abs=1e-12)
    assert_close(result.lower, wanted, rtol=0, atol=1e-6)
    assert "not unique" not in result.message


def test_inequality_in_both_variables() -> None:
    """g = |v - u|^2 / 2 with v <= 1 - u, so v = min(u, 1 - u); f likes v = 2, u = 1/4: v = 1/2."""
    result = minimize(
        lambda u, v: square(v - 2) + square(u - 0.25),
        lambda u, v: square(v - u) / 2,
        vector(0.2),
        vector(0.0),
        lower_constraint=constraints.Inequality(lambda u, v: v + u - 1),
    )
    # On u >= 1/2, f = (1 + u)^2 + (u - 1/4)^2 rises; below, (u - 2)^2 + (u - 1/4)^2 falls.
    assert_close(result.upper, vector(0.5), rtol=0, atol=1e-3)
    assert_close(result.lower, vector(0.5), rtol=0, atol=1e-3)


def test_losses_are_reported_without_the_barrier() -> None:
    problem = testing.get("d_1978_01")
    result = solve(problem, problem.start(torch.Generator().manual_seed(0)), tolerance=1e-2)
    at = result.upper, result.lower
    assert result.upper_loss == pytest.approx(float(problem.upper_loss(*at)), rel=1e-14)
    assert result.lower_loss == pytest.approx(float(problem.lower_loss(*at)), rel=1e-14)


def test_infeasible_is_said() -> None:
    loss = lambda u, v: square(v - u) + square(u)  # noqa: E731
    box, h = constraints.Box(0.0, 1.0), constraints.Inequality(lambda u, v: 2 - u)
    result = minimize(loss, loss, vector(0.5), vector(0.5), upper_constraint=[box, h])
    assert result.status == "infeasible"
    assert not result.converged
    assert "start inside" in result.message


def test_other_constraints_are_refused() -> None:
    loss = lambda u, v: square(v - u)  # noqa: E731
    with pytest.raises(TypeError, match="upper_constraint must be Box"):
        minimize(loss, loss, vector(1.0), vector(1.0), upper_constraint=3.0)
    with pytest.raises(ValueError, match="at least two entries"):
        minimize(loss, loss, vector(1.0), vector(1.0), lower_constraint=constraints.Simplex())


def test_barrier_is_smooth_and_convex() -> None:
    """Value, slope and curvature agree where the logarithm becomes a parabola, z = tau / 100."""
    tau, delta = 0.1, 1e-3

    class Values:
        def values(self, u: Tensor, v: Tensor) -> Tensor:
            return -u

    phi = barrier(lambda u, v: 0 * u.sum(), Values(), tau)  # type: ignore[arg-type]

    def derivatives(z: float) -> list[float]:
        u = vector(z).requires_grad_()
        value = phi(u, None)
        (slope,) = torch.autograd.grad(value, u, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), u)
        return [x.item() for x in (value, slope, curvature)]

    for below, above in zip(
        derivatives(delta * (1 - 1e-9)), derivatives(delta * (1 + 1e-9)), strict=True
    ):
        assert below == pytest.approx(above, rel=1e-7)
    z = 0.5
    assert derivatives(z) == pytest.approx([-tau * math.log(z), -tau / z, tau / z**2])
