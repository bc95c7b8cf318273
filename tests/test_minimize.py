"""minimize on problems with closed-form solutions, its parts against dense twins, its statuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.testing import assert_close

from torch_penalty_bilevel import (
    DoubleBackwardError,
    MinimizeResult,
    NonFiniteError,
    UnusedParameterError,
    functional,
    minimize,
    testing,
)
from torch_penalty_bilevel.linear_solve import conjugate_residual, lanczos_lowest
from torch_penalty_bilevel.solve import hessian as hessian_module
from torch_penalty_bilevel.solve.hessian import Spectral
from torch_penalty_bilevel.solve.losses import Losses
from torch_penalty_bilevel.solve.lower import solve_lower
from torch_penalty_bilevel.solve.reduced import ReducedHessian, linearise
from torch_penalty_bilevel.solve.trust_region import steihaug

ACCURACY = 1e-6
BUDGET = 5000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


def lower_loss(problem: testing.Problem) -> Any:
    """g; for an equilibrium v = Phi(u, v) the loss |v - Phi|^2 / 2."""
    if problem.lower_loss is not None:
        return problem.lower_loss
    return lambda u, v: square(v - problem.lower_map(u, v)) / 2


def solve(problem: testing.Problem, seed: int, **options: Any) -> MinimizeResult:
    start = problem.start(generator(seed))
    options = {"max_evaluations": BUDGET} | options
    return minimize(problem.upper_loss, lower_loss(problem), *start, **options)


def error(problem: testing.Problem, result: MinimizeResult) -> float:
    return float(problem.error(result.upper, result.lower))


def constrained(problem: testing.Problem) -> bool:
    limits = (problem.upper_box, problem.lower_box, problem.h_upper, problem.h_lower)
    return any(limit is not None for limit in limits)


FREE = [p.name for p in testing.problems() if not constrained(p)]


# The suite.


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [n for n in FREE if n not in ("coreset", "sine")])
def test_suite(name: str, seed: int) -> None:
    problem = testing.get(name)
    result = solve(problem, seed)
    assert error(problem, result) <= ACCURACY
    assert result.converged
    assert result.status == "converged"
    assert result.evaluations <= BUDGET
    # f is stationary up to second order: 1e-8 in u. "flat" loses accuracy as |v - v*|^3.
    assert result.upper_loss == pytest.approx(problem.optimal_value, abs=1e-9)
    assert result.upper_grad_norm <= 1e-6


@pytest.mark.parametrize("number", range(20, 25))
def test_smd_from_twenty_starts(number: int) -> None:
    for seed in range(20):
        problem = testing.get(f"smd{number}", seed=seed)
        result = solve(problem, 1000 + seed)
        assert error(problem, result) <= ACCURACY, seed
        assert result.converged, seed


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("sizes", [(4, 6), (10, 30)])
def test_condition_number(kappa: float, sizes: tuple[int, int]) -> None:
    problem = testing.get("quadratic", kappa=kappa, n_upper=sizes[0], n_lower=sizes[1])
    result = solve(problem, 0)
    assert error(problem, result) <= ACCURACY
    assert result.converged


@pytest.mark.parametrize("name", ["feature_ridge", "weighted_cleaning", "least_squares"])
def test_condition_number_of_the_data(name: str) -> None:
    problem = testing.get(name, kappa=1e3)
    result = solve(problem, 0)
    assert error(problem, result) <= ACCURACY
    assert result.converged


@pytest.mark.parametrize(
    ("f_scale", "g_scale"), [(1, 1e-3), (1, 1e3), (1e3, 1), (1e-3, 1), (1, 1e6)]
)
@pytest.mark.parametrize("name", ["quadratic", "fixed_point", "smd20", "smd23", "smd24"])
def test_scale_of_the_losses_does_not_matter(name: str, f_scale: float, g_scale: float) -> None:
    problem = testing.get(name)
    g = lower_loss(problem)
    result = minimize(
        lambda u, v: f_scale * problem.upper_loss(u, v),
        lambda u, v: g_scale * g(u, v),
        *problem.start(generator(0)),
        max_evaluations=BUDGET,
    )
    assert error(problem, result) <= ACCURACY
    assert result.converged


def test_units_of_the_lower_variables_do_not_matter() -> None:
    """v in other units makes H's eigenvalues span 1e9; its rank is still full."""
    problem, units = testing.get("quadratic"), torch.logspace(-2, 2, 6)
    u, v = problem.start(generator(0))
    result = minimize(
        lambda u, w: problem.upper_loss(u, w * units),
        lambda u, w: lower_loss(problem)(u, w * units),
        u,
        v / units,
    )
    assert float(problem.error(result.upper, result.lower * units)) <= ACCURACY


