"""Conjugate gradients and least squares against direct solves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import join, normal, spd, split
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.linear_solve import conjugate_gradient, least_squares

SHAPES = {1: ((1,),), 2: ((2,),), 7: ((3,), (2, 2)), 20: ((4, 4), (4,))}


class Counted:
    """x -> A x on tuples, counting its calls."""

    def __init__(self, matrix: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
        self.matrix, self.shapes, self.calls = matrix, shapes, 0

    def __call__(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.calls += 1
        return split(self.matrix @ join(x), self.shapes)


@pytest.mark.parametrize("n", SHAPES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("seed", [0, 1])
def test_solves_and_reports_the_truth(n: int, condition: float, seed: int) -> None:
    matrix, right = spd(n, seed, condition), normal(n, seed=seed + 50)
    solution = conjugate_gradient(
        Counted(matrix, SHAPES[n]), split(right, SHAPES[n]), tolerance=1e-12
    )
    expected = torch.from_numpy(np.linalg.solve(matrix.numpy(), right.numpy()))
    # ||x - x*|| <= cond * tolerance * ||x*||.
    assert_close(join(solution.value), expected, rtol=1e-11 * condition, atol=1e-11)
    assert [t.shape for t in solution.value] == [torch.Size(s) for s in SHAPES[n]]
    true_residual = float((right - matrix @ join(solution.value)).norm())
    assert solution.residual_norm == pytest.approx(true_residual, rel=1e-6, abs=1e-14)
    assert solution.converged
    assert solution.message == "converged"
    if condition <= 10 and n < 10:
        assert solution.iterations <= n + 1  # exact arithmetic needs n, one spare for rounding


def test_agrees_with_scipy_iterate_by_iterate() -> None:
    """The LAST iterate comes back; returning the one before is a classic bug of this routine."""
    matrix, right = spd(9, 3, 100.0), normal(9, seed=4)
    iterates: list[np.ndarray] = []
    scipy.sparse.linalg.cg(
        matrix.numpy(),
        right.numpy(),
        rtol=1e-14,
        atol=0,
        maxiter=8,
        callback=lambda x: iterates.append(x.copy()),
    )
    for k in range(1, 9):
        solution = conjugate_gradient(
            Counted(matrix, ((9,),)), (right,), tolerance=1e-14, max_iterations=k
        )
        assert solution.iterations == k
        # Two recurrences in another order: rounding only.
        assert_close(solution.value[0], torch.from_numpy(iterates[k - 1]), rtol=1e-9, atol=1e-9)


def test_one_unknown_takes_one_iteration() -> None:
    solution = conjugate_gradient(lambda x: (4 * x[0],), (torch.tensor(3.0, dtype=torch.float64),))
    assert solution.iterations == 1
    assert float(solution.value[0]) == 0.75
    assert solution.residual_norm == 0
    assert solution.converged


def test_distinct_eigenvalues_bound_the_iterations() -> None:
    """Three distinct eigenvalues: three iterations, whatever the size."""
    eigenvalues = torch.tensor([1.0] * 10 + [5.0] * 10 + [20.0] * 10, dtype=torch.float64)
    right = normal(30, seed=1)
    solution = conjugate_gradient(lambda x: (eigenvalues * x[0],), (right,), tolerance=1e-12)
    assert solution.iterations == 3
    assert_close(solution.value[0], right / eigenvalues, rtol=1e-11, atol=0)


def test_zero_right_side_needs_nothing() -> None:
    product = Counted(spd(2, 0), ((2,),))
    solution = conjugate_gradient(product, (torch.zeros(2, dtype=torch.float64),))
    assert solution.iterations == 0
    assert solution.converged
    assert torch.equal(solution.value[0], torch.zeros(2, dtype=torch.float64))


def test_stopped_early_says_so() -> None:
    matrix, right = spd(20, 1, 1e4), normal(20, seed=2)
    product = Counted(matrix, ((20,),))
    solution = conjugate_gradient(product, (right,), tolerance=1e-10, max_iterations=3)
    assert not solution.converged
    assert solution.iterations == 3
    assert "stopped after 3 products" in solution.message
    assert "max_iterations" in solution.message
    true_residual = float((right - matrix @ solution.value[0]).norm())
    assert solution.residual_norm == pytest.approx(true_residual, rel=1e-10)
    assert true_residual > 1e-10 * float(right.norm())


def test_default_limit_is_ten_times_the_unknowns() -> None:
    """float32 cannot reach 1e-12; the loop ends after 10 n products and admits it."""
    matrix, right = spd(4, 3, 1e3).float(), normal(4, seed=5).float()
    product = Counted(matrix, ((4,),))
    solution = conjugate_gradient(product, (right,), tolerance=1e-12)
    assert not solution.converged
    assert 40 <= solution.iterations <= 41
    assert product.calls <= 42
    # The best float32 has to offer: cond * eps = 1e-4.
    truth = torch.linalg.solve(matrix.double(), right.double())
    assert_close(solution.value[0].double(), truth, rtol=1e-3, atol=1e-3)


def test_convergence_claimed_by_the_recursion_alone_is_not_believed() -> None:
    """The first product lies; the recursive residual vanishes at once, the true one does not."""
    calls = iter(range(1000))
    right = torch.tensor([1.0, 1.0], dtype=torch.float64)
    solution = conjugate_gradient(lambda x: ((1 if next(calls) == 0 else 2) * x[0],), (right,))
    assert_close(solution.value[0], right / 2, rtol=1e-10, atol=0)
    assert solution.converged
    assert solution.iterations > 1

    calls = iter(range(1000))  # out of products right after the lie: x = b, and b - 2 x = -b
    solution = conjugate_gradient(
        lambda x: ((1 if next(calls) == 0 else 2) * x[0],), (right,), max_iterations=1
    )
    assert not solution.converged
    assert solution.residual_norm == pytest.approx(2**0.5, rel=1e-12)


def test_tolerance_is_relative_to_the_right_side_and_has_an_effect() -> None:
    matrix, right = spd(20, 1, 1e3), normal(20, seed=2)
    counts = []
    for tolerance in (1e-2, 1e-6):
        for scale in (1.0, 2.0**20):  # a power of two rounds nothing
            solution = conjugate_gradient(
                Counted(matrix, ((20,),)), (scale * right,), tolerance=tolerance
            )
            assert solution.converged
            assert solution.residual_norm <= tolerance * scale * float(right.norm())
            counts.append(solution.iterations)
    assert counts[0] == counts[1] < counts[2] == counts[3]


def test_recomputed_residual_reaches_what_the_recursive_one_only_claims() -> None:
    """On a badly conditioned system the recursive residual drifts; 'converged' stays the truth."""
    matrix, right = spd(20, 7, 1e7), normal(20, seed=8)
    solution = conjugate_gradient(
        Counted(matrix, ((20,),)), (right,), tolerance=1e-9, max_iterations=2_000
    )
    assert solution.converged
    assert float((right - matrix @ solution.value[0]).norm()) <= 1.01e-9 * float(right.norm())


@pytest.mark.parametrize(
    ("diagonal", "message", "status"),
    [
        ((1.0, -2.0), "curvature -", "negative_curvature"),
        ((0.0, 0.0), "curvature 0", "negative_curvature"),
        ((1.0, math.nan), "not finite", "not_finite"),
        ((-1.0, -1.0), "curvature -", "negative_curvature"),
    ],
)
def test_breakdown_is_nan_and_never_a_number(
    diagonal: tuple[float, float], message: str, status: str
) -> None:
    A = torch.tensor(diagonal, dtype=torch.float64)
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solution = conjugate_gradient(lambda x: (A * x[0],), (right,))
    assert solution.value[0].isnan().all()
    assert math.isnan(solution.residual_norm)
    assert not solution.converged
    assert solution.iterations == 1
    assert solution.status == status
    assert message in solution.message
    # No damping makes a number of what is none.
    assert ("damping" in solution.message) == (status == "negative_curvature")


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_a_breakdown_says_how_much_damping_is_needed(size: float) -> None:
    """b = size (1, 1) and H = diag(-3, 1): <b, H b> / <b, b> = -1, whatever the size of b."""
    A = torch.tensor([-3.0, 1.0], dtype=torch.float64)
    right = torch.full((2,), size, dtype=torch.float64)
    message = conjugate_gradient(lambda x: (A * x[0],), (right,)).message
    assert "curvature -1 (" in message
    assert "damping above 1," in message
    assert "weight decay" in message
    flat = conjugate_gradient(lambda x: (0 * x[0],), (right,)).message
    assert "damping above 0," in flat


def test_inputs_are_not_modified() -> None:
    right = (normal(3, seed=1), normal(2, 2, seed=2))
    copies = tuple(t.clone() for t in right)
    conjugate_gradient(Counted(spd(7, 1), SHAPES[7]), right)
    assert all(torch.equal(a, b) for a, b in zip(right, copies, strict=True))


def indefinite(n: int, seed: int, condition: float) -> Tensor:
    """Eigenvalues 1 .. condition with alternating signs."""
    basis = torch.linalg.qr(normal(n, n, seed=seed)).Q
    eigenvalues = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    eigenvalues[::2] *= -1
    return basis @ torch.diag(eigenvalues) @ basis.T


@pytest.mark.parametrize("n", SHAPES)
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_least_squares_solves_indefinite_systems(n: int, condition: float) -> None:
    matrix, right = indefinite(n, 3, condition), normal(n, seed=50)
    product = Counted(matrix, SHAPES[n])
    solution = least_squares(product, split(right, SHAPES[n]), tolerance=1e-12)
    expected = torch.linalg.solve(matrix, right)
    # ||x - x*|| <= cond * ten times the tolerance * ||x*||.
    assert_close(join(solution.value), expected, rtol=1e-10 * condition, atol=1e-10)
    assert solution.converged
    assert solution.iterations == product.calls - 1  # the last one confirms the residual
    true_residual = float((right - matrix @ join(solution.value)).norm())
    assert solution.residual_norm == pytest.approx(true_residual, rel=1e-6, abs=1e-14)


def test_least_squares_takes_two_products_per_distinct_square() -> None:
    """Eigenvalues 2, -2, 5, -5: two different squares, two iterations."""
    eigenvalues = torch.tensor([2.0, -2.0, 5.0, -5.0], dtype=torch.float64)
    right = normal(4, seed=1)
    solution = least_squares(lambda x: (eigenvalues * x[0],), (right,), tolerance=1e-12)
    assert solution.iterations == 4
    assert_close(solution.value[0], right / eigenvalues, rtol=1e-12, atol=0)


def test_least_squares_admits_that_there_is_no_solution() -> None:
    A = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    right = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    solution = least_squares(lambda x: (A * x[0],), (right,))
    assert not solution.converged
    assert solution.residual_norm == pytest.approx(3.0)
    assert "stopped at" in solution.message
    assert solution.status == "no_solution"
    assert_close(solution.value[0], torch.tensor([1.0, 0.0, -4.0], dtype=torch.float64))
    early = least_squares(
        Counted(indefinite(9, 1, 100.0), ((9,),)), (normal(9, seed=2),), max_iterations=4
    )
    assert early.iterations == 4
    assert early.status == "unfinished"
    assert not early.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_kernel_is_not_followed_to_infinity(kernel, dtype):
    """Rounding leaves directions of the kernel a curvature of 1e-33, which is none."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        right = torch.randn(6, generator=generator, dtype=dtype)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=dtype)).Q
        eigenvalues = torch.cat((torch.zeros(kernel), torch.linspace(1, 3, 6 - kernel))).to(dtype)
        matrix = basis @ torch.diag(eigenvalues) @ basis.T
        for a in (matrix, torch.diag(eigenvalues)):
            solution = conjugate_gradient(lambda x, a=a: (a @ x[0],), (right,))
            assert solution.status == "negative_curvature"


def test_a_bad_condition_number_is_no_kernel():
    eigenvalues = torch.logspace(-10, 0, 6)
    solution = conjugate_gradient(lambda x: (eigenvalues * x[0],), (torch.ones(6),), tolerance=1e-8)
    assert solution.converged
    torch.testing.assert_close(solution.value[0], 1 / eigenvalues, rtol=1e-6, atol=0)


def test_a_curvature_that_overflows_is_not_called_negative():
    """<d, A d> = 3e320: a step of length 0 would follow."""
    solution = conjugate_gradient(lambda x: (1e300 * x[0],), (torch.full((3,), 1e10),))
    assert solution.status == "not_finite"
