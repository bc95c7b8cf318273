"""Linear algebra in Python numbers against torch's."""

from dataclasses import replace

import pytest
import torch

from torch_penalty_bilevel.multipliers import small_matrices as small
from torch_penalty_bilevel.multipliers.lower_correction import NO_TRUST, coefficients_of
from torch_penalty_bilevel.multipliers.subspace import (
    Products,
    conjugate,
    correction,
    orthonormal,
    seen,
)


def positive(seed, least=0.1):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    return basis @ torch.diag(least + torch.rand(3, generator=generator)) @ basis.T


def general(seed):
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(100 + seed))


def test_products():
    matrix, rows, vector = general(0), general(1), general(2)[0]
    close = torch.testing.assert_close
    m, w, x = matrix.tolist(), rows.tolist(), vector.tolist()
    close(torch.tensor(small.times(m, x)), matrix @ vector)
    close(torch.tensor(small.transposed(m)), matrix.T)
    close(torch.tensor(small.congruent(m, w)), rows @ matrix @ rows.T)
    close(torch.tensor(small.plus(x, -0.3, w[0])), vector - 0.3 * rows[0])
    assert small.inner(x, w[1]) == pytest.approx(float(vector @ rows[1]))


def test_the_symmetric_part_and_the_norm_of_the_rest():
    matrix = general(3)
    half, rest = small.symmetric_part(matrix.tolist())
    torch.testing.assert_close(torch.tensor(half), (matrix + matrix.T) / 2)
    assert rest == pytest.approx(float((matrix - matrix.T).norm() / 2))


@pytest.mark.parametrize("seed", range(20))
def test_positive_means_all_eigenvalues_above(seed):
    matrix = (general(seed) + general(seed).T) / 2
    for eigenvalue in torch.linalg.eigvalsh(matrix):
        for offset in (-1e-6, 1e-6):
            above = float(eigenvalue) + offset
            right = bool(torch.linalg.eigvalsh(matrix)[0] > above)
            assert small.is_positive(matrix.tolist(), above) is right


@pytest.mark.parametrize("seed", range(5))
def test_whitening_makes_the_matrix_the_identity(seed):
    matrix = positive(seed)
    rows = torch.tensor(small.whitening(matrix.tolist()))
    torch.testing.assert_close(rows @ matrix @ rows.T, torch.eye(3))


def test_a_diagonal_of_ones():
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, 0.25, 0.0], [0.0, 0.0, 0.0]])
    right = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(torch.tensor(small.unit_diagonal(matrix.tolist())), right)


def products(basis, mixed, images=None, slopes=(0.0,) * 3, image_slopes=(0.0,) * 3):
    images = mixed @ mixed if images is None else images
    matrices = (m.tolist() for m in (basis, mixed, images))
    return Products(*matrices, list(slopes), list(image_slopes), 0.0, True, [0.0] * 3, [], [])


def conjugate_directions(given):
    rows, curvature, noise = seen(given)
    return conjugate(curvature, max(1e-3, noise), rows)


def inverse(rows):
    rows = torch.tensor(rows).reshape(-1, 3)
    return rows.T @ rows


@pytest.mark.parametrize("seed", range(10))
def test_the_inverse_of_the_curvature_whatever_the_units_of_the_directions(seed):
    scale = torch.tensor([1e-4, 1.0, 1e4])
    basis = positive(seed) * scale * scale[:, None]
    curvature = positive(seed + 50) * scale * scale[:, None]
    found = inverse(conjugate_directions(products(basis, curvature)))
    right = torch.linalg.inv(curvature / (scale * scale[:, None])) / (scale * scale[:, None])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_both_ways_find_the_same(seed, monkeypatch):
    """Numbers where all directions are believed, eigenvectors where some are not."""
    given = products(positive(seed), positive(seed + 50))
    by_numbers = inverse(conjugate_directions(given))
    monkeypatch.setattr("torch_penalty_bilevel.multipliers.subspace.is_positive", lambda *_: False)
    torch.testing.assert_close(inverse(conjugate_directions(given)), by_numbers)


@pytest.mark.parametrize(
    ("basis", "curvature", "believed"),
    [
        ([1.0, 1.0, 1.0], [1.0, 0.5, -0.5], 2),  # curves downwards
        ([1.0, 1.0, 1.0], [1.0, 0.5, 1e-4], 2),  # flat
        ([1.0, 1.0, 0.0], [1.0, 0.5, 0.0], 2),  # there is no third direction
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0),
        ([1.0, 1.0, 1.0], [1.0, 0.5, 0.2], 3),
    ],
)
def test_what_is_not_believed_is_left_out(basis, curvature, believed):
    given = products(torch.diag(torch.tensor(basis)), torch.diag(torch.tensor(curvature)))
    rows = conjugate_directions(given)
    assert len(rows) == believed
    right = torch.diag(torch.tensor([1 / c if c > 1e-3 else 0.0 for c in curvature]))
    torch.testing.assert_close(inverse(rows), right)


def test_images_that_are_not_symmetric_are_not_believed():
    """An antisymmetric part of norm .4 x sqrt 2 outweighs the curvature .5, not 2."""
    curvature = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.4], [0.0, -0.4, 0.5]])
    given = products(torch.eye(3), curvature)
    right = torch.diag(torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(inverse(conjugate_directions(given)), right)
    # Nor is (HB)'HB = diag(4, 4 + .16, .25 + .16) in what is shorter than twice that norm.
    slopes = products(torch.eye(3), curvature, torch.diag(torch.tensor([4.0, 4.0, 0.4])))
    slopes = slopes._replace(image_slopes=[4.0, 4.0, 4.0])
    assert correction(slopes, 1.0, 1.0, 0.0) == pytest.approx([-1.0, -1.0, 0.0])


def test_parallel_directions_count_as_one():
    basis = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-6, 0.0], [0.0, 0.0, 1.0]])
    assert len(conjugate_directions(products(basis, basis))) == 2
    rows = torch.tensor(orthonormal(basis.tolist()))
    torch.testing.assert_close(rows @ basis @ rows.T, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_how_flat_a_direction_may_be():
    """1e-3 L by energy, 1e-4 L by residual and for v; the images of the flat are as short."""
    curvatures = torch.tensor([1.0, 5e-4, 5e-5])
    given = products(torch.eye(3), torch.diag(curvatures))
    ones = [1.0, 1.0, 1.0]
    given = given._replace(slopes=ones, image_slopes=curvatures.tolist(), lower_slopes=ones)
    assert correction(given, 1.0, 1.0, 1.0) == pytest.approx([-1.0, 0.0, 0.0])
    assert correction(given, 1.0, 1.0, 0.0) == pytest.approx([-1.0, -2000.0, 0.0])
    given = given._replace(lower_squares=[1.0, 1e12])
    trust = replace(NO_TRUST, lower_gain=1.0, lower_surprise=0.0)
    assert coefficients_of(given, 1.0, trust) == pytest.approx([-1.0, -2000.0, 0.0])
    assert correction(given, 10.0, 1.0, 0.0) == pytest.approx([-1.0, 0.0, 0.0])
