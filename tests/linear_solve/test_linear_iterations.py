"""Solvers for any matrix - least squares, fixed point, Neumann, stochastic - and warm starts."""

from __future__ import annotations

import math

import pytest
import torch
from problems import generator, join, normal, spd, split
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.linear_solve import (
    conjugate_gradient,
    fixed_point,
    largest_stretch,
    least_squares,
    neumann,
    random_direction,
    stochastic,
)
from torch_penalty_bilevel.tensors import norm

SHAPES = ((3,), (2, 2))
N = 7


def contraction(q: float = 0.6, seed: int = 3) -> Tensor:
    """I - W with ||W||_2 = q, not symmetric."""
    W = normal(N, N, seed=seed)
    return torch.eye(N) - q * W / torch.linalg.matrix_norm(W, 2)


def times(matrix: Tensor):
    return lambda x: split(matrix @ join(x), SHAPES)


def rhs(seed: int = 50) -> tuple[Tensor, ...]:
    return split(normal(N, seed=seed), SHAPES)


def exact(matrix: Tensor, right: tuple[Tensor, ...]) -> Tensor:
    return torch.linalg.solve(matrix, join(right))


def sgd(lr: float):
    return lambda x: torch.optim.SGD(x, lr=lr)


SOLVERS = {
    "least_squares": lambda A, b, **o: least_squares(times(A), b, transposed=times(A.T), **o),
    "descent": lambda A, b, **o: least_squares(
        times(A), b, transposed=times(A.T), conjugate=False, **({"max_iterations": 4000} | o)
    ),
    "fixed_point": lambda A, b, **o: fixed_point(times(A), b, **o),
    "neumann": lambda A, b, **o: neumann(times(A), b, **o),
    "stochastic": lambda A, b, **o: stochastic(times(A), b, optimizer=sgd(1.0), **o),
    "normal_sgd": lambda A, b, **o: stochastic(
        times(A), b, optimizer=sgd(0.7), transposed=times(A.T), **o
    ),
}
ON_SYMMETRIC = {"cg": lambda A, b, **o: conjugate_gradient(times(A), b, **o)}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seed", [3, 4])
def test_solves_a_system_that_is_not_symmetric(name: str, seed: int) -> None:
    A, b = contraction(seed=seed), rhs()
    solution = SOLVERS[name](A, b, tolerance=1e-11)
    # ||x - x*|| <= ||A^{-1}|| ten times the tolerance ||b||, and ||A^{-1}|| <= 1 / (1 - 0.6).
    assert_close(join(solution.value), exact(A, b), rtol=0, atol=25e-11 * float(join(b).norm()))
    assert solution.converged
    assert solution.message == "converged"
    assert [t.shape for t in solution.value] == [torch.Size(s) for s in SHAPES]
    true_residual = float((join(b) - A @ join(solution.value)).norm())
    assert solution.residual_norm == pytest.approx(true_residual, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
def test_stopped_early_says_so_with_the_residual_of_the_last_iterate(name: str) -> None:
    A, b = contraction(), rhs()
    solution = SOLVERS[name](A, b, max_iterations=4)
    assert not solution.converged
    assert "max_iterations" in solution.message
    assert 4 <= solution.iterations <= 8  # A'd costs a product of its own
    true_residual = float((join(b) - A @ join(solution.value)).norm())
    assert solution.residual_norm == pytest.approx(true_residual, rel=1e-12)
    assert true_residual > 1e-10


@pytest.mark.parametrize("name", [*SOLVERS, "cg"])
def test_warm_start(name: str) -> None:
    """From the solution nothing is left to do; from near it there is less than from zero."""
    A, b = spd(N, 1, 3.0) / 4, rhs()
    solver = (SOLVERS | ON_SYMMETRIC)[name]
    x = split(exact(A, b), SHAPES)
    there = solver(A, b, start=x)
    assert there.iterations == 0
    assert there.converged
    assert_close(join(there.value), join(x), rtol=1e-13, atol=1e-13)
    near = split(join(x) + 1e-6 * normal(N, seed=9), SHAPES)
    kept = tuple(t.clone() for t in near)
    tolerance = 1e-9
    warm, cold = solver(A, b, start=near, tolerance=tolerance), solver(A, b, tolerance=tolerance)
    assert warm.converged
    assert cold.converged
    assert warm.iterations < cold.iterations
    assert all(torch.equal(a, k) for a, k in zip(near, kept, strict=True))
    # ||A^{-1}|| is 4; ten times the bound is believed by least squares.
    bound = 40 * tolerance * float(join(b).norm())
    assert_close(join(warm.value), join(x), rtol=0, atol=bound)


@pytest.mark.parametrize("name", [*SOLVERS, "cg"])
def test_zero_right_side_and_inputs_left_alone(name: str) -> None:
    A, zero = spd(N, 1) / 20, split(torch.zeros(N), SHAPES)
    solution = (SOLVERS | ON_SYMMETRIC)[name](A, zero)
    assert solution.converged
    assert solution.iterations == 0
    assert torch.equal(join(solution.value), torch.zeros(N))
    b = rhs()
    kept = tuple(t.clone() for t in b)
    (SOLVERS | ON_SYMMETRIC)[name](A, b, max_iterations=6)
    assert all(torch.equal(a, k) for a, k in zip(b, kept, strict=True))


@pytest.mark.parametrize("name", [*SOLVERS, "cg"])
def test_a_product_that_is_not_finite_is_a_breakdown(name: str) -> None:
    A = contraction()
    A[2, 3] = math.nan
    solution = (SOLVERS | ON_SYMMETRIC)[name](A, rhs())
    assert join(solution.value).isnan().all()
    assert math.isnan(solution.residual_norm)
    assert not solution.converged
    assert solution.message != "converged"


# Fixed point and Neumann.


@pytest.mark.parametrize("step_size", [1.0, 0.5])
@pytest.mark.parametrize("start", [False, True])
def test_iterates_are_those_of_the_formula(step_size: float, start: bool) -> None:
    """x_k - x* = (I - eta A)^k (x_0 - x*), and K Neumann products are K + 1 such steps."""
    A, b = contraction(), rhs()
    x0 = rhs(60) if start else None
    from_ = join(x0) if x0 else torch.zeros(N)
    M = torch.eye(N) - step_size * A
    best = exact(A, b)
    for k in (1, 2, 5):
        expected = best + torch.linalg.matrix_power(M, k) @ (from_ - best)
        options = {"step_size": step_size, "start": x0, "tolerance": 1e-15}
        steps = fixed_point(times(A), b, max_iterations=k, **options)
        # Rounding of k products.
        assert_close(join(steps.value), expected, rtol=1e-13, atol=1e-13)
        assert steps.iterations == k
        series = neumann(times(A), b, max_iterations=k, **options)
        after = best + torch.linalg.matrix_power(M, k + 1) @ (from_ - best)
        assert_close(join(series.value), after, rtol=1e-13, atol=1e-13)
        assert series.iterations == k
        by_sgd = stochastic(
            times(A), b, optimizer=sgd(step_size), max_iterations=k, start=x0, tolerance=1e-15
        )
        assert_close(join(by_sgd.value), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", [fixed_point, neumann])
@pytest.mark.parametrize("iterations", [3, 50, 1000])
def test_divergence_is_nan(solver, iterations: int) -> None:
    """Eigenvalues up to 5 with step 1: a factor of 4 per step."""
    A = spd(N, 1, 5.0)
    solution = solver(times(A), rhs(), max_iterations=iterations)
    assert join(solution.value).isnan().all()
    assert not solution.converged
    assert "diverged" in solution.message
    assert "step_size" in solution.message


# Least squares.


def test_least_squares_takes_two_products_per_distinct_singular_value() -> None:
    values = torch.tensor([2.0, 2.0, 5.0, 5.0, 5.0, 2.0, 2.0])
    rotation = torch.linalg.qr(normal(N, N, seed=1)).Q
    A, b = rotation @ torch.diag(values), rhs()
    solution = SOLVERS["least_squares"](A, b, tolerance=1e-12)
    assert solution.iterations == 4
    assert_close(join(solution.value), exact(A, b), rtol=1e-11, atol=1e-11)


def test_gradient_steps_with_the_best_length() -> None:
    """The slow twin: x += <s, s> / |A s|^2 s with s = A'(b - A x)."""
    A, b = contraction(), rhs()
    x = torch.zeros(N)
    for k in range(1, 4):
        s = A.T @ (join(b) - A @ x)
        x = x + (s @ s) / (A @ s).square().sum() * s
        solution = SOLVERS["descent"](A, b, max_iterations=2 * k)
        assert_close(join(solution.value), x, rtol=1e-12, atol=1e-13)
        assert solution.iterations == 2 * k


# Stochastic.


def test_normal_equations_by_sgd_are_gradient_descent() -> None:
    A, b, x = contraction(), rhs(), torch.zeros(N)
    for _ in range(3):
        x = x - 0.3 * A.T @ (A @ x - join(b))
    solution = stochastic(times(A), b, optimizer=sgd(0.3), transposed=times(A.T), max_iterations=3)
    assert_close(join(solution.value), x, rtol=1e-13, atol=1e-13)
    assert solution.iterations == 6


def test_any_torch_optimizer() -> None:
    A, b = spd(N, 1, 3.0), rhs()
    for make in (
        lambda x: torch.optim.Adam(x, lr=0.1),
        lambda x: torch.optim.SGD(x, lr=0.2, momentum=0.5),
    ):
        solution = stochastic(times(A), b, optimizer=make, tolerance=1e-8, max_iterations=5000)
        assert solution.converged
        assert_close(join(solution.value), exact(A, b), rtol=0, atol=1e-7)


@pytest.mark.long
def test_noise_is_averaged() -> None:
    """Sampled products keep SGD at a distance; J samples divide its square by about J."""
    A, b = contraction(), rhs()
    source = generator(5)

    def noisy(x):
        W = torch.randn(N, N, generator=source)
        return split((A + 0.3 * W) @ join(x), SHAPES)

    def mean_square(samples: int) -> float:
        errors = []
        for _ in range(60):
            solution = stochastic(noisy, b, optimizer=sgd(0.2), samples=samples, max_iterations=80)
            assert not solution.converged  # the noise is seen: 1e-10 is never reached
            assert solution.iterations == 80 * samples
            errors.append(float((join(solution.value) - exact(A, b)).square().sum()))
        return sum(errors) / len(errors)

    # SGD's square error is proportional to the variance of its direction, J times less: 16, up
    # to the spread of two means of 60 and the part of the noise that is multiplied by the error.
    assert 8 < mean_square(1) / mean_square(16) < 32


def test_a_factory_must_make_an_optimizer() -> None:
    with pytest.raises(TypeError, match="made list"):
        stochastic(times(contraction()), rhs(), optimizer=lambda x: x)  # type: ignore[arg-type]


def test_divergence_of_the_optimizer_is_nan() -> None:
    solution = stochastic(times(spd(N, 1, 5.0)), rhs(), optimizer=sgd(1.0), max_iterations=50)
    assert join(solution.value).isnan().all()
    assert "learning rate" in solution.message


# The size of a matrix.


@pytest.mark.parametrize("seed", range(5))
def test_largest_stretch(seed: int) -> None:
    A = spd(N, seed, 10.0)
    A[0, 0] -= 3.0  # may be indefinite
    found = largest_stretch(times(A), rhs())
    norm = float(torch.linalg.matrix_norm(A, 2))
    assert found <= norm * (1 + 1e-12)
    assert found >= 0.8 * norm  # 1 / found is then below 2 / ||A||, which is what it is for
    assert largest_stretch(lambda x: tuple(0 * t for t in x), rhs()) == 0


@pytest.mark.parametrize("solver", [fixed_point, neumann])
def test_a_start_worse_than_zero_that_improves_is_no_divergence(solver) -> None:
    # Warm starts belong to another right-hand side; few iterations cannot mend a bad one.
    A = torch.tensor([1.0, 0.01], dtype=torch.float64)
    right, start = torch.tensor([1.0, 0.0]).to(A), torch.tensor([0.0, 500.0]).to(A)
    found = solver(lambda x: (A * x[0],), (right,), max_iterations=1, start=(start,))
    first = float((right - A * start).norm())
    assert float(right.norm()) < found.residual_norm < first
    assert not found.converged
    # The same start under an iteration that grows is divergence.
    grown = solver(lambda x: (-A * x[0],), (right,), max_iterations=1, start=(start,))
    assert math.isnan(grown.residual_norm)


def test_the_random_direction_is_one_for_all_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    like = (torch.zeros(3, 2), torch.zeros(4, dtype=torch.bfloat16))
    first, again = random_direction(like), random_direction(like)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert float(norm(first)) == pytest.approx(1, rel=1e-6)
    assert all(part.any() for part in first)
