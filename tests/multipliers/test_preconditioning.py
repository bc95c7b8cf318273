"""The multiplier in the units of a preconditioner."""

import copy

import pytest
import torch

from torch_penalty_bilevel import FixedPoint, LeastSquares, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.constraints import Inequality

N = 8


def diagonal(*entries):
    """A preconditioner from one positive tensor for each lower parameter."""
    return lambda vectors, power: tuple(d**power * t for d, t in zip(entries, vectors, strict=True))


def raised(matrix, power):
    values, basis = torch.linalg.eigh(matrix)
    return basis * values**power @ basis.T


def full(matrix):
    """A preconditioner of one lower vector from all of P."""
    return lambda vectors, power: (raised(matrix, power) @ vectors[0],)


def symmetric(eigenvalues, seed):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    return basis @ torch.diag(eigenvalues) @ basis.T


def standing(hessian, point, slopes, penalty=None, curvature="double_backward", **options):
    """An optimizer after one lower step per slope at a v that does not move."""
    u, v = torch.zeros(1, requires_grad=True), point.clone().requires_grad_()
    rule = penalty or Stationarity(LeastSquares(**options))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=rule, curvature=curvature)
    for slope in slopes:
        optimizer.lower_step(
            lambda s=slope: s @ v + 0 * u.sum(), lambda: v @ hessian @ v / 2 + u.sum() * v.sum()
        )
    return optimizer


def test_the_diagonal_of_a_diagonal_hessian_solves_in_one_step():
    """P^-1/2 H P^-1/2 = I, so L = 1 and the first step is -H^-1 grad_v f."""
    scales, slope = torch.logspace(-4, 4, N), torch.linspace(-1, 2, N)
    optimizer = standing(
        torch.diag(scales), torch.ones(N), [slope], preconditioner=diagonal(scales)
    )
    torch.testing.assert_close(optimizer.adjoint[0], -slope / scales, rtol=1e-12, atol=0)


@pytest.mark.parametrize("subspace", [True, False])
@pytest.mark.parametrize("least", [1e-2, -3.0])
def test_it_is_the_plain_rule_on_the_problem_in_its_units(subspace, least, monkeypatch):
    """v = P^-1/2 x turns g and f into losses of x, whose multiplier is P^1/2 nu at every step.

    With ``least`` < 0 the guard against negative curvature joins in; slopes of changing batches
    let the correction rest, too. The share of energy in it follows the certificate, whose units are
    others here: held, at the one end or the other (least residuals amplify rounding to 1e-3 where H
    is indefinite).
    """
    monkeypatch.setattr(LeastSquares, "_reach", lambda *_: float(least < 0))
    generator = torch.Generator().manual_seed(3)
    hessian = symmetric(torch.linspace(least, 5, N), 1)
    metric = symmetric(torch.logspace(-2, 2, N), 2)
    root, inverse = raised(metric, 0.5), raised(metric, -0.5)
    point, slope = torch.randn(2, N, generator=generator)
    noise = torch.randn(60, N, generator=generator)
    slopes = [*(slope for _ in range(40)), *(slope + 3 * n for n in noise)]
    inner = standing(
        inverse @ hessian @ inverse, root @ point, [inverse @ s for s in slopes], subspace=subspace
    )
    outer = standing(hessian, point, slopes, preconditioner=full(metric), subspace=subspace)
    torch.testing.assert_close(outer.adjoint[0], inverse @ inner.adjoint[0], rtol=1e-5, atol=1e-8)
    for name in ("curvature", "indefinite", "probed"):
        found, expected = (getattr(o._dual, name) for o in (outer, inner))
        assert found == pytest.approx(expected, rel=1e-6)
    assert (outer._dual.indefinite > 0) == (least < 0)
    if subspace:
        assert outer._dual.forecast.gain == pytest.approx(inner._dual.forecast.gain, abs=1e-5)
        assert outer._dual.forecast.idle == inner._dual.forecast.idle
    # ||a|| is that of the equation itself.
    nu = standing(
        hessian, point, slopes[:-1], preconditioner=full(metric), subspace=subspace
    ).adjoint[0]
    expected = float((slopes[-1] + hessian @ nu).norm())
    assert float(outer.metrics.adjoint_residual_norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
def test_a_factor_changes_nothing(curvature):
    """Of P cancels: every number is relative to L."""
    hessian, slope = symmetric(torch.logspace(0, 2, N), 4), torch.ones(N)
    runs = [
        standing(hessian, slope, [slope] * 30, curvature=curvature, preconditioner=each)
        for each in (None, diagonal(torch.tensor(1e4)))
    ]
    plain, scaled = (o.adjoint[0] for o in runs)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)
    plain, scaled = (o._dual.curvature for o in runs)
    assert scaled == pytest.approx(plain / 1e4, rel=1e-4)


