"""The problem suite's interface, and what its docstrings state of single problems."""

import math

import pytest
import torch
from problem_suite import every_problem, generator, hessian
from torch.func import grad

from torch_penalty_bilevel import testing


@every_problem
def test_starts_repeat_by_seed_and_lie_in_the_boxes(problem):
    (u, v), again = problem.start(generator(7)), problem.start(generator(7))
    other = problem.start(generator(8))
    assert u.dtype == v.dtype == torch.float64
    assert u.ndim == v.ndim == 1
    assert torch.equal(u, again[0])
    assert torch.equal(v, again[1])
    assert not torch.equal(u, other[0])
    for x, box in ((u, problem.upper_box), (v, problem.lower_box)):
        assert box is None or box[0] <= float(x.min()) <= float(x.max()) <= box[1]
    assert problem.upper_loss(u, v).shape == ()
    assert problem.best_lower(u).shape == v.shape
    if problem.lower_loss is not None:
        assert problem.lower_loss(u, v).shape == ()


def test_data_do_not_depend_on_the_session():
    torch.manual_seed(1)
    first = testing.get("quadratic").solution()[0]
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float32)
    second = testing.get("quadratic").solution()[0]
    assert torch.equal(first, second)
    for problem in testing.problems():
        u, v = problem.start(generator())
        assert problem.best_lower(u).dtype == torch.float64, problem.name
        assert problem.upper_loss(u, v).dtype == torch.float64, problem.name
        assert problem.error(u, v).dtype == torch.float64, problem.name


def test_names_and_tags():
    assert len(set(testing.names())) == len(testing.names()) == len(testing.problems())
    for name in testing.names():
        problem = testing.get(name)
        assert problem.name == name
        assert problem.title
        assert problem.source
        assert problem.traps.endswith((".", ":"))
        limits = (problem.upper_box, problem.lower_box, problem.h_upper, problem.h_lower)
        assert ("constrained" in problem.tags) == any(x is not None for x in limits)
        assert len(problem.tags & {"singular", "nonsingular"}) == 1
    assert {t for p in testing.problems() for t in p.tags} == set(testing.TAGS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: testing.get("smd25"), ValueError, "name must be one of"),
        (lambda: testing.get("box", kappa=2), TypeError, "kappa"),
        (lambda: testing.problems("easy"), ValueError, "unknown tags"),
        (lambda: testing.get("quadratic", kappa=0.5), ValueError, "kappa"),
        (lambda: testing.get("least_squares", rank=6), ValueError, "rank must be < n_lower"),
        (lambda: testing.get("fixed_point", contraction=1.0), ValueError, "contraction"),
        (lambda: testing.get("smd22", rows=11), ValueError, "rows"),
        (lambda: testing.synthetic.smd(25), ValueError, "number must be one of"),
    ],
)
def test_bad_requests(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_problem_is_checked_when_made():
    good = testing.get("box")
    fields = dict(vars(good))
    for change, message in (
        ({"tags": frozenset({"hard"})}, "unknown tags"),
        ({"lower_map": good.lower_loss}, "either lower_loss or lower_map"),
        ({"solutions": ()}, "must be a distance"),
    ):
        with pytest.raises(ValueError, match=message):
            testing.Problem(**{**fields, **change})


# What the docstrings state.


@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e6])
def test_kappa_is_the_condition_number(kappa):
    u, v = torch.zeros(4), torch.zeros(6)
    quadratic, least = (testing.get(n, kappa=kappa) for n in ("quadratic", "least_squares"))
    assert quadratic.kappa == least.kappa == kappa
    H = hessian(quadratic.lower_loss, 1)(u, v)
    assert float(torch.linalg.cond(H)) == pytest.approx(kappa, rel=1e-6)
    H = hessian(least.lower_loss, 1)(u[:3], v)
    eigenvalues = torch.linalg.eigvalsh(H)[-3:]
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(kappa, rel=1e-6)
    # Without regularisation (u -> -inf, weights 1) the fits have it too.
    ridge = testing.get("feature_ridge", kappa=kappa)
    H = hessian(ridge.lower_loss, 1)(torch.full((5,), -100.0), v[:5])
    assert float(torch.linalg.cond(H)) == pytest.approx(kappa, rel=1e-6)
    cleaning = testing.get("weighted_cleaning", kappa=kappa)
    H = hessian(cleaning.lower_loss, 1)(torch.full((12,), 50.0), v[:4])
    fit = H - 0.1 * torch.eye(4)
    assert float(torch.linalg.cond(fit)) == pytest.approx(kappa, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "minima"),
    [
        ("ripple", [(0.38236, 0.44271), (1.21515, 0.19991), (2.82964, 1.24346)]),
        ("cw_1990_02", [(1.0, 5.0), (3.0, 9.0), (4.4, 9.8)]),
        ("b_1988_01", [(1.0, 17.0), (5.0, 25.0)]),
    ],
)
def test_documented_local_minima(name, minima):
    problem = testing.get(name)
    low, high = problem.upper_box
    grid = torch.linspace(low, high, 6001)
    values = torch.stack([problem.hyperobjective(u[None]) for u in grid])
    padded = torch.cat([torch.tensor([math.inf]), values, torch.tensor([math.inf])])
    at = (values < padded[:-2]) & (values < padded[2:])
    found = [(float(u), float(f)) for u, f in zip(grid[at], values[at], strict=True)]
    assert len(found) == len(minima)
    for got, expected in zip(found, minima, strict=True):
        assert got == pytest.approx(expected, abs=1e-3)


