"""The correction of the multiplier in the span of where it has been."""

import dataclasses
import math

import pytest
import torch

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.constraints import Inequality
from torch_penalty_bilevel.evaluation import Norms
from torch_penalty_bilevel.multipliers import DualState
from torch_penalty_bilevel.multipliers.forecast import Forecast
from torch_penalty_bilevel.multipliers.least_squares_state import LeastSquaresState, SubspaceState
from torch_penalty_bilevel.multipliers.subspace import Products, correction
from torch_penalty_bilevel.multipliers.watch import Watch


def certificate(eigenvalues, steps, **options):
    """||a|| / ||s|| after lower steps at a v that does not move; H has these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    hessian, slope = basis @ torch.diag(eigenvalues) @ basis.T, torch.randn(n, generator=generator)
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(n, requires_grad=True)
    rule = Stationarity(LeastSquares(**options))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=rule)
    for _ in range(steps):
        optimizer.lower_step(
            lambda: slope @ v + 0 * u.sum(), lambda: v @ hessian @ v / 2 + u.sum() * v.sum()
        )
    return float(optimizer.metrics.relative_certificate), optimizer


def test_two_unknowns_are_solved_as_soon_as_their_directions_are_known():
    """Two directions span the space; the third evaluation with a gain of 1 sees the solution."""
    found, _ = certificate(torch.tensor([1.0, 50.0]), 30)
    plain, _ = certificate(torch.tensor([1.0, 50.0]), 30, subspace=False)
    assert found < 1e-13
    assert plain > 0.1


@pytest.mark.parametrize(("condition", "steps", "most"), [(10.0, 30, 1e-5), (1e3, 200, 0.05)])
def test_a_system_that_stands_still_is_solved_sooner(condition, steps, most):
    eigenvalues = torch.logspace(0, torch.tensor(condition).log10().item(), 30)
    found, optimizer = certificate(eigenvalues, steps)
    plain, _ = certificate(eigenvalues, steps, subspace=False)
    assert found < most < 0.2 * plain
    assert optimizer._dual.forecast.gain > 0.9


def test_directions_without_curvature_do_not_run_away():
    """The part of grad_v f in the kernel of H moves nu by 1/L per step for ever; a mixture with
    directions that curve takes some of it along, twice as fast here."""
    eigenvalues = torch.cat((torch.zeros(3), torch.logspace(0, 1, 9)))
    _, corrected = certificate(eigenvalues, 600)
    _, plain = certificate(eigenvalues, 600, subspace=False)
    corrected, plain = (float(o.adjoint[0].norm()) for o in (corrected, plain))
    assert 50 < plain < corrected < 3 * plain


def noisy(steps, noisy_steps=10**9):
    """Slopes of independent batches, on a Hessian of condition 100."""
    torch.manual_seed(0)
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(20, requires_grad=True)
    hessian = torch.logspace(0, 2, 20)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0)
    looks = []
    for step in range(steps):
        slope = torch.randn(20) if step < noisy_steps else torch.ones(20)
        optimizer.lower_step(
            lambda s=slope: s @ v + 0 * u.sum(),
            lambda: (hessian * v.square()).sum() / 2 + u.sum() * v.sum(),
        )
        if optimizer._dual.forecast.was_made:
            looks.append(step)
    return optimizer, looks


def test_where_batches_make_forecasts_worthless_it_rests():
    """The gain stays at 0, and nine steps of ten cost nothing."""
    optimizer, looks = noisy(400)
    assert optimizer._dual.forecast.gain == 0.0
    assert [step for step in looks if step >= 200] == [*range(290, 300), *range(390, 400)]


def test_what_rests_forecasts_nothing():
    """The first evaluation after a rest has no forecast to be judged by, and no old directions."""
    optimizer, _ = noisy(250)
    assert not optimizer._dual.forecast.was_made
    assert not any(t.any() for vectors in optimizer._dual.before() for t in vectors)
    assert optimizer._dual.forecast.idle > 150
    assert noisy(292)[0]._dual.forecast.was_made


def test_the_monotone_form_of_inequalities_is_not_corrected():
    """With their multipliers among the lower unknowns the system is not symmetric."""
    u, v = torch.ones(1, requires_grad=True), torch.ones(3, requires_grad=True)
    bound = Inequality(lambda: v - 0.5)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.1, lower_constraint=bound)
    for _ in range(30):
        optimizer.lower_step(lambda: v.square().sum(), lambda: (v - 2 * u).square().sum())
    assert optimizer.adjoint[0].any()
    assert not any(entry.any() for entry in optimizer._dual.past)


def test_it_comes_back_when_the_noise_ends():
    optimizer, _ = noisy(600, noisy_steps=200)
    assert optimizer._dual.forecast.gain > 0.9
    assert float(optimizer.metrics.relative_certificate) < 1e-6


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_gain_survives_a_change_of_units(factor):
    """N and D are shares: what f was before does not outvote what it is."""
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(20, requires_grad=True)
    hessian, scale = torch.logspace(0, 2, 20), 1.0
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0)
    for step in range(240):
        scale = factor if step >= 120 else 1.0
        optimizer.lower_step(
            lambda s=scale: s * v.sum() + 0 * u.sum(),
            lambda: (hessian * v.square()).sum() / 2 + u.sum() * v.sum(),
        )
    exact = -factor / hessian
    torch.testing.assert_close(optimizer.adjoint[0], exact, rtol=1e-3, atol=0)
    assert optimizer._dual.forecast.gain > 0.9


def products_of(hessian, vectors, residual, shift):
    rows = torch.stack([*vectors, *(hessian @ b for b in vectors), residual])
    return Products.of(tuple((rows @ rows.T).reshape(-1).tolist()), shift)


def test_a_shift_is_that_of_the_shifted_system():
    """Inner products for H + mu I and a + mu q from those for H and a."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=generator)
    hessian, vectors = root @ root.T, list(torch.randn(3, 6, generator=generator))
    residual, mu = torch.randn(6, generator=generator), 0.7
    shifted = products_of(hessian, vectors, residual, mu)
    moved = hessian + mu * torch.eye(6)
    expected = products_of(moved, vectors, residual + mu * vectors[0], 0.0)
    for name in Products._fields:
        found, right = (torch.tensor(getattr(p, name)) for p in (shifted, expected))
        torch.testing.assert_close(found, right, msg=name)
    basis, right = torch.stack(vectors, 1), residual + mu * vectors[0]
    images = moved @ basis
    energy = -torch.linalg.solve(basis.T @ images, basis.T @ right)
    least = torch.linalg.lstsq(images, -right[:, None]).solution[:, 0]
    for reach in (0.0, 0.3, 1.0):
        found = torch.tensor(correction(shifted, 1.0, 0.5, reach))
        expected = 0.5 * (reach * energy + (1 - reach) * least)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert correction(shifted, 1.0, 0.0, 0.3) == [0.0] * 3


