"""``functional.hypergradient`` by its default method: closed forms, damping, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import EXACT, ORACLES, Oracle, Quadratic, join, quadratic_pair, scalar_ridge
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from torch_penalty_bilevel import BilevelWarning, NonFiniteError
from torch_penalty_bilevel.functional import hypergradient
from torch_penalty_bilevel.tensors import Pair


@pytest.mark.parametrize("name", ORACLES)
def test_closed_forms(name: str) -> None:
    oracle = ORACLES[name]()
    gradient, info = hypergradient(oracle.f, oracle.g, oracle.upper, oracle.lower)
    assert pytree.tree_structure(gradient) == pytree.tree_structure(oracle.upper)
    assert pytree.tree_structure(info.adjoint) == pytree.tree_structure(oracle.lower)
    for tree, expected in ((gradient, oracle.hypergradient), (info.adjoint, oracle.adjoint)):
        pairs = zip(pytree.tree_leaves(tree), pytree.tree_leaves(expected), strict=True)
        for actual, wanted in pairs:
            # The solve stops at 1e-10 ||grad_v f||, and J H^{-1} is below 100 here.
            assert_close(actual, wanted, rtol=1e-8, atol=1e-8)
            assert not actual.requires_grad
    assert info.converged
    assert info.message == "converged"


@pytest.mark.parametrize(
    "name", ["scalar_ridge", "feature_ridge", "weighted_cleaning", "quadratic"]
)
def test_residual_norm_is_the_certificate(name: str) -> None:
    oracle = ORACLES[name]()
    _, info = hypergradient(oracle.f, oracle.g, oracle.upper, oracle.lower, tolerance=1e-3)
    r = lambda v: torch.func.grad(oracle.g, argnums=1)(oracle.upper, v)  # noqa: E731
    slope = torch.func.grad(oracle.f, argnums=1)(oracle.upper, oracle.lower)
    (product,) = torch.func.vjp(r, oracle.lower)[1](info.adjoint)
    flat = lambda tree: join(pytree.tree_leaves(tree))  # noqa: E731
    expected = float((flat(slope) + flat(product)).norm())
    # Relative to the right side: near convergence the residual itself is rounding.
    assert info.residual_norm == pytest.approx(expected, abs=1e-14 * float(flat(slope).norm()))
    assert info.residual_norm <= 1e-3 * float(flat(slope).norm())


def test_hypergradient_is_the_derivative_of_the_value_function() -> None:
    """Central difference of u -> f(u, v*(u)) on the scalar ridge, and zero at its solution."""
    h = 1e-5
    value = lambda u: (1.5 * 6 / (4 + math.exp(u)) - 1) ** 2 / 2  # noqa: E731
    oracle = scalar_ridge(0.3)
    gradient, _ = hypergradient(oracle.f, oracle.g, oracle.upper, oracle.lower)
    # h^2 = 1e-10 and eps / h = 2e-11.
    assert float(gradient) == pytest.approx((value(0.3 + h) - value(0.3 - h)) / (2 * h), abs=1e-9)
    best = scalar_ridge(math.log(5))
    gradient, _ = hypergradient(best.f, best.g, best.upper, best.lower)
    assert float(best.lower) == pytest.approx(2 / 3, rel=1e-15)
    assert abs(float(gradient)) < 1e-15


def test_away_from_the_lower_solution_it_is_the_implicit_formula() -> None:
    problem, at, _ = quadratic_pair()
    gradient, _ = hypergradient(problem.f, problem.g, *at)
    assert_close(join(gradient), problem.hypergradient(at), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_damping_is_added_to_the_hessian(damping: float) -> None:
    problem, at, _ = quadratic_pair()
    gradient, info = hypergradient(problem.f, problem.g, *at, damping=damping)
    assert_close(join(info.adjoint), problem.adjoint(at, damping), rtol=1e-8, atol=1e-8)
    assert_close(join(gradient), problem.hypergradient(at, damping), rtol=1e-8, atol=1e-8)


def test_damping_makes_an_indefinite_hessian_solvable() -> None:
    u, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    diagonal = torch.tensor([1.0, -2.0])
    g = lambda u, v: (diagonal * v * v).sum() / 2 + (u * v).sum()  # noqa: E731
    f = lambda u, v: (v * torch.tensor([1.0, 1.0])).sum() + 0 * u.sum()  # noqa: E731
    with pytest.warns(BilevelWarning, match="not positive definite"):
        gradient, info = hypergradient(f, g, u, v)
    assert gradient.isnan().all()
    assert not info.converged
    assert info.status == "negative_curvature"
    assert math.isnan(info.residual_norm)
    assert info.adjoint.isnan().all()
    gradient, info = hypergradient(f, g, u, v, damping=3.0)
    assert info.converged
    # (H + 3) = (4, 1), J = 1, grad_v f = 1: -1/4 and -1; the solve stops at 1e-10.
    assert_close(gradient, torch.tensor([-0.25, -1.0]), rtol=1e-9, atol=0)


def test_stopping_early_warns_and_says_so() -> None:
    problem, at, _ = quadratic_pair()
    with pytest.warns(BilevelWarning, match="stopped after 2 products") as record:
        gradient, info = hypergradient(problem.f, problem.g, *at, max_iterations=2)
    assert record[0].filename == __file__  # the warning points at the caller
    assert not info.converged
    assert info.iterations == 2
    assert info.residual_norm > 1e-10
    # It is still the formula at the adjoint that was reached.
    expected = problem.f_upper(at) + problem.C @ join(info.adjoint)
    assert_close(join(gradient), expected, **EXACT)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_default_tolerance_can_be_reached_in_each_dtype(dtype: torch.dtype, rtol: float) -> None:
    """1e-10 in float32 would warn every time, after ten times the unknowns in products."""
    problem, at, _ = quadratic_pair()
    cast = Quadratic(
        *(getattr(problem, k).to(dtype) for k in ["A", "C", "a", "F", "B", "K", "p", "s"])
    )
    low = Pair(*(tuple(t.to(dtype) for t in level) for level in at))
    gradient, info = hypergradient(cast.f, cast.g, *low)
    assert info.converged
    assert info.iterations <= 8
    # Tolerance (1e-10 or 100 eps) times the condition number 10.
    assert_close(join(gradient).double(), problem.hypergradient(at), rtol=rtol, atol=rtol)


def test_levels_that_do_not_see_each_other() -> None:
    """g that does not see u: the hypergradient is grad_u f, and structures survive None leaves."""
    u, v = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, torch.tensor([1.0, 3.0])
    gradient, info = hypergradient(
        lambda u, v: u["a"] ** 2 * v.sum(), lambda u, v: v.square().sum(), u, v
    )
    assert float(gradient["a"]) == 16
    assert float(gradient["b"]) == 0
    assert_close(info.adjoint, torch.tensor([-2.0, -2.0]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "magic"}, "got 'magic'"),
        ({"tolerance": 0.0}, "tolerance must be a finite number > 0, got 0.0"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations must be an integer >= 1, got 0"),
        ({"damping": -1.0}, "damping must be a finite number >= 0, got -1.0"),
        ({"damping": math.nan}, "damping"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    oracle = scalar_ridge()
    with pytest.raises(ValueError, match=match):
        hypergradient(oracle.f, oracle.g, oracle.upper, oracle.lower, **options)


def _finite(u: Tensor, v: Tensor) -> Tensor:
    return (u * v) + v**2


@pytest.mark.parametrize(
    ("f", "g", "match"),
    [
        (lambda u, v: (v - 1).log() * u, _finite, "upper loss is not finite"),
        (_finite, lambda u, v: (v - 1).log() * u, "lower loss is not finite"),
        (lambda u, v: (v - 1).sqrt() + u, _finite, "gradient of the upper loss is not finite"),
        (_finite, lambda u, v: (v - 1).sqrt() + u, "residual grad_v g is not finite"),
    ],
)
def test_non_finite_is_named(f: Any, g: Any, match: str) -> None:
    one = torch.tensor(1.0)
    with pytest.raises(NonFiniteError, match=match):
        hypergradient(f, g, one, one)


def test_oracles_are_at_their_lower_solution() -> None:
    """The oracles themselves: r = 0 and H q = -grad_v f."""
    for name, build in ORACLES.items():
        oracle: Oracle = build()
        r = lambda v, o=oracle: torch.func.grad(o.g, argnums=1)(o.upper, v)  # noqa: E731
        residual, pullback = torch.func.vjp(r, oracle.lower)
        slope = torch.func.grad(oracle.f, argnums=1)(oracle.upper, oracle.lower)
        certificate = pytree.tree_map(torch.add, slope, pullback(oracle.adjoint)[0])
        for leaf in (*pytree.tree_leaves(residual), *pytree.tree_leaves(certificate)):
            assert leaf.abs().max() < 1e-12, name


@pytest.mark.parametrize("method", ["cg", "cg_normal", "neumann", "one_step", "alternating"])
def test_vmap_is_refused_and_its_remedy_is_right(method: str) -> None:
    f = lambda u, v: (v - 1).square().sum() + u.square().sum()  # noqa: E731
    g = lambda u, v: (v - 2 * u).square().sum() + v.square().sum() / 3  # noqa: E731
    u, v = torch.randn(4, 3), torch.randn(4, 3)
    options: dict[str, Any] = {"method": method}
    if method in ("neumann", "one_step"):
        options["step_size"] = 0.3
    with pytest.raises(TypeError, match=r"inside torch\.func\.vmap.*the sum of the problems"):
        torch.func.vmap(lambda a, b: hypergradient(f, g, a, b, **options)[0])(u, v)
    together, _ = hypergradient(
        lambda u, v: torch.func.vmap(f)(u, v).sum(),
        lambda u, v: torch.func.vmap(g)(u, v).sum(),
        u,
        v,
        **options,
    )
    single = [hypergradient(f, g, a, b, **options)[0] for a, b in zip(u, v, strict=True)]
    assert_close(together, torch.stack(single), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_derivative_of_the_hypergradient_is_refused(level: str) -> None:
    """It would be 0, whatever the problem."""
    oracle = scalar_ridge(0.3)

    def of_level(value: Tensor) -> Tensor:
        at = {"upper": oracle.upper, "lower": oracle.lower} | {level: value}
        return hypergradient(oracle.f, oracle.g, at["upper"], at["lower"])[0]

    with pytest.raises(TypeError, match=r"not differentiated further.*penalty_gradient"):
        torch.func.grad(of_level)(oracle.upper if level == "upper" else oracle.lower)
