"""Penalties against weight and lower steps on the problem of ``problem.py``, with bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.rates.curves import KAPPA, Curve
from benchmarks.rates.problem import Quadratic, spectral
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity, ValueGap
from torch_penalty_bilevel.functional import penalty_gradient


def penalties(kappa: float = KAPPA) -> Iterable[Curve]:
    r"""The bias of a penalty gamma at the v that minimises the penalised function, u held.

    .. math::
        \nabla_v f + \gamma A r = 0 \Rightarrow \lVert v - v^*\rVert \le
        \frac{\lVert A^{-1}\rVert \lVert q^*\rVert}{\gamma}, \qquad
        \nabla_v f + \gamma r = 0 \Rightarrow \lVert v - v^*\rVert \le
        \frac{\lVert A^{-1}\rVert \lVert \nabla_v f(v^*)\rVert}{\gamma}

    The first is f + gamma / 2 ||grad_v g||^2, the second the value gap. Both estimate q(v).
    """
    problem = Quadratic(kappa, 20)
    weights = [float(10**i) for i in range(1, 7)]
    shift = spectral(problem.F / problem.A[:, None])
    for name, error_at, size in (
        ("gradient norm", squared_gradient, float(problem.adjoint.norm())),
        ("value gap", value_gap, float(problem.slope.norm())),
    ):
        errors = [error_at(problem, gamma) for gamma in weights]
        apart = [size / problem.mu / gamma for gamma in weights]
        bounds = [problem.bound(d, shift * d) for d in apart]
        law = lambda gamma: 1 / gamma  # noqa: E731
        yield Curve(name, "penalty", weights, errors, bounds, law, "1/γ", 100, True)


def squared_gradient(problem: Quadratic, weight: float) -> float:
    """Of the penalty weight / 2 ||grad_v g||^2, minimised over v by a Newton step."""
    losses = problem.upper_loss, problem.lower_loss
    H = problem.F + weight * torch.diag(problem.A**2)
    v = problem.best
    for _ in range(2):  # the second one is for rounding
        slope = penalty_gradient(*losses, problem.u, v, weight=weight).lower_grad
        v = v - torch.linalg.solve(H, slope)
    return problem.error(penalty_gradient(*losses, problem.u, v, weight=weight).upper_grad)


def value_gap(problem: Quadratic, weight: float) -> float:
    """Of the value gap, after enough lower steps."""
    return in_one_loop(problem, ValueGap(weight, relative=False), 150, problem.step).errors[-1]


class Run(NamedTuple):
    """Errors of the upper gradient after 0, 1, ... lower steps, and (w, L) of the rule at each."""

    errors: list[float]
    scales: list[tuple[float, float]]


def in_one_loop(problem: Quadratic, penalty: Any, steps: int, lr: float) -> Run:
    """Lower steps of an optimizer whose upper level stands still."""
    u, v = problem.u.clone().requires_grad_(), problem.v.clone().requires_grad_()
    rules = torch.optim.SGD([u], lr=0.0), torch.optim.SGD([v], lr=lr)
    optimizer = PenaltyBilevelOptimizer(*rules, penalty=penalty)
    run = Run([], [])
    for _ in range(steps):
        optimizer.step(lambda: problem.upper_loss(u, v), lambda: problem.lower_loss(u, v))
        assert u.grad is not None
        run.errors.append(problem.error(u.grad))
        scalars = optimizer._own_state()["scalars"]
        run.scales.append((scalars.get("pull", 0.0), scalars["curvature"]))
    return run


def multiplier_matrix(problem: Quadratic, lr: float, pull: float, curvature: float) -> Tensor:
    r"""What one step of ``LeastSquares`` and SGD does to (v - v*, nu - nu*).

    .. math::
        \begin{pmatrix} I - \eta (A + wF) & -\eta w A \\ -F/L & I - A/L \end{pmatrix}
    """
    identity, A, F = torch.eye(len(problem.A)), torch.diag(problem.A), problem.F
    of_v = torch.cat([identity - lr * (A + pull * F), -lr * pull * A], 1)
    of_multiplier = torch.cat([-F, curvature * identity - A], 1) / curvature
    return torch.cat([of_v, of_multiplier])


def multiplier(problem: Quadratic, name: str, rule: LeastSquares, steps: int, lr: float) -> Curve:
    """Bound: the norm of the product of the matrices; law: the product of their radii."""
    run = in_one_loop(problem, Stationarity(rule), steps, lr)
    n, size = len(problem.A), float(problem.adjoint.norm())
    start = math.hypot(problem.lower_error(0), size)
    product, radius = torch.eye(2 * n), 1.0
    bounds, law = [], []
    for scales in run.scales:
        bounds.append(problem.bound(spectral(product[:n]) * start, spectral(product[n:]) * start))
        law.append(radius)
        step = multiplier_matrix(problem, lr, *scales)
        product = step @ product
        radius *= float(torch.linalg.eigvals(step).abs().max())
    return Curve(
        name, "one loop", range(steps), run.errors, bounds, lambda t: law[int(t)], "Π ρ(M_t)", 60
    )


def one_loop(kappa: float = KAPPA, weight: float = 1000.0) -> Iterable[Curve]:
    r"""Penalties against lower steps: the multiplier goes on converging, the value gap stops.

    The multiplier without its correction, whose gain is no linear recursion.

    The errors of v and of the multiplier follow a linear recursion, with the pull w and the
    curvature L that the rule measures. With w = 0 its radius is that of the slower of both,
    usually 1 - mu/L of the multiplier. The pull couples them, and is slow to fade where v starts
    far off. It adds up to 0.3 of ||r|| to the direction of v, so steps must stay below 2 / (1.3 L):
    steps of 2 / (L + mu), the best ones on g alone, may be too long.
    """
    problem = Quadratic(kappa, 20)
    lr = 4 / 3 / problem.L
    steps = int(math.log(1e-9) / math.log(1 - problem.mu / problem.L))
    plain, unpulled = LeastSquares(subspace=False), LeastSquares(share=0.0, subspace=False)
    yield multiplier(problem, "multiplier", plain, steps, lr)
    yield multiplier(problem, "multiplier, share=0", unpulled, steps, lr)

    # gamma (v - z) moves as the adjoint would by fixed-point steps, with grad_v f at v_t.
    q, start, size = 1 - problem.mu * lr, problem.lower_error(0), float(problem.adjoint.norm())
    bounds, off = [], size
    for t in range(steps):
        apart = q**t * start + (size + off) / weight
        bounds.append(problem.bound(apart, off))
        off = q * off + lr * spectral(problem.F) * apart
    errors = in_one_loop(problem, ValueGap(weight, relative=False), steps, lr).errors
    yield Curve(f"value gap, γ = {weight:g}", "one loop", range(steps), errors, bounds)