@pytest.mark.parametrize("name", ["quadratic", "feature_ridge", "least_squares", "smd24", "flat"])
def test_products_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lower variables: no dense H."""
    monkeypatch.setattr(hessian_module, "DENSE", 0)
    monkeypatch.setattr(Spectral, "__init__", None)
    problem = testing.get(name)
    result = solve(problem, 0, max_evaluations=40000)
    assert error(problem, result) <= ACCURACY
    assert result.converged


@pytest.mark.parametrize("seed", range(6))
def test_sine_ends_in_a_well(seed: int) -> None:
    """Exact within its well, t = 2 pi k - pi / 2; a better one may go unnoticed or be flagged."""
    problem = testing.get("sine")
    result = solve(problem, seed)
    t = float(result.upper + result.lower - 2)
    assert math.sin(t) == pytest.approx(-1, abs=1e-12)
    assert float(result.upper) == pytest.approx(t / 2, abs=1e-7)
    if result.converged:  # then no other well is better at this u
        assert_close(result.lower, problem.best_lower(result.upper), rtol=0, atol=1e-7)
    else:
        assert result.status == "lower_tie"


def test_sine_from_a_maximum_of_the_lower_level() -> None:
    problem = testing.get("sine")
    result = minimize(problem.upper_loss, lower_loss(problem), vector(1.0), vector(1 + math.pi / 2))
    t = float(result.upper + result.lower - 2)
    assert math.sin(t) == pytest.approx(-1, abs=1e-12)


def test_leaves_a_maximum_of_the_lower_level_without_slope() -> None:
    """g = (v^2 - 1)^2 from v = 0, where its gradient is exactly zero."""
    result = minimize(
        lambda u, v: square(v - u) + square(u),
        lambda u, v: square(v.square() - 1),
        vector(0.0),
        vector(0.0),
    )
    assert float(result.lower.abs()) == pytest.approx(1, abs=1e-8)
    assert_close(result.upper, result.lower / 2, rtol=0, atol=1e-7)


# What the result says.


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


def quadratic_start() -> tuple[Any, Any, Tensor, Tensor]:
    return (
        lambda u, v: square(v - 1) + square(u),
        lambda u, v: square(v - 2 * u),
        vector(3.0),
        vector(0.0),
    )


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


# The interface.


def test_inputs_are_not_modified() -> None:
    f, g, u, v = quadratic_start()
    u.requires_grad_()
    copies = u.detach().clone(), v.clone()
    with torch.no_grad():
        result = minimize(f, g, u, v)
    assert torch.equal(u, copies[0])
    assert torch.equal(v, copies[1])
    assert u.grad is None
    assert result.converged
    for tensor in (result.upper, result.lower, result.multiplier):
        assert not tensor.requires_grad
        assert tensor.data_ptr() not in (u.data_ptr(), v.data_ptr())


def test_callback() -> None:
    problem = testing.get("fixed_point")
    start = problem.start(generator(0))
    seen = list[MinimizeResult]()

    def third(result: MinimizeResult) -> bool:
        seen.append(result)
        return len(seen) == 3

    result = minimize(problem.upper_loss, lower_loss(problem), *start, callback=third)
    assert len(seen) == 3
    assert result.status == "stopped"
    assert torch.equal(result.upper, seen[-1].upper)
    losses = [r.upper_loss for r in seen]
    assert losses == sorted(losses, reverse=True)
    assert [r.evaluations for r in seen] == sorted({r.evaluations for r in seen})


@pytest.mark.parametrize("budget", [1, 5, 20, 50, 100, 200])
def test_budget_is_kept(budget: int) -> None:
    problem = testing.get("fixed_point")
    result = solve(problem, 0, max_evaluations=budget)
    assert result.evaluations <= budget
    assert result.status == "budget"
    assert torch.isfinite(result.upper).all()


def test_budget_spent_in_the_second_look_is_said() -> None:
    full = solve(testing.get("quadratic"), 0)
    result = solve(testing.get("quadratic"), 0, max_evaluations=full.evaluations - 1)
    assert result.converged
    assert "no evaluations were left" in result.message
    assert "no evaluations were left" not in full.message


def test_tolerance_has_an_effect() -> None:
    problem = testing.get("fixed_point")
    loose, tight = solve(problem, 0, tolerance=1e-2), solve(problem, 0, tolerance=1e-10)
    assert loose.evaluations < tight.evaluations
    assert loose.residual_norm > tight.residual_norm
    assert tight.upper_grad_norm < 1e-9


def test_float32() -> None:
    problem = testing.get("feature_ridge")
    start = (x.float() for x in problem.start(generator(0)))
    single = lambda loss: lambda u, v: loss(u.double(), v.double()).float()  # noqa: E731
    result = minimize(single(problem.upper_loss), single(lower_loss(problem)), *start)
    assert result.upper.dtype == result.lower.dtype == result.multiplier.dtype == torch.float32
    assert error(problem, result) <= 1e-2  # sqrt of float32's rounding, times the conditioning


def test_modules_and_pytrees() -> None:
    """Weight decays of a network's tensors, by functional_call; the hypergradient vanishes."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y, z, t = torch.randn(12, 3), torch.randn(12, 1), torch.randn(8, 3), torch.randn(8, 1)
    lower = {name: p.detach().clone() for name, p in net.named_parameters()}
    upper = {"decay": [torch.zeros(()), torch.zeros(4)], "shift": torch.zeros(1)}

    def f(u: Any, v: Any) -> Tensor:
        spread = square(torch.cat([u["decay"][0][None], u["decay"][1]]) + 1)
        return nn.functional.mse_loss(functional_call(net, v, z), t) + 0.1 * spread

    def g(u: Any, v: Any) -> Tensor:
        decays = [u["decay"][0], u["decay"][1], *u["decay"][1][:2]]
        fit = nn.functional.mse_loss(functional_call(net, v, x) + u["shift"].sin(), y)
        return fit + sum(
            (a.exp() * w.square().movedim(0, -1)).sum() / 4
            for a, w in zip(decays, v.values(), strict=True)
        )

    before = {name: p.clone() for name, p in lower.items()}
    result = minimize(f, g, upper, lower)
    assert result.converged or result.status in ("lower_tie", "lower_not_global")
    assert list(result.lower) == list(lower)
    assert result.upper["decay"][1].shape == (4,)
    assert result.upper["decay"][0].dim() == 0
    assert all(torch.equal(lower[k], before[k]) for k in lower)
    gradient, info = functional.hypergradient(f, g, result.upper, result.lower)
    assert info.converged
    for part in (*gradient["decay"], gradient["shift"]):
        assert float(part.norm()) < 1e-6
    for name, q in info.adjoint.items():
        assert_close(result.multiplier[name], q, rtol=1e-6, atol=1e-8)


