"""Hypergradients where something is exactly zero or not a number, by every method."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from hypergradient_runs import Run
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

from torch_penalty_bilevel import BilevelWarning, FiniteDifference
from torch_penalty_bilevel.functional import hypergradient, penalty_gradient
from torch_penalty_bilevel.hypergradients import OPTIONS_OF


@pytest.mark.parametrize("method", OPTIONS_OF)
def test_without_a_slope_the_adjoint_zero_is_exact(method: str) -> None:
    u = torch.tensor([1.0, 2.0])
    f, g = lambda u, v: u.square().sum() + 0 * v.sum(), lambda u, v: (v - u).square().sum()
    options = {"step_size": 0.25} if method == "one_step" else {}
    gradient, info = hypergradient(f, g, u, u.clone(), method=method, **options)
    assert_close(gradient, 2 * u, rtol=0, atol=0)
    assert info.converged
    assert info.residual_norm == 0


@pytest.mark.parametrize("method", ["neumann", "fixed_point", "stochastic"])
def test_without_curvature_nothing_is_solved(method: str) -> None:
    """H = 0: the steps of 1 / ||H|| are steps of 1."""
    u = torch.ones(2)
    with pytest.warns(BilevelWarning, match="stopped after|diverged"):
        _, info = hypergradient(
            lambda u, v: v.sum(), lambda u, v: u @ v, u, u, method=method, max_iterations=5
        )
    assert not info.converged


@pytest.mark.parametrize("method", sorted(OPTIONS_OF.keys() - {"alternating", "forward"}))
def test_a_product_that_is_not_finite_has_that_name(method: str) -> None:
    """H q of |v|^1.5 is not a number at v = 0, and cg_normal is no remedy."""
    u = torch.zeros(2)
    how = {"step_size": 0.1} if "step_size" in OPTIONS_OF[method] else {}
    with pytest.warns(BilevelWarning) if method != "one_step" else contextlib.nullcontext():
        gradient, info = hypergradient(
            lambda u, v: v.sum() + v.square().sum(),
            lambda u, v: 0.5 * v @ v - (u * v).sum() + v.abs().pow(1.5).sum(),
            u,
            u.clone(),
            method=method,
            **how,
        )
    assert info.status == "not_finite"
    assert gradient.isnan().all()
    assert "product that is not finite" in info.message
    assert "cg_normal" not in info.message.partition("diverged")[0]


@pytest.mark.parametrize("method", ["cg_normal", "approx_grad"])
def test_less_than_a_pair_of_products_is_refused(method: str) -> None:
    """One product would leave q at its start for ever, and u where it is."""
    u = torch.ones(2)
    f, g = lambda u, v: v.sum(), lambda u, v: (v - u).square().sum()
    with pytest.raises(ValueError, match=r"max_iterations=1 leaves q where it is .* at least 2"):
        hypergradient(f, g, u, u, method=method, max_iterations=1)
    with pytest.raises(ValueError, match="inner_iterations=1 leaves q where it is"):
        Run(method=method, inner_iterations=1)
    run = Run(method=method, inner_iterations=lambda k: 2 - k)
    run.step()
    with pytest.raises(ValueError, match="inner_iterations=1 leaves q where it is"):
        run.step()


def test_sensitivities_that_are_not_numbers_are_not_certified() -> None:
    """sqrt(u^2) at 0: r is finite, dr/du is 0 / 0."""
    f, g = lambda u, v: v.square().sum(), lambda u, v: (v - u.square().sqrt()).square().sum()
    zero = torch.zeros(1)
    with pytest.warns(BilevelWarning, match="sensitivities of v have residual nan"):
        _, info = hypergradient(f, g, zero, zero + 1, method="forward", step_size=0.5)
    assert not info.converged


def test_after_a_breakdown_no_part_is_a_plausible_number() -> None:
    """Also that of an upper tensor which could do without an adjoint."""
    u = torch.ones(2)
    with pytest.warns(BilevelWarning, match="not positive definite"):
        gradients, _ = hypergradient(
            lambda u, v: v.sum() + u[1].sum(), lambda u, v: -(v - u[0]).square().sum(), (u, u), u
        )
    assert all(gradient.isnan().all() for gradient in gradients)


def test_the_error_of_sensitivities_is_relative_to_what_they_solve_for() -> None:
    """g = a (v - u)^2 / 2: after T steps ||dr/du + dr/dv Z|| / ||dr/du|| = (1 - eta a)^T."""
    u = torch.ones(1)
    for a in (1e-2, 1e2):
        for tolerance, enough in ((2 * 0.5**10, True), (0.5 * 0.5**10, False)):
            f, g = lambda u, v: v.sum(), lambda u, v, a=a: a * (v - u).square().sum() / 2
            options = {"step_size": 0.5 / a, "lower_steps": 10, "tolerance": tolerance}
            with contextlib.nullcontext() if enough else pytest.warns(BilevelWarning):
                _, info = hypergradient(f, g, u, u, method="forward", **options)
            assert info.converged == enough
            assert info.residual_norm == pytest.approx(a * 0.5**10, rel=1e-9)


@pytest.mark.parametrize("central", [False, True])
def test_products_are_counted_at_what_they_cost(central: bool) -> None:
    run = Run(method="one_step", curvature=FiniteDifference(central=central))
    run.step()
    # One lower gradient, f, r at the end, and a difference of one or two gradients.
    assert run.optimizer.metrics.gradient_evaluations == (5 if central else 4)


def closed_over(x: Tensor, method: str) -> tuple[Tensor, Any]:
    """The hypergradient of losses that close over ``x``."""
    options: dict[str, Any] = {"step_size": 0.2} if method == "one_step" else {}
    if method in ("reverse", "forward"):
        options = {"step_size": 0.2, "lower_steps": 60}
    u, v = torch.tensor(1.0), torch.tensor(2.0)
    losses = lambda u, v: x * u * v + v**2, lambda u, v: (v - x * u) ** 2
    return hypergradient(*losses, u, v, method=method, **options)


@pytest.mark.filterwarnings("ignore:hypergradient")
@pytest.mark.parametrize("method", OPTIONS_OF)
def test_what_losses_close_over_may_require_gradients(method: str) -> None:
    """At v = v* = x u: f_u + x f_v = 2 x^2 u + 2 x v, less what a method leaves out."""
    gradient, info = closed_over(torch.tensor(2.0, requires_grad=True), method)
    assert not gradient.requires_grad
    assert info.adjoint is None or not info.adjoint.requires_grad
    share = {"one_step": 0.4, "alternating": 0.0}.get(method, 1.0)
    assert_close(gradient, torch.tensor(4.0 + share * 12.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", OPTIONS_OF)
def test_transformations_of_what_losses_close_over_are_refused(method: str) -> None:
    """The derivative would be 0, or that of a part: solvers detach what they carry along."""
    x = torch.tensor(2.0)
    with pytest.raises(TypeError, match=r"inside torch\.func\.grad, vjp or jvp"):
        torch.func.grad(lambda x: closed_over(x, method)[0])(x)
    with pytest.raises(TypeError, match=r"inside torch\.func\.grad, vjp or jvp"):
        torch.func.jvp(lambda x: closed_over(x, method)[0], (x,), (x,))
    with pytest.raises(TypeError, match=r"inside torch\.func\.vmap"):
        torch.func.vmap(lambda x: closed_over(x, method)[0])(torch.stack([x, x]))
    with forward_ad.dual_level(), pytest.raises(TypeError, match="nor on dual tensors"):
        closed_over(forward_ad.make_dual(x, x), method)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("leaf", [1.0, None, torch.tensor(1), torch.tensor(1j)])
def test_leaves_are_real_tensors(level: str, leaf: Any) -> None:
    at = {"upper": torch.ones(()), "lower": torch.ones(())}
    at[level] = {"w": [torch.ones(2), leaf]}
    for call in (hypergradient, functools.partial(penalty_gradient, weight=1.0)):
        with pytest.raises(
            TypeError, match=rf"{level}\['w'\]\[1\] must be a floating-point tensor"
        ):
            call(lambda u, v: v, lambda u, v: v, at["upper"], at["lower"])
