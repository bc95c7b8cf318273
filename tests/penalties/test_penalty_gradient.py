"""``functional.penalty_gradient`` against autograd of the penalty written out, and closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from networks import net_problem
from problems import EXACT, Quadratic, join, normal, quadratic_pair, split
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from torch_penalty_bilevel.functional import penalty_gradient
from torch_penalty_bilevel.tensors import Pair


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("with_multiplier", [False, True])
def test_quadratic_in_closed_form(weight: float, damping: float, with_multiplier: bool) -> None:
    problem, at, nu = quadratic_pair()
    result = penalty_gradient(
        problem.f,
        problem.g,
        *at,
        weight=weight,
        multiplier=nu if with_multiplier else None,
        damping=damping,
    )
    r = problem.residual(at)
    q = weight * r + (join(nu) if with_multiplier else 0)
    upper_grad, lower_grad, residual, f, g = result
    assert_close(join(upper_grad), problem.f_upper(at) + problem.C @ q, **EXACT)
    assert_close(join(lower_grad), problem.f_lower(at) + problem.A @ q + damping * r, **EXACT)
    assert_close(join(residual), r, **EXACT)
    assert_close(f, problem.f(*at), **EXACT)
    assert_close(g, problem.g(*at), **EXACT)
    assert [t.shape for t in upper_grad] == [torch.Size(s) for s in problem.upper_shapes]
    assert [t.shape for t in lower_grad] == [torch.Size(s) for s in problem.lower_shapes]


def test_weight_and_damping_may_be_tensors() -> None:
    problem, at, nu = quadratic_pair()
    plain = penalty_gradient(problem.f, problem.g, *at, weight=0.7, multiplier=nu, damping=0.3)
    tensors = penalty_gradient(
        problem.f,
        problem.g,
        *at,
        weight=torch.tensor(0.7, dtype=torch.float64),
        multiplier=nu,
        damping=torch.tensor(0.3, dtype=torch.float64),
    )
    assert_close(join(plain.upper_grad), join(tensors.upper_grad), rtol=1e-14, atol=0)
    assert_close(join(plain.lower_grad), join(tensors.lower_grad), rtol=1e-14, atol=0)


def network_bilevel() -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """f, g, upper, lower with dict pytrees, a network and functional_call."""
    problem = net_problem("mlp_gelu")
    net = problem.net
    lower = {name: p.detach() for name, p in net.named_parameters()}
    upper = {"scores": problem.upper[0].detach(), "log_decay": problem.upper[1].detach()}
    clean_x, clean_y = normal(6, 5, seed=31), torch.tensor([0, 1, 2, 0, 1, 2])

    def f(upper: dict[str, Tensor], lower: dict[str, Tensor]) -> Tensor:
        scores = torch.func.functional_call(net, lower, clean_x)
        return nn.functional.cross_entropy(scores, clean_y) + 0.1 * upper["scores"].square().sum()

    def g(upper: dict[str, Tensor], lower: dict[str, Tensor]) -> Tensor:
        scores = torch.func.functional_call(net, lower, problem.x)
        each = nn.functional.cross_entropy(scores, problem.y, reduction="none")
        decay = sum(v.square().sum() for v in lower.values())
        return (upper["scores"].sigmoid() * each).mean() + upper["log_decay"].exp() * decay / 2

    return f, g, upper, lower


def test_is_the_gradient_of_the_written_penalty() -> None:
    """autograd of F = f + <nu, r> + gamma/2 |r|^2 and of F + lambda g, written out in full."""
    f, g, upper, lower = network_bilevel()
    nu = {name: normal(*v.shape, seed=40 + i) for i, (name, v) in enumerate(lower.items())}
    gamma, damping = 0.8, 0.25
    result = penalty_gradient(f, g, upper, lower, weight=gamma, multiplier=nu, damping=damping)

    u = {k: t.clone().requires_grad_() for k, t in upper.items()}
    v = {k: t.clone().requires_grad_() for k, t in lower.items()}
    lower_loss = g(u, v)
    r = dict(
        zip(v, torch.autograd.grad(lower_loss, tuple(v.values()), create_graph=True), strict=True)
    )
    F = f(u, v) + sum((nu[k] * r[k]).sum() + gamma / 2 * r[k].square().sum() for k in v)
    F_low = F + damping * lower_loss
    upper_grad = torch.autograd.grad(F, tuple(u.values()), retain_graph=True)
    lower_grad = torch.autograd.grad(F_low, tuple(v.values()))

    assert list(result.upper_grad) == list(upper)
    assert list(result.lower_grad) == list(lower)
    for name, expected in zip(u, upper_grad, strict=True):
        assert_close(result.upper_grad[name], expected, **EXACT)
    for name, expected in zip(v, lower_grad, strict=True):
        assert_close(result.lower_grad[name], expected, **EXACT)
        assert_close(result.residual[name], r[name].detach(), **EXACT)
    assert_close(result.upper_loss, f(upper, lower), **EXACT)
    assert_close(result.lower_loss, g(upper, lower), **EXACT)


def task_losses(C: Tensor) -> tuple[Any, Any]:
    def f(u: Tensor, v: dict[str, Tensor]) -> Tensor:
        return (v["w"].tanh() * u).sum() + v["b"] ** 2

    def g(u: Tensor, v: dict[str, Tensor]) -> Tensor:
        return (C @ v["w"] - u).pow(4).sum() / 4 + (v["b"] - u.sum()) ** 2 * v["w"].square().sum()

    return f, g


def test_vmap_over_tasks_is_the_loop() -> None:
    u, Cs = normal(3, seed=1), normal(5, 3, 3, seed=2)
    vs = {"w": normal(5, 3, seed=3), "b": normal(5, seed=4)}
    nus = {"w": normal(5, 3, seed=5), "b": normal(5, seed=6)}

    def one(C: Tensor, v: dict[str, Tensor], nu: dict[str, Tensor]) -> Any:
        return penalty_gradient(*task_losses(C), u, v, weight=0.5, multiplier=nu, damping=0.2)

    batched = torch.func.vmap(one)(Cs, vs, nus)
    for i in range(5):
        pick = lambda tree, i=i: pytree.tree_map(lambda t: t[i], tree)  # noqa: E731
        looped = one(Cs[i], pick(vs), pick(nus))
        for a, b in zip(pytree.tree_leaves(pick(batched)), pytree.tree_leaves(looped), strict=True):
            assert_close(a, b, **EXACT)


def test_compiles_into_one_graph() -> None:
    u, C = normal(3, seed=1), normal(3, 3, seed=2)
    v = {"w": normal(3, seed=3), "b": torch.tensor(0.4, dtype=torch.float64)}
    f, g = task_losses(C)

    def run(u: Tensor, v: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        result = penalty_gradient(f, g, u, v, weight=0.5, multiplier=v, damping=0.2)
        return result.upper_grad, result.lower_grad["w"], result.lower_grad["b"]

    with warnings.catch_warnings():
        # Dynamo's own deprecations and profiler notes are not ours.
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        actual = compiled(u, v)
        torch.compiler.reset()
    for a, b in zip(actual, run(u, v), strict=True):
        assert_close(a, b, **EXACT)


def test_it_is_differentiable_itself() -> None:
    """d/du of <c, grad_v F_low> = (K' + gamma A C')' c + lambda C c on the quadratic."""
    problem, at, _ = quadratic_pair()
    c = normal(7, seed=77)

    def scalar(upper: tuple[Tensor, ...]) -> Tensor:
        result = penalty_gradient(problem.f, problem.g, upper, at.lower, weight=0.6, damping=0.2)
        return c @ join(result.lower_grad)

    gradient = join(torch.func.grad(scalar)(at.upper))
    expected = problem.K @ c + 0.6 * problem.C @ problem.A @ c + 0.2 * problem.C @ c
    assert_close(gradient, expected, **EXACT)


