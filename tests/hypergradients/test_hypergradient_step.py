"""One step of every method: closed forms, metrics, counts, maps, dtypes and workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypergradient_runs import METHODS, SOLVERS, Run
from problems import normal
from torch import Tensor, nn
from torch.testing import assert_close

from torch_penalty_bilevel import HypergradientOptimizer, testing


@pytest.mark.parametrize(
    ("method", "curvature"),
    [(method, "auto") for method in (*SOLVERS, "reverse")]
    # One solver and one unrolled method are enough for the second engine.
    + [("cg_normal", "functional"), ("reverse", "functional")],
)
@pytest.mark.parametrize(
    "name",
    ["quadratic", "scalar_ridge", "feature_ridge", "weighted_cleaning", "minimax", "fixed_point"],
)
def test_closed_forms(name: str, method: str, curvature: str) -> None:
    problem = testing.get(name)
    u, v = (t.requires_grad_() for t in problem.start(torch.Generator().manual_seed(0)))
    is_map = problem.lower_map is not None
    lower = problem.lower_map or problem.lower_loss
    rate = 1.0
    if not is_map:
        hessian = torch.func.hessian(problem.lower_loss, argnums=1)(u.detach(), v.detach())
        rate = 1 / float(torch.linalg.matrix_norm(hessian, 2))
    options: dict[str, Any] = {"inner_iterations": 3000} if method in SOLVERS else {}
    optimizer = HypergradientOptimizer(
        [u],
        torch.optim.SGD([v], lr=rate),
        upper_lr=0.0,
        method=method,
        lower_steps=300,  # the contraction is 0.9 or less: 2e-14
        lower_is_map=is_map,
        curvature=curvature,
        **options,
    )
    if curvature == "functional":
        pair = (lambda u, v: problem.upper_loss(u[0], v[0]), lambda u, v: _packed(lower, u, v))
    else:
        pair = (lambda: problem.upper_loss(u, v), lambda: lower(u, v))
    loss = optimizer.step(*pair)
    # 1e-10 (where the adjoint solve stops) times ||J A^{-1}||, which is below 100 here.
    assert_close(u.grad, problem.exact_hypergradient(u.detach()), rtol=0, atol=1e-8)
    assert_close(v.detach(), problem.best_lower(u.detach()), rtol=0, atol=1e-9)
    assert_close(loss, problem.upper_loss(u, v).detach(), rtol=1e-12, atol=1e-14)
    assert float(optimizer.metrics.residual_norm) < 1e-9
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-8


def _packed(lower: Any, u: Any, v: Any) -> Any:
    value = lower(u[0], v[0])
    return value if value.dim() == 0 else (value,)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_the_truth(method: str) -> None:
    run = Run(method=method, lower_steps=2, upper_lr=0.0, step_size=None)
    run.step()
    p, u, v = run.problem, run.u.detach(), run.v.detach()
    (q,), m = run.optimizer.adjoint, run.optimizer.metrics
    assert_close(m.upper_loss, p.f(u, v), rtol=1e-13, atol=0)
    assert_close(m.lower_loss, p.g(u, v), rtol=1e-13, atol=0)
    assert float(m.residual_norm) == pytest.approx(float(p.residual(u, v).norm()), rel=1e-12)
    certificate = float((v - p.target + p.A @ q).norm())
    assert float(m.adjoint_residual_norm) == pytest.approx(certificate, rel=1e-9, abs=1e-12)
    assert float(m.upper_grad_norm) == pytest.approx(float(run.u.grad.norm()), rel=1e-12)
    assert_close(run.u.grad, u - p.offset + p.C @ q, rtol=1e-12, atol=1e-13)
    assert float(m.penalty_weight) == float(m.damping) == 0


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        # f and its gradient 1, g linearised at the end 1, lower steps 2: 4, and then
        ("alternating", {}, 4),
        ("one_step", {}, 5),  # J q and H q in one product
        ("reverse", {}, 9),  # linearise and product per step, and the certificate
        ("reverse", {"truncation": 1}, 7),
        ("fixed_point", {"inner_iterations": 3}, 7),  # the last product also gives J q
        ("neumann", {"inner_iterations": 3}, 8),  # one more to confirm the residual
        ("cg", {"inner_iterations": 2}, 7),
        ("cg_normal", {"inner_iterations": 2}, 7),
        ("stochastic", {"inner_iterations": 2, "samples": 3}, 4 + 2 * 9 + 2 * 3 + 1),
    ],
)
def test_gradient_evaluations_are_counted(method: str, options: Any, count: int) -> None:
    run = Run(method=method, lower_steps=2, **options)
    run.step()
    assert run.optimizer.metrics.gradient_evaluations == count
    run.optimizer.warm_start = False
    run.step()
    assert run.optimizer.metrics.gradient_evaluations == 2 * count


@pytest.mark.parametrize("curvature", ["auto", "double_backward"])
def test_a_map_with_several_tensors_and_names(curvature: str) -> None:
    u = torch.tensor([0.4], requires_grad=True)
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(0.3 * normal(2, 2, seed=1))

    def phi() -> dict[str, Tensor]:
        mixed = torch.tanh(0.5 * layer.weight.T @ layer.bias.outer(layer.bias) + u)
        return {"weight": mixed, "bias": 0.5 * layer.bias.flip(0) * u + layer.weight[0]}

    optimizer = HypergradientOptimizer(
        [u],
        torch.optim.SGD(layer.named_parameters(), lr=1.0),
        upper_lr=0.0,
        method="cg_normal",
        lower_steps=200,
        inner_iterations=100,
        lower_is_map=True,
        curvature=curvature,
    )
    f = lambda: layer.weight.sum() + layer.bias.square().sum()  # noqa: E731
    optimizer.step(f, phi)
    assert float(optimizer.metrics.residual_norm) < 1e-12

    def value(shift: float) -> float:
        with torch.no_grad():
            u.add_(shift)
            for _ in range(300):
                for name, new in phi().items():
                    getattr(layer, name).copy_(new)
            u.sub_(shift)
            return float(f())

    # h^2 = 1e-12 and eps / h = 2e-10, times third derivatives and values of the order of 100.
    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(u.grad) == pytest.approx(difference, abs=1e-7)


def test_reduce_averages_everything() -> None:
    """Workers with half of each loss, and a reduction that doubles, are one worker."""
    for method in METHODS:
        one = Run(method=method, lower_steps=2)
        half = Run(method=method, lower_steps=2, reduce=lambda ts: tuple(2 * t for t in ts))
        f, g = half.closures
        half.closures = (lambda f=f: f() / 2, lambda g=g: g() / 2)
        one.step(3)
        half.step(3)
        assert_close(one.u, half.u, rtol=1e-12, atol=1e-13)
        assert_close(one.v, half.v, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:the lower parameters .* have 16 bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_lower_precision_follows_float64(method: str, dtype: torch.dtype) -> None:
    exact, low = Run(method=method, lower_steps=3), Run(method=method, lower_steps=3)
    exact.step()
    u, v = (t.detach().to(dtype).requires_grad_() for t in (normal(3, seed=8), normal(4, seed=9)))
    rules = torch.optim.SGD([u], lr=0.05), torch.optim.SGD([v], lr=0.1)
    p = low.problem
    for name in ("A", "C", "target", "offset"):
        setattr(p, name, getattr(p, name).to(dtype))
    optimizer = HypergradientOptimizer(*rules, method=method, lower_steps=3)
    optimizer.step(lambda: p.f(u, v), lambda: p.g(u, v))
    assert u.grad.dtype == dtype
    # A few hundred roundings, times the condition number 5.
    slack = 100 * torch.finfo(dtype).eps
    assert_close(u.grad.double(), exact.u.grad, rtol=slack, atol=slack)
