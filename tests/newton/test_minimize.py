"""minimize on problems with closed-form solutions, and its interface."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from solving import (
    ACCURACY,
    BUDGET,
    FREE,
    error,
    generator,
    lower_loss,
    quadratic_start,
    solve,
    square,
    vector,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from torch_penalty_bilevel import MinimizeResult, functional, minimize, testing
from torch_penalty_bilevel.newton import lower_hessian as hessian_module
from torch_penalty_bilevel.newton.lower_hessian import Spectral


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
@pytest.mark.long
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
    enough = solve(testing.get("quadratic"), 0, max_evaluations=full.evaluations)
    assert "no evaluations were left" not in enough.message


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
    assert result.converged  # to what float32 can reach
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