def test_ripple_traps_the_squared_residual():
    problem = testing.get("ripple")
    u, v = torch.tensor([2.0]), torch.tensor([2 * math.pi / 3 - 2])
    r = grad(problem.lower_loss, 1)(u, v)
    assert float(v) == pytest.approx(0.0944, abs=1e-4)
    assert float(r) == pytest.approx(2.457, abs=1e-3)
    assert float(hessian(problem.lower_loss, 1)(u, v)) == pytest.approx(0, abs=1e-12)


def test_mirrlees_is_beaten_by_a_stationary_point_that_is_not_the_minimum():
    problem = testing.get("mirrlees")
    u, v = torch.tensor([1.9896]), torch.tensor([0.8953])
    assert abs(float(grad(problem.lower_loss, 1)(u, v))) < 1e-3
    assert float(hessian(problem.lower_loss, 1)(u, v)) > 0
    assert float(problem.upper_loss(u, v)) < 0.012 < problem.optimal_value
    assert float(problem.lower_loss(u, v) - problem.lower_loss(u, problem.best_lower(u))) > 0.5


def test_indefinite_needs_half_a_weight():
    """f + gamma |r|^2 / 2 has the joint Hessian of -(u - v)^2 (1 - 2 gamma) + v^2."""
    problem = testing.get("mehra_hamm_indefinite")
    for gamma, bounded in ((0.45, False), (0.55, True)):

        def penalised(x, gamma=gamma):
            u, v = x[:1], x[1:]
            r = 2 * (v - u)
            return problem.upper_loss(u, v) + gamma / 2 * r.square().sum()

        assert bool(torch.linalg.eigvalsh(hessian(penalised)(torch.zeros(2))).min() > 0) == bounded


def test_smd_values_and_errors():
    """f* and the start errors of the reference run (11 to 19 from U(-5, 5))."""
    expected = {20: 9.0, 21: 0.0, 22: 0.0, 23: 0.0}
    for number in range(20, 25):
        problem = testing.get(f"smd{number}")
        u, v = problem.solutions[0]
        assert float(problem.published_error(u, v)) < 1e-12
        assert problem.optimal_value == pytest.approx(expected.get(number, float(u @ u + v @ v)))
        assert 9 < float(problem.published_error(*problem.start(generator()))) < 22
    P1 = 2 * testing.get("smd24").solution()[0]
    assert testing.get("smd24").optimal_value == pytest.approx(float(P1 @ P1) / 2)