def moving(preconditioner, steps, optimizer=None):
    """u and v move on a badly scaled problem; two lower parameters."""
    if optimizer is None:
        torch.manual_seed(0)
        u = torch.full((4,), 0.5, requires_grad=True)
        v, w = torch.zeros(4, requires_grad=True), torch.ones(2, 2, requires_grad=True)
        rule = Stationarity(LeastSquares(share=0.0, preconditioner=preconditioner))
        optimizer = PenaltyBilevelOptimizer([u], [v, w], upper_lr=0.01, lower_lr=0.1, penalty=rule)
    (u,), (v, w) = (
        [p for group in level.param_groups for p in group["params"]]
        for level in (optimizer.upper, optimizer.lower)
    )
    for _ in range(steps):
        optimizer.step(
            lambda: (v - 1).square().sum() + w.sum() + u.square().sum(),
            lambda: (SCALES * (v - u).square()).sum() / 2 + 50 * (w - u.sum()).square().sum(),
        )
    return optimizer, u, v, w


SCALES = torch.logspace(-1, 2, 4, dtype=torch.float64)
MATCHING = diagonal(SCALES, torch.full((2, 2), 100.0))


def test_a_resumed_run_is_bit_equal():
    whole, *ends = moving(MATCHING, 12)
    half, *_ = moving(MATCHING, 5)
    fresh, *_ = moving(MATCHING, 0)
    for source, target in zip(
        [p for g in half.param_groups for p in g["params"]],
        [p for g in fresh.param_groups for p in g["params"]],
        strict=True,
    ):
        target.data.copy_(source)
    fresh.load_state_dict(copy.deepcopy(half.state_dict()))
    _, *resumed = moving(MATCHING, 7, fresh)
    for found, expected in zip((*resumed, *fresh.adjoint), (*ends, *whole.adjoint), strict=True):
        assert torch.equal(found, expected)


def test_frozen_parameters_are_left_out():
    seen = []

    def preconditioner(vectors, power):
        seen.append([tuple(t.shape) for t in vectors])
        return vectors

    optimizer, _, v, _ = moving(preconditioner, 2)
    assert seen[-1] == [(4,), (2, 2)]
    v.requires_grad_(False)
    seen.clear()
    moving(preconditioner, 2, optimizer)
    assert {tuple(shapes) for shapes in seen} == {((2, 2),)}


def test_another_preconditioner_leaves_a_solution_where_it_is():
    """nu is kept, not what it is in P's units."""
    hessian, slope = symmetric(torch.logspace(0, 1, N), 5), torch.linspace(-1, 2, N)
    entries = torch.logspace(0, 1, N)
    u, v = torch.zeros(1, requires_grad=True), torch.ones(N, requires_grad=True)
    rule = LeastSquares(
        preconditioner=lambda vectors, power: diagonal(entries)(vectors, power), subspace=False
    )
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=Stationarity(rule))
    for step in range(1501):
        entries = torch.logspace(0, 1, N) if step < 1500 else torch.logspace(1, 0, N)
        optimizer.lower_step(
            lambda: slope @ v + 0 * u.sum(), lambda: v @ hessian @ v / 2 + u.sum() * v.sum()
        )
    torch.testing.assert_close(
        optimizer.adjoint[0], -torch.linalg.solve(hessian, slope), rtol=1e-6, atol=1e-8
    )


SKEWED = torch.triu(torch.ones(N, N, dtype=torch.float64), 1)