@pytest.mark.parametrize(
    ("certificate", "slope", "reach"),
    [(0.0, 2.0, 0.75), (1.0, 2.0, 0.375), (2.0, 2.0, 0.0), (3.0, 2.0, 0.0), (1.0, 0.0, 0.75)],
)
def test_energy_counts_as_far_as_the_certificate_shows(certificate, slope, reach):
    """No more of grad_v f lies beyond H than a; at most three quarters."""
    names = {"adjoint_residual": certificate, "slope": slope}
    rest = dict.fromkeys(Norms._fields[:8], 0.0)
    assert LeastSquares()._reach(Norms(**rest | names)) == pytest.approx(reach)


def test_what_h_does_not_reach_leaves_the_rest_alone():
    """Two thirds of grad_v f lie in the kernel of H: what H reaches is solved all the same."""
    eigenvalues = torch.cat((torch.zeros(20), torch.logspace(0, 2, 10)))
    errors = []
    for options in ({}, {"subspace": False}):
        _, optimizer = certificate(eigenvalues, 100, **options)
        errors.append(float(optimizer._seen[2].adjoint_residual))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    beyond = float((basis[:, :20].T @ torch.randn(30, generator=generator)).norm())
    reached = [(error**2 - beyond**2) ** 0.5 / beyond for error in errors]
    assert reached[0] < 0.01 < 0.2 * reached[1]  # 0.018 by energy alone


def test_squares_that_overflow_are_told():
    numbers = [1.0] * 49
    assert Products.of(tuple(numbers), 0.0).are_finite
    numbers[24] = float("inf")
    assert not Products.of(tuple(numbers), 0.0).are_finite


def test_a_large_v_has_the_cheap_form_unless_asked():
    small, large = torch.empty(10**7, device="meta"), torch.empty(10**7 + 1, device="meta")
    assert type(LeastSquares().start((small,))) is SubspaceState
    assert type(LeastSquares().start((large,))) is LeastSquaresState
    assert type(LeastSquares(subspace=True).start((large,))) is SubspaceState
    assert type(LeastSquares(subspace=False).start((small,))) is LeastSquaresState


def test_whether_it_is_made_is_a_truth_value():
    with pytest.raises(TypeError, match="subspace must be True, False or None, got 3"):
        LeastSquares(subspace=3)


def test_two_numbers_of_one_name_are_refused():
    """A checkpoint keeps those of records side by side: one would silently be the other."""

    @dataclasses.dataclass(frozen=True)
    class Other:
        slope: float = 0.0

    one, another = Watch(), Other()

    @dataclasses.dataclass(frozen=True, eq=False)
    class Twice(DualState):
        watch: Watch = one
        other: Other = another

    with pytest.raises(TypeError, match="two numbers of the name \\['slope'\\]"):
        Twice.at(())


def test_rests_are_counted_by_lower_steps():
    idle = Forecast(idle=20)
    assert [step for step in range(200) if idle.is_due(step)] == [*range(90, 100), *range(190, 200)]
    assert all(Forecast(idle=19).is_due(step) for step in range(200))


def test_metrics_say_which_form_is_taken():
    """The gain under which the evaluation was made: that of the state before it."""
    eigenvalues = torch.logspace(0, 1, 12)
    before = certificate(eigenvalues, 20)[1]._dual.forecast.gain
    assert 0.3 < before < 1
    _, corrected = certificate(eigenvalues, 21)
    assert float(corrected.metrics.correction_gain) == before
    _, plain = certificate(eigenvalues, 21, subspace=False)
    assert math.isnan(float(plain.metrics.correction_gain))
