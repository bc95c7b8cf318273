"""minimize with constraints, on problems with closed-form solutions."""

from __future__ import annotations

import math

import pytest
import torch
from solving import limits, solve, square, vector
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import constraints, minimize, testing
from torch_penalty_bilevel.newton import active_set
from torch_penalty_bilevel.newton.barrier import barrier

# Starts in the branch of the global solution.
STARTS = {
    "ripple": (vector(1.3).double(), vector(-1.3).double()),
    "box": (vector(-0.5).double(), vector(1.0).double()),
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


# A multiplier that vanishes on an active bound, or a u that is not determined: the barrier alone
# ends with errors of 1e-2 to 1e-6 here.
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name",
    ["d_1992_01", "d_1978_01", "sa_1981_01", "morgan_patrone", "half_space", "mb_2007_16"],
)
def test_kinks_are_exact(name: str, seed: int) -> None:
    problem = testing.get(name)
    result = solve(problem, seed)
    assert float(problem.error(result.upper, result.lower)) <= 1e-9  # Newton's last step
    assert result.upper_loss == pytest.approx(problem.optimal_value, abs=1e-9)
    assert result.converged
    assert result.residual_norm <= 1e-8
    assert result.upper_grad_norm <= 1e-8


def test_jump_is_said() -> None:
    problem = testing.get("mb_2007_14")
    for seed in range(2):
        assert not solve(problem, seed).converged


def test_weakly_active_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the active-set equation is too large, the barrier's error stays, and is named."""
    monkeypatch.setattr(active_set, "DENSE", 0)
    problem = testing.get("d_1978_01")
    result = solve(problem, 0)
    assert result.status == "weakly_active"
    assert not result.converged
    assert 1e-6 < float(problem.error(result.upper, result.lower)) <= 5e-3
    finer = solve(problem, 0, tolerance=1e-11)
    improved = problem.error(result.upper, result.lower) / 4
    assert problem.error(finer.upper, finer.lower) < improved


def path(f_scale: float, g_scale: float) -> tuple[list[Tensor], int]:
    problem = testing.get("sa_1981_01")
    seen = list[Tensor]()
    result = minimize(
        lambda u, v: f_scale * problem.upper_loss(u, v),
        lambda u, v: g_scale * problem.lower_loss(u, v),
        *problem.start(torch.Generator().manual_seed(0)),
        **limits(problem),
        callback=lambda r: seen.append(torch.cat([r.upper, r.lower])),
    )
    return [*seen, torch.cat([result.upper, result.lower])], result.evaluations


@pytest.mark.parametrize("scales", [(2.0**14, 1.0), (1.0, 2.0**-14), (2.0**-14, 2.0**14)])
def test_scale_of_the_losses_leaves_the_path_as_it_is(scales: tuple[float, float]) -> None:
    """A power of four (its root is taken) changes no rounding: the path is the same, bit by bit."""
    (wanted, count), (found, again) = path(1.0, 1.0), path(*scales)
    assert again == count
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("scales", [(1e4, 1.0), (1e-4, 1.0), (1.0, 1e4), (1.0, 1e-4)])
def test_scale_of_the_losses_hardly_changes_the_path(scales: tuple[float, float]) -> None:
    (wanted, _), (found, _) = path(1.0, 1.0), path(*scales)
    for a, b in zip(wanted[:10], found[:10], strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)  # rounding, grown by the steps in between
    assert_close(wanted[-1], found[-1], rtol=0, atol=1e-9)


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


def test_a_solution_inside_the_constraints() -> None:
    """Everything vanishes there, so that nothing is left to be relative to."""
    result = minimize(
        lambda u, v: square(v),
        lambda u, v: square(v - u),
        torch.full((3,), 0.3),
        torch.full((3,), 0.3),
        upper_constraint=constraints.Box(-1.0, 1.0),
    )
    assert result.converged
    assert float(result.upper.norm()) <= 1e-8


def test_multiplier_at_an_active_bound() -> None:
    """q = -H^-1 f_v in the user's units: H = 10, f_v = 6 (1 - 2)."""
    result = minimize(
        lambda u, v: 3 * square(v - 2),
        lambda u, v: 5 * square(v - u),
        vector(0.0),
        vector(0.0),
        upper_constraint=constraints.Box(-1.0, 1.0),
    )
    assert_close(result.multiplier, vector(0.6), rtol=0, atol=1e-9)
    assert_close(result.upper, vector(1.0), rtol=0, atol=1e-12)
    # The certificate is that of the active-set equation, bound included.
    assert max(result.adjoint_residual_norm, result.upper_grad_norm) <= 1e-9
