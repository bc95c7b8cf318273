"""What ``benchmarks/rates`` draws, as assertions: errors under their bounds, with their slopes.

The bounds are those of Grazzi et al. (ICML 2020; AISTATS 2021 for samples) with the constants of
the problem, which ``benchmarks/rates/problem.py`` derives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.rates.curves import KAPPA, Curve, descended, estimate, solvers, together
from benchmarks.rates.penalties import one_loop, penalties
from benchmarks.rates.problem import Quadratic
from benchmarks.rates.samples import Sampled, decreasing, sampled

# Where random projections (CG) or draws (samples) make errors fluctuate, and where a power of t
# stands beside the exponential, the slopes agree to 3 %; all others to 1 %.
SLACK = 0.05


@pytest.mark.long
@pytest.mark.parametrize("family", [solvers, together, sampled, penalties, one_loop])
def test_errors_are_under_their_bounds_and_have_their_slopes(
    family: Callable[[], Iterable[Curve]],
) -> None:
    for curve in family():
        assert all(0 < error < math.inf for error in curve.errors), curve.name
        assert curve.worst_ratio <= 1, curve.name
        assert curve.worst_ratio > 1e-3, curve.name  # the bound says something
        if curve.law is not None:
            expected = curve.expected_slope
            # 1e-4: a bias that stays has slope 0.
            assert abs(curve.slope - expected) <= SLACK * abs(expected) + 1e-4, curve.name


def test_factors_are_those_of_the_condition_number() -> None:
    """Condition number 4, in numbers: q = 3/5, rho = 1/3."""
    slopes = {curve.name: curve.slope for curve in solvers(4.0)}
    expected = {"fixed point": 0.6, "Neumann series": 0.6, "CG": 1 / 3, "CG, normal eq.": 0.6}
    for name, factor in expected.items():
        assert slopes[name] == pytest.approx(math.log(factor), rel=SLACK), name


def test_the_derivative_of_the_steps_has_a_power_of_t_that_implicit_methods_have_not() -> None:
    """(1 + t) q^t against q^t: error / q^t grows evenly with t, or stays."""
    problem = Quadratic(KAPPA, 20)

    def over_power(method: str, t: int) -> Tensor:
        v, options = problem.v, {"lower_steps": t}
        if method == "fixed_point":
            v, options = descended(problem, t), {"max_iterations": t, "tolerance": 1e-15}
        p = estimate(problem, v, method, step_size=problem.step, **options)
        return (p - problem.exact) / problem.q**t

    # Even t: (-q)^t at the other end of the spectrum has the same sign then. The next eigenvalue
    # adds 0.895^t, t times: 0.4 % at 50, of an error / q^t that is up to 10 times the growth.
    a, b, c = (over_power("reverse", t) for t in (50, 70, 90))
    assert float((b - a).norm()) > 0.1 * float(a.norm())
    assert_close(c - b, b - a, rtol=0, atol=0.04 * float((b - a).norm()))
    a, b = (over_power("fixed_point", t) for t in (50, 90))
    assert_close(b, a, rtol=0, atol=0.01 * float(a.norm()))


def test_what_does_not_iterate_has_the_bias_of_its_closed_form() -> None:
    """At v*: q = -eta grad_v f, or 0, in the place of -A^{-1} grad_v f."""
    problem = Quadratic(KAPPA, 20)
    for method, eta in (("one_step", problem.step), ("alternating", 0.0)):
        options = {"step_size": eta} if eta else {}
        measured = problem.error(estimate(problem, problem.best, method, **options))
        expected = float((problem.J @ ((1 / problem.A - eta) * problem.slope)).norm())
        assert measured == pytest.approx(expected, rel=1e-12), method


@pytest.mark.parametrize("samples", [1, 4])
def test_mean_squares_of_samples_are_their_closed_form(samples: int) -> None:
    """Mean and variance of each entry of q follow a recursion of their own: A is diagonal.

    With a_i the entries of A and noise variance s^2 / J: m <- m - eta (a m - b) and
    w <- (1 - eta a)^2 w + eta^2 (s^2 / J) (w + m^2).
    """
    problem, steps = Sampled(KAPPA, 2.0, 0.0, copies=400), 40
    first, offset = 0.1, 20.0
    measured = problem.mean_square(
        linear_optimizer=decreasing(first, offset), max_iterations=steps, samples=samples
    )
    mean, spread = torch.zeros(20), torch.zeros(20)
    for k in range(steps):
        eta, noise = first * offset / (offset + k), problem.noise**2 / samples
        drawn = eta**2 * noise * (spread + mean.square())
        spread = (1 - eta * problem.A).square() * spread + drawn
        mean = mean - eta * (problem.A * mean + problem.slope)
    bias = (problem.J @ (mean - problem.adjoint)).square().sum()
    expected = float(bias + (problem.J.square() @ spread).sum())
    # 400 copies of at least one degree of freedom: sqrt(2 / 400) = 7 %, three times that.
    assert measured == pytest.approx(expected, rel=0.21)
