"""Every method of ``functional.hypergradient`` against closed forms, and what it says of itself."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import pytest
import torch
from hypergradient_runs import UNROLLED
from problems import ORACLES, normal
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import BilevelWarning, NonFiniteError, testing
from torch_penalty_bilevel.functional import HypergradientInfo, hypergradient
from torch_penalty_bilevel.hypergradients import OPTIONS_OF

PROBLEMS = (
    "quadratic", "scalar_ridge", "feature_ridge", "weighted_cleaning", "minimax", "fixed_point"
)  # fmt: skip
SOLVERS = ("cg", "cg_normal", "neumann", "fixed_point", "stochastic", "approx_grad")


ENOUGH = {
    "stochastic": {"max_iterations": 5000},
    "approx_grad": {"max_iterations": 5000},
    # Contraction 0.9 at the worst (eta = 1 / ||H||, condition 10, and more at other v): 1e-17.
    "reverse": {"lower_steps": 400},
    "forward": {"lower_steps": 400},
}


def setting(name: str) -> tuple[testing.Problem, Tensor, Tensor, dict[str, Any]]:
    problem = testing.get(name)
    u, v = problem.start(torch.Generator().manual_seed(0))
    return problem, u, v, {"lower_is_map": problem.lower_map is not None}


def call(problem: testing.Problem, u: Tensor, v: Tensor, **options: Any) -> Any:
    lower = problem.lower_map or problem.lower_loss
    return hypergradient(problem.upper_loss, lower, u, v, **options)


def unwarned(function: Any, *arguments: Any, **options: Any) -> tuple[Tensor, HypergradientInfo]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        return function(*arguments, **options)


def quietly(*arguments: Any, **options: Any) -> tuple[Tensor, HypergradientInfo]:
    return unwarned(call, *arguments, **options)


# Closed forms.


@pytest.mark.parametrize("method", SOLVERS + UNROLLED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_closed_forms(name: str, method: str) -> None:
    """Implicit methods at v*(u), unrolled ones from a random v."""
    problem, u, v, options = setting(name)
    if method in SOLVERS:
        v = problem.best_lower(u)
    before = v.clone()
    gradient, info = call(problem, u, v, method=method, **options, **ENOUGH.get(method, {}))
    assert info.converged
    assert info.message == "converged"
    # 1e-10 times ||J A^{-1}||, which is below 100 here.
    assert_close(gradient, problem.exact_hypergradient(u), rtol=0, atol=1e-8)
    assert torch.equal(v, before)
    assert not gradient.requires_grad


@pytest.mark.parametrize("method", SOLVERS + UNROLLED)
@pytest.mark.parametrize("name", ["quadratic", "fixed_point"])
def test_stopped_early_says_so(name: str, method: str) -> None:
    problem, u, v, options = setting(name)
    key = "lower_steps" if method in UNROLLED else "max_iterations"
    with pytest.warns(BilevelWarning, match=f"raise {key}|raise max_iterations") as record:
        gradient, info = call(problem, u, v, method=method, **options, **{key: 2})
    # The first use of torch.func.jvp warns of something of torch's own.
    ours = [w for w in record if issubclass(w.category, BilevelWarning)]
    assert [w.filename for w in ours] == [__file__]
    assert not info.converged
    assert info.residual_norm > 1e-8
    assert gradient.isfinite().all()


@pytest.mark.parametrize("method", [m for m in OPTIONS_OF if m != "forward"])
@pytest.mark.parametrize("name", ["quadratic", "fixed_point"])
def test_residual_norm_is_the_certificate(name: str, method: str) -> None:
    """The residual ||A q + grad_v f|| of the adjoint returned, at v (of reverse: at v_T)."""
    problem, u, v, options = setting(name)
    key = {"reverse": "lower_steps", "one_step": None, "alternating": None}
    count = key.get(method, "max_iterations")
    if count:
        options[count] = 4
    if method in ("neumann", "fixed_point", "stochastic", "reverse", "one_step"):
        options["step_size"] = 0.05
    _, info = quietly(problem, u, v, method=method, **options)

    def residual(v: Tensor) -> Tensor:
        if problem.lower_map:
            return v - problem.lower_map(u, v)
        return torch.func.grad(problem.lower_loss, argnums=1)(u, v)

    if method == "reverse":
        for _ in range(4):
            v = v - 0.05 * residual(v)
    slope = torch.func.grad(problem.upper_loss, argnums=1)(u, v)
    matrix = torch.func.jacrev(residual)(v)
    expected = float((slope + matrix.T @ info.adjoint).norm())
    assert info.residual_norm == pytest.approx(expected, rel=1e-10)
    assert info.converged == (expected <= 1e-10 * float(slope.norm()))


# Between the methods.


def test_reverse_from_the_solution_is_the_neumann_series() -> None:
    problem, u, _, _ = setting("feature_ridge")
    v = problem.best_lower(u)
    unrolled, there = quietly(problem, u, v, method="reverse", lower_steps=8, step_size=0.1)
    series, info = quietly(problem, u, v, method="neumann", max_iterations=7, step_size=0.1)
    assert_close(unrolled, series, rtol=1e-10, atol=1e-14)
    assert_close(there.adjoint, info.adjoint, rtol=1e-10, atol=1e-14)


def test_one_step_is_one_lower_step_at_its_end_and_alternating_is_the_direct_gradient() -> None:
    problem, u, v, _ = setting("quadratic")
    one, info = call(problem, u, v, method="one_step", step_size=0.1)
    f_u, f_v = torch.func.grad(problem.upper_loss, argnums=(0, 1))(u, v)
    cross = torch.func.jacrev(torch.func.grad(problem.lower_loss, argnums=1), argnums=0)(u, v)
    assert_close(one, f_u - 0.1 * cross.T @ f_v, rtol=1e-12, atol=1e-13)
    assert info.iterations == 0
    direct, info = call(problem, u, v, method="alternating")
    assert torch.equal(direct, f_u)
    assert torch.equal(info.adjoint, torch.zeros_like(v))
    assert not info.converged
    with pytest.raises(ValueError, match="needs step_size"):
        call(problem, u, v, method="one_step")


def test_one_step_is_exact_where_the_hessian_is_a_multiple_of_the_identity() -> None:
    u = normal(3, seed=1)  # v = u, H = 5 I
    f, g = lambda u, v: v.sin().sum(), lambda u, v: 2.5 * (v - u).square().sum()
    gradient, info = hypergradient(f, g, u, u, method="one_step", step_size=0.2)
    assert info.converged
    assert_close(gradient, u.cos(), rtol=1e-14, atol=0)


# Options.


@pytest.mark.parametrize("method", OPTIONS_OF)
def test_options_a_method_does_not_have_are_refused(method: str) -> None:
    problem, u, v, _ = setting("quadratic")
    values = {
        "tolerance": 1e-3, "max_iterations": 3, "damping": 0.1, "start": v, "step_size": 0.1,
        "lower_steps": 2, "truncation": 1, "linear_optimizer": torch.optim.SGD, "samples": 2,
    }  # fmt: skip
    signature = inspect.signature(hypergradient).parameters
    assert set(values) == set(signature) - {
        "upper_loss", "lower_loss", "upper", "lower", "method", "lower_is_map"
    }  # fmt: skip
    for name, value in values.items():
        if name not in OPTIONS_OF[method]:
            with pytest.raises(ValueError, match=rf"{name}=.*no effect with method='{method}'"):
                call(problem, u, v, method=method, **{name: value})


@pytest.mark.parametrize(
    ("method", "options", "error", "match"),
    [
        (
            "neumann",
            {"step_size": 0.0},
            ValueError,
            "step_size must be a finite number > 0, got 0.0",
        ),
        ("neumann", {"step_size": math.inf}, ValueError, "step_size"),
        ("reverse", {"lower_steps": 0}, ValueError, "lower_steps must be an integer >= 1, got 0"),
        ("reverse", {"truncation": 1.5}, ValueError, "truncation must be an integer >= 1, got 1.5"),
        ("stochastic", {"samples": 0}, ValueError, "samples must be an integer"),
        ("stochastic", {"linear_optimizer": 3}, TypeError, "linear_optimizer must be a function"),
        ("cg", {"start": torch.zeros(2)}, ValueError, "a start tensor has shape"),
        ("cg", {"start": [torch.zeros(6)]}, ValueError, "start has structure"),
    ],
)
def test_bad_options(method: str, options: Any, error: type[Exception], match: str) -> None:
    problem, u, v, _ = setting("quadratic")
    with pytest.raises(error, match=match):
        call(problem, u, v, method=method, **options)


@pytest.mark.parametrize("method", SOLVERS)
def test_start_and_damping(method: str) -> None:
    problem, u, _, options = setting("quadratic")
    v = problem.best_lower(u)
    options |= {"damping": 2.0, "method": method} | ENOUGH.get(method, {})
    gradient, info = call(problem, u, v, **options)
    f_u, f_v = torch.func.grad(problem.upper_loss, argnums=(0, 1))(u, v)
    H = torch.func.hessian(problem.lower_loss, argnums=1)(u, v)
    J = torch.func.jacrev(torch.func.grad(problem.lower_loss, argnums=1), argnums=0)(u, v).T
    q = -torch.linalg.solve(H + 2 * torch.eye(6), f_v)
    assert_close(info.adjoint, q, rtol=0, atol=1e-8)
    assert_close(gradient, f_u + J @ q, rtol=0, atol=1e-8)
    again, warm = call(problem, u, v, start=info.adjoint, **options)
    assert warm.iterations <= 1  # a Neumann series has one term
    assert_close(again, gradient, rtol=0, atol=1e-8)


def test_a_method_that_breaks_down_gives_nan() -> None:
    problem, u, v, _ = setting("quadratic")  # ||H|| = 10
    for method in ("neumann", "fixed_point"):
        with pytest.warns(BilevelWarning, match="diverged.*step_size"):
            gradient, info = call(problem, u, v, method=method, step_size=1.0)
        assert gradient.isnan().all()
        assert info.adjoint.isnan().all()
        assert not info.converged
    with pytest.raises(NonFiniteError, match="not finite"):  # v itself runs away
        call(problem, u, v, method="reverse", step_size=10.0, lower_steps=500)
    with pytest.warns(BilevelWarning):  # an upper tensor that only g sees is NaN, not zero
        gradient, _ = hypergradient(
            lambda u, v: v.sum(), lambda u, v: -(v - u).square().sum(), u[:2], v[:2]
        )
    assert gradient.isnan().all()


def test_large_is_not_infinite() -> None:
    """Gradients are finite, their norm is not (float32): no error, and nothing is certified."""
    u = torch.ones(3, dtype=torch.float32)
    f, g = lambda u, v: 1e30 * (u + v).sum(), lambda u, v: (v - u).square().sum()
    gradient, info = hypergradient(f, g, u, u, method="alternating")
    assert_close(gradient, torch.full_like(u, 1e30))
    assert not info.converged
    for method in SOLVERS:
        _, info = unwarned(hypergradient, f, g, u, u, method=method)
        assert not info.converged, method


def test_a_map_must_look_like_the_lower_level() -> None:
    v = {"a": torch.zeros(2), "b": torch.zeros(1)}
    phi = lambda u, v: {"a": v["a"] / 2 + u, "b": v["b"] / 3}  # noqa: E731
    f = lambda u, v: (v["a"] * torch.tensor([1.0, 3.0])).sum()  # noqa: E731
    for method in ("cg_normal", "fixed_point", "reverse", "forward"):
        gradient, info = hypergradient(
            f, phi, torch.tensor(1.0), v, lower_is_map=True, method=method
        )
        assert float(gradient) == pytest.approx(8.0, abs=1e-8)
        assert info.adjoint is None or set(info.adjoint) == {"a", "b"}
    with pytest.raises(ValueError, match=r"Phi.* has structure"):
        hypergradient(f, lambda u, v: v["a"], torch.tensor(1.0), v, lower_is_map=True)


@pytest.mark.parametrize("method", [*SOLVERS, *UNROLLED, "one_step", "alternating"])
def test_pytrees_and_float32(method: str) -> None:
    oracle = ORACLES["quadratic"]()
    low = lambda tree: torch.utils._pytree.tree_map(lambda t: t.float(), tree)  # noqa: E731
    options: dict[str, Any] = {"method": method} | ENOUGH.get(method, {})
    if method == "one_step":
        options["step_size"] = 0.1
    gradient, _ = hypergradient(oracle.f, oracle.g, oracle.upper, oracle.lower, **options)
    single, info = hypergradient(
        lambda u, v: oracle.f(*double(u, v)).float(),
        lambda u, v: oracle.g(*double(u, v)).float(),
        low(oracle.upper),
        low(oracle.lower),
        **options,
    )
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(single), leaves(gradient), strict=True):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, rtol=1e-3, atol=1e-3)  # 100 eps times the condition number
    assert info.converged == (method not in ("one_step", "alternating"))


def double(*trees: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double(), trees)


# Stochastic.