def test_certificate_identity() -> None:
    """If grad_v F_low = e with no damping, grad_u F = hypergradient + J H^{-1} e."""
    problem, at, nu = quadratic_pair()
    result = penalty_gradient(problem.f, problem.g, *at, weight=0.9, multiplier=nu)
    e = join(result.lower_grad)
    assert e.norm() > 1  # far from a solution, so the identity says something
    expected = problem.hypergradient(at) + problem.C @ torch.linalg.solve(problem.A, e)
    assert_close(join(result.upper_grad), expected, **EXACT)


def test_exact_multiplier_gives_the_exact_hypergradient() -> None:
    problem = Quadratic.random(seed=1)
    upper = problem.point().upper
    at = Pair(upper, problem.solution(upper))
    nu = split(problem.adjoint(at), problem.lower_shapes)
    for weight in (0.0, 1.0, 1e3):
        result = penalty_gradient(problem.f, problem.g, *at, weight=weight, multiplier=nu)
        # r is zero up to rounding, which the weight multiplies.
        assert_close(join(result.upper_grad), problem.hypergradient(at), rtol=1e-9, atol=1e-9)
        assert_close(join(result.lower_grad), torch.zeros(7).double(), rtol=0, atol=1e-9)


def test_bias_without_multiplier_falls_like_one_over_weight() -> None:
    """At v_gamma = argmin f + gamma/2 |r|^2 the bias of grad_u F is C1/gamma + O(1/gamma^2)."""
    problem = Quadratic.random(seed=1)
    upper = problem.point().upper
    u = join(upper)
    exact = problem.hypergradient(Pair(upper, problem.solution(upper)))
    errors = []
    for weight in (1e3, 1e4, 1e5):
        curvature = problem.F + weight * problem.A @ problem.A
        slope = problem.K.T @ u + problem.p + weight * problem.A @ (problem.C.T @ u + problem.a)
        lower = split(-torch.linalg.solve(curvature, slope), problem.lower_shapes)
        result = penalty_gradient(problem.f, problem.g, upper, lower, weight=weight)
        assert join(result.lower_grad).norm() < 1e-8  # rounding of weight * A A v
        errors.append(float((join(result.upper_grad) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)  # the 1/gamma^2 term: a few %
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.01)


def test_multiplier_structure_is_checked() -> None:
    f, g, upper, lower = network_bilevel()
    with pytest.raises(ValueError, match="multiplier has structure"):
        penalty_gradient(f, g, upper, lower, weight=1.0, multiplier=tuple(lower.values()))


def test_multiplier_shapes_are_checked() -> None:
    """A multiplier that broadcasts would be a plausible wrong number."""
    problem, at, nu = quadratic_pair()
    narrow = (nu[0][:1], nu[1])
    with pytest.raises(ValueError, match="multiplier"):
        penalty_gradient(problem.f, problem.g, *at, weight=1.0, multiplier=narrow)


def test_non_finite_values_pass_through() -> None:
    u, v = torch.tensor(1.0), torch.tensor(0.0)
    result = penalty_gradient(lambda u, v: u * v, lambda u, v: v.log() * u, u, v, weight=1.0)
    assert not result.lower_grad.isfinite()


def test_inputs_that_require_grad_are_fine() -> None:
    problem, at, nu = quadratic_pair()
    plain = penalty_gradient(problem.f, problem.g, *at, weight=0.7, multiplier=nu)
    live = Pair(*(tuple(t.clone().requires_grad_() for t in level) for level in at))
    result = penalty_gradient(problem.f, problem.g, *live, weight=0.7, multiplier=nu)
    assert_close(join(result.upper_grad).detach(), join(plain.upper_grad), **EXACT)
    assert_close(join(result.lower_grad).detach(), join(plain.lower_grad), **EXACT)
