"""One correction as a formula, where it must not be made, and how long an odd batch counts."""

import warnings

import pytest
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.evaluation import Norms
from torch_penalty_bilevel.multipliers import correction, forecast
from torch_penalty_bilevel.multipliers.forecast import Forecast
from torch_penalty_bilevel.multipliers.least_squares_state import SubspaceState
from torch_penalty_bilevel.multipliers.subspace import Past, corrected

N = 5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spanned(hessian, vectors, residual):
    q, past, move = vectors
    known = Past((past,), (hessian @ past,), (move,), (hessian @ move,))
    return known.span((q,), (hessian @ q,), (residual,))


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_correction_is_followed_by_the_plain_step_of_the_shifted_system(shift):
    """Q + B c - step * (H + mu) B c, by matrices."""
    root, vectors = drawn(N, N, seed=1), drawn(3, N, seed=2)
    hessian, step, c = root @ root.T, 0.3, [0.5, -1.0, 2.0]
    subspace = spanned(hessian, vectors, drawn(N, seed=3))
    start = drawn(N, seed=4)
    (found,) = corrected((start,), subspace, c, step, shift)
    q, past, move = vectors
    along = torch.stack([q, q - past, move], 1) @ torch.tensor(c)
    expected = start + along - step * (hessian + shift * torch.eye(N)) @ along
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overflown", [24, 48, 3])
def test_products_that_overflow_correct_nothing(overflown):
    """The vectors are finite and the past goes on, so that the next evaluation may be corrected."""
    root, vectors = drawn(N, N, seed=1), drawn(3, N, seed=2)
    subspace = spanned(root @ root.T, vectors, drawn(N, seed=3))
    numbers = [float(x) for x in subspace.inner_products.reshape(-1)]
    trusted = Forecast(gain=1.0, missed=0.0, was_made=True, square_before=1.0)
    state = SubspaceState.at((vectors[0],), curvature=30.0, forecast=trusted)
    start = (drawn(N, seed=4),)

    def after(numbers):
        norms = Norms(*([1.0] * 8), inner_products=tuple(numbers))
        return correction.corrected(start, state, subspace, norms, 0.0, 0.5)

    (moved,), seen = after(numbers)
    assert not torch.equal(moved, start[0])
    assert seen.forecast != trusted
    numbers[overflown] = float("inf")
    (held,), seen = after(numbers)
    assert torch.equal(held, start[0])
    assert seen.forecast == trusted
    assert torch.equal(seen.past[0], subspace.basis[0][0])


def standing(matrices, seed):
    """v hardly moves while H goes through ``matrices``; the gain after every step."""
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(20, requires_grad=True)
    slope = drawn(20, seed=seed)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=1e-6)
    gains = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the odd step's certificate
        for hessian in matrices:
            optimizer.lower_step(
                lambda: slope @ v + 0 * u.sum(),
                lambda h=hessian: v @ h @ v / 2 + u.sum() * v.sum(),
            )
            gains.append(optimizer._dual.forecast.gain)
            assert optimizer._dual.forecast.missed <= 2.0
    return gains


def ill_conditioned(seed):
    values, basis = torch.logspace(0, 3, 20), torch.linalg.qr(drawn(20, 20, seed=seed + 10)).Q
    return values, basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_odd_batch_is_forgotten_in_tens_of_steps(seed):
    """Images of another H forecast up to 1e4 times too much: the average kept that for 600."""
    values, hessian = ill_conditioned(seed)
    odd = 30 * torch.diag(values.flip(0))
    gains = standing([hessian] * 100 + [odd] + [hessian] * 60, seed)
    assert gains[99] > 0.9
    assert min(gains[100:110]) < 0.3  # noticed
    assert min(gains[150:]) > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_units_for_a_while_are_forgotten_too(seed):
    """G times 1e3 for 100 steps and back."""
    _, hessian = ill_conditioned(seed)
    gains = standing([hessian] * 100 + [1e3 * hessian] * 100 + [hessian] * 60, seed)
    assert min(gains[140:200]) > 0.8
    assert min(gains[250:]) > 0.9


def test_an_error_counts_as_much_as_a_forecast_no_longer_than_what_was():
    """||x - y||^2 <= 2 (||x||^2 + ||y||^2), with equality where x = -y."""
    one = torch.eye(3)
    past = Past((one[1],), (one[1],), (one[2],), (one[2],))
    subspace = past.span((one[0],), (one[0],), (one[0],))
    numbers = tuple(float(x) for x in subspace.inner_products.reshape(-1))
    products = correction.spans.Products.of(numbers, 0.0)

    def missed(times):
        # <q_-1, a> is 0, in units of 1 + ||a||^2 = 2, and this was expected.
        expected = Forecast(
            missed=0.0, was_made=True, square_before=1.0, along_multiplier=float(times)
        )
        return forecast.judged(expected, products).missed

    assert missed(1.0) == pytest.approx(0.1 * 0.5)
    assert missed(2.0) == pytest.approx(0.1 * 2.0)
    assert missed(1e6) == pytest.approx(0.1 * 2.0)
