"""What the result of minimize says: certificate, statuses with remedies, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from solving import (
    ACCURACY,
    error,
    generator,
    lower_loss,
    quadratic_start,
    solve,
    square,
    vector,
)
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.testing import assert_close

from torch_penalty_bilevel import (
    DoubleBackwardError,
    MinimizeResult,
    NonFiniteError,
    UnusedParameterError,
    minimize,
    testing,
)


def test_certificate() -> None:
    """Every number of the result against autograd, at a point that is not the solution."""
    problem = testing.get("fixed_point")
    f, g = problem.upper_loss, lower_loss(problem)
    seen = list[MinimizeResult]()
    minimize(f, g, *problem.start(generator(0)), callback=seen.append)
    result = seen[0]
    u, v, q = result.upper, result.lower, result.multiplier
    assert result.status == "running"
    assert not result.converged
    H, slope = jacrev(grad(g, 1), 1)(u, v), grad(f, 1)(u, v)
    assert_close(H @ q, -slope, rtol=1e-9, atol=1e-12)
    assert_close(result.residual_norm, float(grad(g, 1)(u, v).norm()), rtol=1e-6, atol=1e-16)
    assert result.residual_norm <= 1e-9
    assert result.adjoint_residual_norm <= 1e-12 * float(slope.norm())
    assert result.upper_loss == pytest.approx(float(f(u, v)), rel=1e-14)
    assert result.lower_loss == pytest.approx(float(g(u, v)), rel=1e-14, abs=1e-30)
    wanted = problem.exact_hypergradient(u)
    assert float(wanted.norm()) > 1e-3
    assert result.upper_grad_norm == pytest.approx(float(wanted.norm()), rel=1e-7)


def test_adjoint_residual_is_what_the_range_of_H_misses() -> None:
    """f = v_0 + v_1 with H = diag(1, 0) and v_1 bounded by f only: a = (0, f_v1)."""
    problem = testing.get("free_coordinate")
    seen = list[MinimizeResult]()
    solve(problem, 0, callback=seen.append)
    at = seen[0]
    gap = float(at.lower[1] - at.upper[0])
    assert at.adjoint_residual_norm == pytest.approx(abs(gap), abs=1e-13)
    assert "not unique" in at.message


def test_flat_lower_level_is_named() -> None:
    assert "lower level is flat" in solve(testing.get("flat"), 0).message
    assert "flat" not in solve(testing.get("quadratic"), 0).message


# Statuses: each provoked, each with a remedy.


def outcome(status: str) -> MinimizeResult:
    one, zero, parallel = vector(1.0), vector(0.0), lambda u, v: square(v - u)
    wells = lambda u, v: square(v.square() - 1) + 0.3 * u.sum() * v.sum()  # noqa: E731
    f, g, u, v = quadratic_start()
    cases: dict[str, Any] = {
        "converged": lambda: minimize(f, g, u, v),
        "flat_upper": lambda: solve(testing.get("coreset"), 0),
        "lower_tie": lambda: minimize(
            lambda u, v: square(v - 1) + square(u), lambda u, v: square(v.square() - 1), zero, -one
        ),
        "lower_not_global": lambda: minimize(
            lambda u, v: square(v - 1) + square(u - 1), wells, one, one
        ),
        "lower_not_solved": lambda: minimize(f, lambda u, v: u.sum() * v.sum() - square(v), u, v),
        "budget": lambda: minimize(f, g, u, v, max_evaluations=20),
        "stalled": lambda: minimize(lambda u, v: (v - 1).abs().sum(), parallel, u + 0.3, v),
        "unbounded": lambda: minimize(lambda u, v: -v.sum(), parallel, u, v),
        "stopped": lambda: minimize(f, g, u, v, callback=lambda _: True),
    }
    return cases[status]()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("converged", "conditions of both levels hold"),
        ("flat_upper", "regularise"),
        ("lower_tie", "start `lower` there"),
        ("lower_not_global", "start `lower` in the other one"),
        ("lower_not_solved", "start `lower` elsewhere"),
        ("budget", "raise it"),
        ("stalled", "smooth"),
        ("unbounded", "regularise"),
        ("stopped", "start from this result"),
    ],
)
def test_statuses(status: str, remedy: str) -> None:
    result = outcome(status)
    assert result.status == status
    assert result.converged == (status == "converged")
    assert remedy in result.message


def test_flat_upper_reaches_the_infimum() -> None:
    problem = testing.get("coreset")
    for seed in range(3):
        result = solve(problem, seed)
        assert error(problem, result) <= ACCURACY
        assert result.upper_loss == pytest.approx(problem.optimal_value, abs=1e-10)


@pytest.mark.parametrize(
    "f",
    [lambda u, v: -v.sum(), lambda u, v: -square(v), lambda u, v: -v.exp().sum()],
    ids=["linear", "quadratic", "exponential"],
)
def test_unbounded(f: Any) -> None:
    result = minimize(f, lambda u, v: square(v - u), vector(1.0), vector(0.0))
    assert result.status == "unbounded"
    assert result.upper_loss < -1e10


def test_leaves_a_maximum_of_the_reduced_loss() -> None:
    """F(u) = u^4 - u^2 from u = 0, where its gradient is exactly zero."""
    result = minimize(
        lambda u, v: square(v.square()) - square(v),
        lambda u, v: square(v - u),
        vector(0.0),
        vector(1.0),
    )
    assert result.converged
    assert float(result.upper.abs()) == pytest.approx(math.sqrt(0.5), abs=1e-7)


def test_leaves_a_saddle_of_the_reduced_loss() -> None:
    """F(u) = u_0^4 / 4 - u_0^2 + (u_1 - 1)^2 from (0, 1)."""
    result = minimize(
        lambda u, v: u[0] ** 4 / 4 - 2 * u[0] ** 2 + square(v - vector(0.0, 1.0)),
        lambda u, v: square(v - u),
        vector(0.0, 1.0),
        vector(1.0, 1.0),
    )
    assert result.converged
    assert_close(result.upper.abs(), vector(math.sqrt(2), 1.0), rtol=0, atol=1e-7)


def test_curved_solution_set() -> None:
    """The nearest point to (2, 1) of the circle |v|^2 = 1 + u, u = v_0 as f wants it."""
    target = vector(2.0, 1.0)
    result = minimize(
        lambda u, v: square(v - target) + 1e3 * square(u),
        lambda u, v: (square(v) - 1 - u.sum()) ** 2,
        vector(0.0),
        vector(-1.0, 0.5),
    )
    assert result.converged
    v, u = result.lower, result.upper
    assert float(square(v) - 1 - u) == pytest.approx(0, abs=1e-9)
    # Stationarity by hand: v - t = m v and 2000 u = m with the multiplier m of the circle.
    m = -2e3 * float(u)
    assert_close(2 * (v - target), 2 * m * v * 1.0, rtol=1e-6, atol=1e-6)


# Errors.


def test_non_finite_values_are_named() -> None:
    u, v, nan = vector(1.0), vector(1.0), float("nan")
    g = lambda u, v: square(v - u)  # noqa: E731
    with pytest.raises(NonFiniteError, match="upper loss"):
        minimize(lambda u, v: nan * v.sum(), g, u, v)
    with pytest.raises(NonFiniteError, match="lower loss at the start"):
        minimize(g, lambda u, v: nan * square(v - u), u, v)
    with pytest.raises(NonFiniteError, match="gradient of the upper loss"):
        minimize(lambda u, v: (v - v.detach()).clamp(min=0).sqrt().sum(), g, u, v)
    with pytest.raises(NonFiniteError, match="Hessian of the lower loss"):
        minimize(g, lambda u, v: ((v - u).abs() + 0.0).pow(1.5).sum(), u, u.clone())
    with pytest.raises(NonFiniteError, match=r"upper\['a'\] at the start"):
        minimize(g, g, {"a": vector(nan)}, v)


def test_unused_upper_parameter_is_named() -> None:
    upper = {"used": vector(1.0), "idle": vector(1.0)}
    f, g = lambda u, v: square(v), lambda u, v: square(v - u["used"]) + square(u["idle"])
    with pytest.raises(UnusedParameterError, match=r"upper\['idle'\]"):
        minimize(f, g, upper, vector(0.0))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent


def test_operations_that_cannot_be_differentiated_twice() -> None:
    f, _, u, v = quadratic_start()
    with pytest.raises(DoubleBackwardError, match="elementary operations"):
        minimize(f, lambda u, v: Once.apply(v - u).sum(), u, v)


@pytest.mark.parametrize(
    "g",
    [
        lambda u, v: square((v - u).relu()) + square(v) / 2,
        lambda u, v: (v - u).abs().sum() + square(v) / 2,
        lambda u, v: nn.functional.smooth_l1_loss(v, u) + square(v) / 20,
    ],
    ids=["relu", "abs", "huber"],
)
def test_losses_with_kinks_end(g: Any) -> None:
    result = minimize(lambda u, v: square(v - 1), g, vector(5.3), vector(0.0), max_evaluations=2000)
    assert result.status != "budget"
    assert result.message


def test_arguments_are_checked() -> None:
    f, g, u, v = quadratic_start()
    for options, name in (
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"max_evaluations": 0}, "max_evaluations"),
    ):
        with pytest.raises(ValueError, match=name):
            minimize(f, g, u, v, **options)
    with pytest.raises(TypeError, match="lower_loss must be callable"):
        minimize(f, 3, u, v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callback must be callable"):
        minimize(f, g, u, v, callback=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="upper is empty"):
        minimize(f, g, {}, v)
    with pytest.raises(ValueError, match="lower has no entries"):
        minimize(f, g, u, torch.zeros(0))
    with pytest.raises(TypeError, match="floating-point"):
        minimize(f, g, torch.tensor([1]), v)
    with pytest.raises(TypeError, match=r"lower\[1\] must be a floating-point tensor, got float"):
        minimize(f, g, u, (v, 1.0))
    with pytest.raises(ValueError, match="upper_loss must return a 0-d tensor"):
        minimize(lambda u, v: v + u, g, u, v)