BAD = [
    (diagonal(torch.linspace(-1, 1, N)), "not finite.* P must be symmetric positive definite"),
    (diagonal(torch.linspace(0, 1, N)), "not finite.* P must be symmetric positive definite"),
    (lambda vectors, power: (vectors[0][:3],), r"shapes \[\(3,\)\] for vectors of shapes \[\(8,"),
    (lambda vectors, power: (), r"shapes \[\] for vectors of shapes \[\(8,\)\]"),
    (lambda vectors, power: vectors[0], "preconditioner returned Tensor; return a tuple"),
    # P^-1 whatever the power, as many libraries have it.
    (lambda vectors, power: (vectors[0] / torch.logspace(0, 1, N),), "do not belong to one"),
    (
        lambda vectors, power: (vectors[0] @ torch.matrix_exp(SKEWED * power),),
        "do not belong to one symmetric P",
    ),
]


@pytest.mark.parametrize(("preconditioner", "message"), BAD)
@pytest.mark.parametrize("subspace", [True, False])
def test_what_is_no_preconditioner_is_refused_before_anything_moves(
    preconditioner, message, subspace
):
    u, v = torch.zeros(1, requires_grad=True), torch.ones(N, requires_grad=True)
    rule = Stationarity(LeastSquares(preconditioner=preconditioner, subspace=subspace))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.1, penalty=rule)
    before = v.detach().clone(), optimizer.adjoint[0].clone()

    def run():
        nonlocal before
        for _ in range(5):
            before = v.detach().clone(), optimizer.adjoint[0].clone()
            optimizer.lower_step(
                lambda: (torch.arange(1.0, N + 1) * v).sum() + 0 * u.sum(),
                lambda: (v - u).square().sum() / 2,
            )

    with pytest.raises((ValueError, TypeError), match=message):
        run()
    assert torch.equal(v, before[0])
    assert torch.equal(optimizer.adjoint[0], before[1])


@pytest.mark.parametrize("subspace", [True, False])
def test_a_preconditioner_that_turns_bad_between_probes_is_refused(subspace):
    """At the twelfth lower step, which asks for no probe."""
    entries = torch.ones(N)
    u, v = torch.zeros(1, requires_grad=True), torch.ones(N, requires_grad=True)
    rule = LeastSquares(
        preconditioner=lambda vectors, power: diagonal(entries)(vectors, power), subspace=subspace
    )
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.1, penalty=Stationarity(rule))

    def step():
        optimizer.lower_step(lambda: v.sum() + 0 * u.sum(), lambda: (v - u).square().sum() / 2)

    for _ in range(12):
        step()
    assert not rule.probes(optimizer._dual)
    entries, before = -entries, optimizer.adjoint[0].clone()
    with pytest.raises(ValueError, match="P must be symmetric positive definite"):
        step()
    assert torch.equal(optimizer.adjoint[0], before)


def test_what_it_cannot_serve_is_refused():
    with pytest.raises(TypeError, match=r"preconditioner must be callable .* got Tensor"):
        LeastSquares(preconditioner=torch.ones(3))
    with pytest.raises(ValueError, match=r"ridge must be 0 with a preconditioner, got 0\.1"):
        LeastSquares(preconditioner=MATCHING, ridge=0.1)
    with pytest.raises(ValueError, match="preconditioner need the symmetric H"):
        FixedPoint(LeastSquares(preconditioner=MATCHING))
    u, v = torch.ones(1, requires_grad=True), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="LeastSquares\\(\\) and no preconditioner"):
        PenaltyBilevelOptimizer(
            [u],
            [v],
            lower_lr=0.1,
            penalty=Stationarity(LeastSquares(preconditioner=MATCHING)),
            lower_constraint=Inequality(lambda: v - 0.5),
        )


def test_a_penalty_that_asks_for_no_span_is_told():
    class Mute(Stationarity):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)._replace(subspace=None)

    hessian, slope = torch.eye(N), torch.ones(N)
    mute = Mute(LeastSquares(preconditioner=diagonal(torch.ones(N))))
    with pytest.raises(ValueError, match=r"penalties\.evaluate_residual"):
        standing(hessian, slope, [slope], penalty=mute)
