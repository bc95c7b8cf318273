"""Hypergradients against iterations on the problem of ``problem.py``, with their bounds.

Letters as there; rho is the factor of conjugate gradients.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.rates.problem import Quadratic
from torch_penalty_bilevel import BilevelWarning
from torch_penalty_bilevel.functional import hypergradient

KAPPA = 9.0  # q = 4/5, rho = 1/2


@dataclass(frozen=True)
class Curve:
    """Errors at some counts, the bound at each, and the law that the theory says they follow."""

    name: str
    panel: str
    counts: Sequence[float]
    errors: Sequence[float]
    bounds: Sequence[float]
    law: Callable[[float], float] | None = None
    """What the error is proportional to from ``fit_from`` on; None: nothing is claimed."""
    formula: str = ""
    """The law, in words."""
    fit_from: float = 0.0
    powers: bool = False
    """Is the law a power of the count, a line on two logarithmic axes?"""

    @property
    def worst_ratio(self) -> float:
        """The largest error over bound."""
        return max(e / b for e, b in zip(self.errors, self.bounds, strict=True))

    @property
    def slope(self) -> float:
        """Of log(error) against the count, or against log(count) for a power."""
        return self._fitted(self.errors)

    @property
    def expected_slope(self) -> float:
        """The same of the law, at the same counts."""
        assert self.law is not None
        return self._fitted([self.law(count) for count in self.counts])

    def _fitted(self, values: Sequence[float]) -> float:
        pairs = [(x, y) for x, y in zip(self.counts, values, strict=True) if x >= self.fit_from]
        scale = math.log if self.powers else float
        x, y = [scale(p[0]) for p in pairs], [math.log(p[1]) for p in pairs]
        return statistics.linear_regression(x, y).slope


def estimate(problem: Quadratic, v: Tensor, method: str, **options: Any) -> Tensor:
    """A hypergradient that is meant to be stopped early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        losses = problem.upper_loss, problem.lower_loss
        return hypergradient(*losses, problem.u, v, method=method, **options)[0]


def until(contraction: float, every: int = 1, smallest: float = 1e-10) -> range:
    """Counts until the contraction is near the rounding errors."""
    return range(every, int(math.log(smallest) / math.log(contraction)), every)


# Solving the adjoint equation at v*.


def solvers(kappa: float = KAPPA) -> Iterable[Curve]:
    r"""Adjoint solvers after k iterations at v*(u), in the worst spectrum for each.

    .. math::
        \lVert q_k - q^*\rVert \le q^k \lVert q^*\rVert \ (\text{fixed point}), \quad
        2\sqrt\kappa\,\rho^k \lVert q^*\rVert, \ \rho = \frac{\sqrt\kappa-1}{\sqrt\kappa+1}
        \ (\text{CG})

    A Neumann series of k products is k + 1 fixed-point steps. CG on the normal equations is CG on
    A^2, so kappa^2 takes the place of kappa; it costs two products per iteration.
    """
    plain = Quadratic(kappa, 20)
    q, step = plain.q, {"step_size": plain.step}
    root = math.sqrt(kappa)
    rho, normal_rho = (root - 1) / (root + 1), (kappa - 1) / (kappa + 1)
    steepest = (kappa**2 - 1) / (kappa**2 + 1)
    first, second = (Quadratic(kappa, 100, power=p, m=30) for p in (1, 2))
    for method, name, problem, formula, factor, constant, products, options in (
        ("fixed_point", "fixed point", plain, "q^k", q, 1.0, 1, step),
        ("neumann", "Neumann series", plain, "q^k", q, q, 1, step),
        ("cg", "CG", first, "ρ^k", rho, 2 * root, 1, {}),
        ("cg_normal", "CG, normal eq.", second, "q^k", normal_rho, 2 * kappa, 2, {}),
        ("approx_grad", "ApproxGrad", plain, "none, a bound only", steepest, kappa, 2, {}),
    ):
        counts = [k for k in until(factor, every=1 if method == "cg" else 3) if k <= 70]
        options = options | {"tolerance": 1e-15}
        errors = []
        for k in counts:
            p = estimate(problem, problem.best, method, max_iterations=products * k, **options)
            errors.append(problem.error(p))
        bounds = [problem.implicit_bound(0.0, constant * factor**k) for k in counts]
        law = None if method == "approx_grad" else (lambda k, r=factor: r**k)
        since = 10 if method == "cg" else 20
        yield Curve(name, "solver", counts, errors, bounds, law, formula, since)


# Lower steps and the solver together.


def descended(problem: Quadratic, steps: int) -> Tensor:
    """v_t by gradient steps from v_0."""
    v = problem.v
    for _ in range(steps):
        v = v - problem.step * torch.func.grad(problem.lower_loss, 1)(problem.u, v)
    return v


def together(kappa: float = KAPPA) -> Iterable[Curve]:
    """T lower steps from v_0, then t products, or the derivative of the t steps."""
    problem = Quadratic(kappa, 20)
    q, step = problem.q, problem.step
    # Even counts: at odd ones the two ends of the spectrum, with factors q and -q, cancel in part.
    for method, every in (("reverse", 8), ("forward", 16)):
        counts = list(until(q, every=every))
        options: dict[str, Any] = {"method": method, "step_size": step}
        errors = [
            problem.error(estimate(problem, problem.v, lower_steps=t, **options)) for t in counts
        ]
        bounds = [problem.unrolled_bound(t) for t in counts]
        law = lambda t: (1 + t) * q**t  # noqa: E731
        yield Curve(method, "together", counts, errors, bounds, law, "(1+t) q^t", 50)
    counts = list(until(q, every=4))
    iterates = {t: descended(problem, t) for t in counts}
    root = math.sqrt(kappa)
    rho = (root - 1) / (root + 1)
    for method, name, contraction in (
        ("fixed_point", "fixed point, k = t", lambda t: q**t),
        ("cg", "CG, k = t", lambda t: 2 * root * rho**t),
        ("one_step", "one step", lambda t: q),
        ("alternating", "alternating", lambda t: 1.0),
    ):
        iterates_ = method in ("fixed_point", "cg")
        options = {} if method in ("cg", "alternating") else {"step_size": step}
        errors = []
        for t in counts:
            if iterates_:
                options |= {"max_iterations": t, "tolerance": 1e-15}
            errors.append(problem.error(estimate(problem, iterates[t], method, **options)))
        bounds = [problem.implicit_bound(problem.lower_error(t), contraction(t)) for t in counts]
        law = (lambda t: q**t) if iterates_ else (lambda t: 1.0)
        formula = "q^t" if iterates_ else "constant"
        yield Curve(name, "together", counts, errors, bounds, law, formula, 30)