def test_rows_that_torch_cannot_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """H by one product per row where vmap over the backward pass fails."""
    problem = testing.get("feature_ridge")
    batched = torch.autograd.grad

    def refusing(*args: Any, is_grads_batched: bool = False, **how: Any) -> Any:
        if is_grads_batched:
            raise RuntimeError("no batching rule")
        return batched(*args, **how)

    monkeypatch.setattr(torch.autograd, "grad", refusing)
    assert error(problem, solve(problem, 0)) <= ACCURACY


# The parts, against dense twins.


def manifold_point(problem: testing.Problem) -> tuple[Losses, Any]:
    losses = Losses(problem.upper_loss, lower_loss(problem), *problem.start(generator(5)), math.inf)
    low = solve_lower(losses, losses.u, losses.v, 1e-12)
    return losses, linearise(losses, losses.u, low)


@pytest.mark.parametrize("dense", [1000, 0])
@pytest.mark.parametrize(
    "name", ["quadratic", "scalar_ridge", "feature_ridge", "weighted_cleaning"]
)
def test_reduced_derivatives(name: str, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G and B are gradient and Hessian of u -> f(u, v*(u)), v* in closed form."""
    monkeypatch.setattr(hessian_module, "DENSE", dense)
    problem = testing.get(name)
    losses, at = manifold_point(problem)
    assert_close(at.low.v, problem.best_lower(at.u), rtol=1e-9, atol=1e-10)
    assert_close(at.gradient, problem.exact_hypergradient(at.u), rtol=1e-7, atol=1e-9)
    B = ReducedHessian(losses, at)
    found = torch.stack([B.product(e) for e in torch.eye(len(at.u))])
    wanted = jacrev(grad(problem.hyperobjective))(at.u)
    assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_dense_hessian_of_a_singular_level() -> None:
    """Pseudo-inverse, kernel and J against dense algebra; H = A'A of rank 3 in 6."""
    problem = testing.get("least_squares")
    losses, at = manifold_point(problem)
    g = lower_loss(problem)
    H = jacrev(grad(g, 1), 1)(at.u, at.low.v)
    J = jacrev(grad(g, 1), 0)(at.u, at.low.v).T
    found, y, p = Spectral(losses.lower(at.u, at.low.v)), torch.randn(6), torch.randn(3)
    assert found.nullity == 3
    kernel = torch.stack([found.lift(e) for e in torch.eye(3)], 1)
    assert_close(kernel.T @ kernel, torch.eye(3), rtol=0, atol=1e-12)
    assert_close(H @ kernel, torch.zeros(6, 3), rtol=0, atol=1e-9)
    assert_close(found.drop(y), kernel.T @ y, rtol=0, atol=1e-12)
    b = H @ y
    assert_close(H @ found.solve(b), b, rtol=0, atol=1e-9)
    assert_close(found.cross(y), J @ y, rtol=0, atol=1e-11)
    assert_close(found.cross_transposed(p), J.T @ p, rtol=0, atol=1e-11)


def test_rank_is_blind_to_units() -> None:
    """H = D A D with units D from 3e-4 to 3e3: eigenvalues span 1e14, the rank is that of A."""
    root, D = torch.randn(6, 6, generator=generator(0)), torch.logspace(-3.5, 3.5, 6)
    zero = torch.zeros(6)
    for rank in (6, 5):
        loss = lambda u, v, rank=rank: square(root[:rank] @ (D * v) - u[:rank]) / 2  # noqa: E731
        losses = Losses(loss, loss, zero, zero, math.inf)
        assert Spectral(losses.lower(zero, zero)).nullity == 6 - rank


def random_symmetric(n: int, low: float, seed: int = 0) -> Tensor:
    """Eigenvalues evenly from ``low`` to 3."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed))).Q
    return Q @ torch.diag(torch.linspace(low, 3, n)) @ Q.T


def model_decrease(B: Tensor, gradient: Tensor, s: Tensor) -> float:
    return -float(gradient @ s + s @ B @ s / 2)


def test_steihaug_inside_is_newton() -> None:
    B, gradient = random_symmetric(7, 0.1), torch.randn(7)
    metric = torch.rand(7) + 0.5
    for precondition in (lambda x: x, lambda x: x / metric):
        step = steihaug(
            lambda s: B @ s, gradient, 1e9, tolerance=1e-12, limit=50, precondition=precondition
        )
        assert step.interior
        assert_close(step.value, -torch.linalg.solve(B, gradient), rtol=1e-9, atol=1e-9)
        assert step.decrease == pytest.approx(model_decrease(B, gradient, step.value), rel=1e-9)


@pytest.mark.parametrize("low", [-2.0, 0.1])
def test_steihaug_on_the_boundary(low: float) -> None:
    """Length, decrease, and at least the decrease of the best step along the gradient."""
    B, gradient, radius = random_symmetric(7, low), torch.randn(7), 0.3
    step = steihaug(lambda s: B @ s, gradient, radius, tolerance=1e-12, limit=50)
    assert not step.interior
    assert float(step.value.norm()) == pytest.approx(radius, rel=1e-12)
    assert step.decrease == pytest.approx(model_decrease(B, gradient, step.value), rel=1e-9)
    length = float(gradient.norm())
    steepest = -radius * gradient / length
    cauchy = max(model_decrease(B, gradient, t * steepest) for t in torch.linspace(0, 1, 99))
    assert step.decrease >= cauchy


def test_steihaug_does_not_follow_rounding() -> None:
    B, gradient = vector(1.0, 1e-17), vector(1.0, 1e-12)
    step = steihaug(lambda s: B * s, gradient, 1e9, tolerance=1e-15, limit=9)
    assert_close(step.value, vector(-1.0, 0.0), rtol=0, atol=1e-11)
    linear = steihaug(lambda s: 0 * s, gradient, 2.0, tolerance=1e-9, limit=9)
    assert_close(linear.value, -2 * gradient, rtol=1e-9, atol=1e-20)
    assert linear.decrease == pytest.approx(2)


def test_conjugate_residual_splits_range_and_kernel() -> None:
    root = torch.randn(4, 9, generator=generator(1))
    A, b = root.T @ root, torch.randn(9, generator=generator(2))
    x, rest = conjugate_residual(lambda y: A @ y, b, max_iterations=50)
    inverse = torch.linalg.pinv(A, rtol=1e-10)
    assert_close(x, inverse @ b, rtol=1e-6, atol=1e-6)
    assert_close(rest, b - A @ (inverse @ b), rtol=0, atol=1e-7)
    x, rest = conjugate_residual(lambda y: 0 * y, b, max_iterations=50)
    assert torch.equal(rest, b)
    assert not x.any()


def test_lanczos_finds_the_lowest() -> None:
    A = random_symmetric(12, -0.7, seed=4)
    ratio, x = lanczos_lowest(lambda y: A @ y, torch.zeros(12))
    assert ratio == pytest.approx(-0.7 / 3, rel=1e-9)
    assert_close(A @ x, -0.7 * x, rtol=0, atol=1e-8)
    assert lanczos_lowest(lambda y: 2 * y, torch.zeros(5))[0] == pytest.approx(1)
