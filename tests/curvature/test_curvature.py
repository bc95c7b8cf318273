"""Every engine's (J q, H q) against closed forms, full Hessians and each other."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from engines import ENGINES, LIVE, TOL, exact, filled_pair, point_for, products_of, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import net_problem
from problems import Quadratic, join, leaves, normal, spd, split
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import DoubleBackwardError
from torch_penalty_bilevel.curvature import (
    Automatic,
    DoubleBackward,
    FiniteDifference,
    VectorJacobian,
    resolve,
)
from torch_penalty_bilevel.tensors import OptionalPair, Pair, filled


@pytest.mark.parametrize("name", ENGINES)
def test_quadratic_products_residual_and_loss(name: str) -> None:
    problem = Quadratic.random()
    at = point_for(name, problem.point())
    direction = problem.direction()
    linearised = ENGINES[name]().linearise(problem.g, at, reusable=True)
    q = join(direction)
    # The gradient is linear, so differences have no truncation error: eps / h = 2e-9 for h = 1e-7
    # times the size of the gradient beside H q.
    tolerance = {"central": 1e-9, "forward": 5e-8}.get(name, 1e-10)
    for scale in (1.0, 1e-4, 1e4):  # the step is relative, so the length of q does not matter
        upper, lower = filled_pair(linearised.product(tuple(scale * d for d in direction)), at)
        assert relative_error(upper, (scale * problem.C @ q,)) < tolerance
        assert relative_error(lower, (scale * problem.A @ q,)) < tolerance
        assert [t.shape for t in upper] == [t.shape for t in at.upper]
        assert [t.shape for t in lower] == [t.shape for t in at.lower]
    assert_close(join(linearised.residual), problem.residual(at), rtol=1e-12, atol=1e-12)
    assert_close(linearised.loss, problem.g(*at).detach(), rtol=1e-14, atol=0)
    assert not linearised.loss.requires_grad
    assert not any(r.requires_grad for r in linearised.residual)


@pytest.mark.parametrize("name", ENGINES)
def test_quadratic_gradients(name: str) -> None:
    problem = Quadratic.random(seed=2)
    at = point_for(name, problem.point())
    engine = ENGINES[name]()
    value, gradient = engine.gradient(problem.f, at)
    assert_close(join(gradient.upper), problem.f_upper(at), rtol=1e-12, atol=1e-12)
    assert_close(join(gradient.lower), problem.f_lower(at), rtol=1e-12, atol=1e-12)
    assert_close(value, problem.f(*at).detach(), rtol=1e-14, atol=0)
    assert not value.requires_grad
    _, gradient = engine.gradient(problem.g, at)
    assert_close(join(gradient.upper), problem.g_upper(at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ENGINES)
def test_zero_direction_gives_zero(name: str) -> None:
    problem = Quadratic.random()
    at = point_for(name, problem.point())
    zero = tuple(torch.zeros_like(v) for v in at.lower)
    product = filled_pair(ENGINES[name]().linearise(problem.g, at).product(zero), at)
    assert join(product.upper).abs().max() == 0
    assert join(product.lower).abs().max() == 0


@pytest.mark.parametrize("name", LIVE)
def test_a_point_at_zero_has_a_step_too(name: str) -> None:
    """||v|| = 0 gives the relative step no length; it falls back to the step itself."""
    problem = Quadratic.random()
    at = Pair(leaves(problem.point().upper), leaves([torch.zeros(3), torch.zeros(2, 2)]))
    direction = problem.direction()
    _, lower = ENGINES[name]().linearise(problem.g, at).product(direction)
    # The gradient is linear: only rounding over the step is left.
    assert relative_error(filled(lower, at.lower), (problem.A @ join(direction),)) < 1e-6


@pytest.mark.parametrize("name", LIVE)
def test_unused_parameters_have_no_second_derivative(name: str) -> None:
    """Unused parameters: zero residual, no second derivative, the rest unharmed."""
    u, v, linear, unused = leaves([torch.ones(2), 2 * torch.ones(2), torch.ones(3), torch.ones(4)])
    ignored = torch.ones(1, requires_grad=True)
    at = Pair((u, ignored), (unused, v, linear))
    g = lambda *_: (u * v.pow(3)).sum() + 5 * linear.sum()  # noqa: E731
    linearised = ENGINES[name]().linearise(g, at)
    expected = (torch.zeros(4), 3 * torch.full((2,), 4.0), torch.full((3,), 5.0))
    for actual, wanted in zip(linearised.residual, expected, strict=True):
        assert_close(actual, wanted.to(actual.dtype), rtol=1e-6, atol=0)
    direction = tuple(torch.ones_like(p) for p in at.lower)
    upper, lower = linearised.product(direction)
    assert upper[1] is None
    assert lower[0] is None
    # J = 3 v^2 = 12, H = 6 u v = 12; float32 forward differences are right to 1e-3.
    product = filled_pair(OptionalPair(upper, lower), at)
    assert_close(product.upper[0], torch.full_like(u, 12), rtol=5e-3, atol=0)
    assert_close(product.lower[1], torch.full_like(v, 12), rtol=5e-3, atol=0)
    assert_close(product.lower[2], torch.zeros_like(linear), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["double_backward", "central"])
def test_linear_lower_loss_has_no_second_derivative(name: str) -> None:
    v = torch.ones(3, dtype=torch.float64, requires_grad=True)
    u = torch.ones(1, dtype=torch.float64, requires_grad=True)
    at = Pair((u,), (v,))
    linearised = ENGINES[name]().linearise(lambda *_: 2 * v.sum() + u.sum() ** 2, at)
    upper, lower = filled_pair(linearised.product((torch.ones_like(v),)), at)
    assert_close(upper[0], torch.zeros_like(u))
    assert_close(lower[0], torch.zeros_like(v))


vectors = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("name", ["double_backward", "functional", "central"])
@given(seed=vectors, a=st.floats(-3, 3), b=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_product_is_linear_and_symmetric(name: str, seed: int, a: float, b: float) -> None:
    problem = net_problem("mlp_gelu")
    p = problem.direction(seed=seed)
    q = problem.direction(seed=seed + 1000)
    engine = ENGINES[name]()
    combined = tuple(a * s + b * t for s, t in zip(p, q, strict=True))
    of_p, of_q, of_both = (products_of(engine, problem, d) for d in (p, q, combined))
    # Differences: h^2 truncation and eps / h rounding, relative to the size of the terms.
    scale = 1e-8 if name == "central" else 1e-12
    size = (1 + abs(a) + abs(b)) * float(join(of_p.lower).norm() + join(of_q.lower).norm())
    for left, right, both in (
        (of_p.upper, of_q.upper, of_both.upper),
        (of_p.lower, of_q.lower, of_both.lower),
    ):
        assert (a * join(left) + b * join(right) - join(both)).norm() < scale * size
    symmetric = join(p) @ join(of_q.lower) - join(q) @ join(of_p.lower)
    assert abs(symmetric) < scale * size * float(join(p).norm() + join(q).norm())


def test_splitting_a_parameter_changes_nothing() -> None:
    matrix, vector = spd(6, seed=9), normal(6, seed=10)
    q = normal(6, seed=12)
    for shapes in (((6,),), ((2,), (1, 4)), ((1,), (2, 2), (1,))):
        v = leaves(split(vector, shapes))
        closure = lambda *_, v=v: join(v) @ matrix @ join(v) / 2  # noqa: E731
        for name in LIVE:
            linearised = ENGINES[name]().linearise(closure, Pair((), v))
            _, lower = linearised.product(split(q, shapes))
            assert relative_error(filled(lower, v), (matrix @ q,)) < 5e-8, name


@pytest.mark.parametrize("engine", [DoubleBackward(), VectorJacobian(), Automatic()])
def test_both_products_of_a_map(engine) -> None:
    """(dr/dv)'q, (dr/du)'q and (dr/dv) w of r = v - Phi against dense Jacobians."""
    W, u, v = normal(4, 4, seed=1), normal(3, seed=2), normal(4, seed=3)
    phi = lambda u, v: torch.tanh(W @ v + u.sum() * v.square() + u[0])  # noqa: E731
    at = engine.point(Pair(*(leaves((t,)) for t in (u, v))))
    made = engine.linearise_map(lambda u, v: (phi(u[0], v[0]),), at, reusable=True)
    B = torch.eye(4) - torch.func.jacrev(phi, argnums=1)(u, v)
    E = -torch.func.jacrev(phi, argnums=0)(u, v)
    for seed in (4, 5):  # reusable, in any order
        q = normal(4, seed=seed)
        upper, lower = made.product((q,))
        assert_close(lower[0], B.T @ q, rtol=1e-12, atol=1e-13)
        assert_close(upper[0], E.T @ q, rtol=1e-12, atol=1e-13)
        assert made.transposed is not None
        assert_close(made.transposed((q,))[0].detach(), B @ q, rtol=1e-12, atol=1e-13)


SMOOTH = ("mlp_tanh", "mlp_gelu", "mlp_relu", "cnn_groupnorm", "batchnorm")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SMOOTH)
def test_products_of_networks_equal_the_full_hessian(name: str, engine: str) -> None:
    problem = net_problem(name)
    if name == "batchnorm" and engine == "functional":  # torch.func cannot update statistics
        torch.func.replace_all_batch_norm_modules_(problem.net)
    upper, lower = products_of(ENGINES[engine](), problem, problem.direction())
    assert relative_error(upper, exact(name).upper) < TOL[engine]
    assert relative_error(lower, exact(name).lower) < TOL[engine]


@pytest.mark.parametrize("engine", LIVE)
def test_parameters_and_grad_are_untouched(engine: str) -> None:
    problem = net_problem("mlp_tanh")
    for i, parameter in enumerate((*problem.upper, *problem.lower)):
        parameter.grad = torch.full_like(parameter, float(i))
    before = [(p.detach().clone(), p.grad) for p in (*problem.upper, *problem.lower)]
    products_of(ENGINES[engine](), problem, problem.direction())
    for p, (value, grad) in zip((*problem.upper, *problem.lower), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad


# What a linearisation may be asked for, and errors.


@pytest.mark.parametrize("engine", LIVE)
def test_reusable_products_repeat_bit_equally(engine: str) -> None:
    problem = net_problem("mlp_tanh")
    linearised = ENGINES[engine]().linearise(problem.closure, problem.at, reusable=True)
    first = linearised.product(problem.direction())
    second = linearised.product(problem.direction())
    for a, b in zip((*first.upper, *first.lower), (*second.upper, *second.lower), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_graph_is_freed_unless_reusable() -> None:
    problem = net_problem("mlp_tanh")
    linearised = DoubleBackward().linearise(problem.closure, problem.at)
    linearised.product(problem.direction())
    with pytest.raises(DoubleBackwardError, match="already freed"):
        linearised.product(problem.direction())


def test_closure_that_called_backward_is_explained() -> None:
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        loss = v.pow(3).sum()
        loss.backward()
        return loss

    with pytest.raises(DoubleBackwardError, match=r"called backward\(\) itself"):
        DoubleBackward().gradient(closure, Pair((), (v,)))


def test_other_errors_pass_through() -> None:
    def closure(*_: Any) -> Tensor:
        raise RuntimeError("out of cheese")

    v = torch.ones(2, requires_grad=True)
    for engine in LIVE:
        with pytest.raises(RuntimeError, match="out of cheese") as caught:
            ENGINES[engine]().linearise(closure, Pair((), (v,)))
        assert not isinstance(caught.value, DoubleBackwardError)


def test_no_engine_warns_when_all_is_well() -> None:
    problem = Quadratic.random()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, build in ENGINES.items():
            at = point_for(name, problem.point())
            build().linearise(problem.g, at).product(problem.direction())


# Choosing by name.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", Automatic),
        ("double_backward", DoubleBackward),
        ("finite_difference", FiniteDifference),
        ("functional", VectorJacobian),
    ],
)
def test_engines_are_chosen_by_name_or_given_ready(name: str, kind: type) -> None:
    assert type(resolve(name)) is kind
    ready = kind()
    assert resolve(ready) is ready


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'hessian'"):
        resolve("hessian")
    for bad in (FiniteDifference, 3):
        with pytest.raises(TypeError, match="FiniteDifference"):
            resolve(bad)  # type: ignore[arg-type]
