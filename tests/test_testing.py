"""The problem suite against itself: every closed form is derived a second time, by numbers."""

import itertools
import math

import pytest
import scipy.optimize
import torch
from torch.func import grad, jacrev

from torch_penalty_bilevel import functional, testing

VARIANTS = {
    "quadratic-kappa": lambda: testing.get("quadratic", kappa=1e3, seed=1),
    "feature_ridge-kappa": lambda: testing.get("feature_ridge", kappa=100.0, features=3),
    "weighted_cleaning-large": lambda: testing.get("weighted_cleaning", samples=40, seed=2),
    "least_squares-kappa": lambda: testing.get("least_squares", kappa=1e3, rank=2),
    "sine-3": lambda: testing.get("sine", dimension=3),
    "smd22-full": lambda: testing.get("smd22", rows=4, block=4),
    "smd24-full": lambda: testing.get("smd24", rows=4, block=4),
    "minimax-other": lambda: testing.get("minimax", strength=2.0, n_upper=2, seed=3),
    "fixed_point-tight": lambda: testing.get("fixed_point", contraction=0.9, seed=4),
}
PROBLEMS = {p.name: p for p in testing.problems()} | {k: make() for k, make in VARIANTS.items()}
SCALAR_RANGE = 3.0  # how far from v* (or from the middle of its box) competitors are looked for


def chosen(condition):
    picked = {k: p for k, p in PROBLEMS.items() if condition(p)}
    return pytest.mark.parametrize("problem", picked.values(), ids=picked.keys())


every_problem = chosen(lambda p: True)


def hessian(loss, argnum=0):
    """Reverse over reverse: torch.func.hessian warns of torch's own deprecated compiler."""
    return jacrev(grad(loss, argnum), argnum)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_upper(problem, count, seed=0):
    source = generator(seed)
    return [problem.start(source)[0] for _ in range(count)]


def constraints(problem, box, h):
    """All constraints of a level on (u, x) as one vector <= 0, x being that level's variable."""

    def values(u, v, x):
        parts = [] if h is None else [h(u, v)]
        if box is not None:
            parts += [box[0] - x, x - box[1]]
        return torch.cat(parts) if parts else x.new_zeros(0)

    return values


def lower_constraints(problem):
    values = constraints(problem, problem.lower_box, problem.h_lower)
    return lambda u, v: values(u, v, v)


def upper_constraints(problem):
    values = constraints(problem, problem.upper_box, problem.h_upper)
    return lambda u, v: values(u, v, u)


def feasible(h, u, v, slack=1e-12):
    return bool((h(u, v) <= slack).all())


def unconstrained_at(problem, u):
    """Is no lower constraint active at v*(u)?"""
    return bool((lower_constraints(problem)(u, problem.best_lower(u)) < -1e-9).all())


def near_and_far(problem, u, v, source, count=100):
    """Feasible competitors of v: small and large steps, the null space of H, a grid in 1-d."""
    steps = 10 ** (-4 * torch.rand(count, 1, generator=source)) * SCALAR_RANGE
    cloud = [v + s * torch.randn(v.shape, generator=source) for s in steps]
    H = hessian(problem.lower_loss, 1)(u, v)
    eigenvalues, basis = torch.linalg.eigh(H)
    null = basis[:, eigenvalues.abs() < 1e-9]
    if null.numel():
        cloud += [v + s * null @ torch.randn(null.shape[1], generator=source) for s in steps[:20]]
    if problem.lower_box is not None:
        low, high = problem.lower_box
        cloud = [x.clamp(low, high) for x in cloud]
        cloud += [torch.full_like(v, float(x)) for x in torch.linspace(low, high, 101)]
    h = lower_constraints(problem)
    return [x for x in cloud if feasible(h, u, x)]


# The lower level.


@chosen(lambda p: p.lower_loss is not None)
def test_best_lower_is_stationary(problem):
    """-grad_v g is a non-negative combination of the gradients of the active constraints."""
    h = lower_constraints(problem)
    for u in some_upper(problem, 10):
        v = problem.best_lower(u)
        assert feasible(h, u, v)
        r = grad(problem.lower_loss, 1)(u, v)
        active = h(u, v) > -1e-9
        scale = 1 + float(hessian(problem.lower_loss, 1)(u, v).norm() * v.norm())
        if not active.any():
            assert float(r.norm()) < 1e-12 * scale
        else:
            normals = jacrev(h, 1)(u, v)[active].T
            _, left = scipy.optimize.nnls(normals.numpy(), -r.numpy())
            assert left < 1e-9 * scale


@chosen(lambda p: p.lower_loss is not None)
def test_best_lower_is_the_minimum_and_the_optimistic_one(problem):
    source, tried = generator(1), 0
    beside = [u + side * 0.002 for u, _ in problem.solutions for side in (-1, 1)]
    if problem.upper_box is not None:
        beside = [u.clamp(*problem.upper_box) for u in beside]
    for u in some_upper(problem, 3) + beside:
        v = problem.best_lower(u)
        g, f = problem.lower_loss(u, v), problem.upper_loss(u, v)
        slack = 1e-12 * (1 + float(g.abs()))
        competitors = near_and_far(problem, u, v, source)
        tried += len(competitors)
        for x in competitors:
            assert problem.lower_loss(u, x) >= g - slack
            if problem.lower_loss(u, x) <= g + slack:
                # Near v* the tie may be rounding: 1e-6 away where g is quadratic, 1e-3 if quartic.
                near = (x - v).norm() < 1e-2
                assert near or problem.upper_loss(u, x) >= f - 1e-9 * (1 + float(f.abs()))
    assert tried > 100


def test_sine_takes_the_well_that_the_upper_level_likes_best():
    problem = testing.get("sine", dimension=2)
    for u in some_upper(problem, 20):
        v = problem.best_lower(u)
        for wells in ((1, 0), (-1, 0), (1, 1), (-1, -1)):
            other = v + 2 * math.pi * torch.tensor(wells)
            assert problem.upper_loss(u, other) >= problem.upper_loss(u, v)


@pytest.mark.parametrize(
    ("name", "u"),
    [("mb_2007_14", 0.25), ("mb_2007_16", -0.5), ("morgan_patrone", 0.0), ("lmp_1987_01", 1.0)],
)
def test_ties_go_to_the_upper_level(name, u):
    """At the jump itself, where a random u never lands."""
    problem, u = testing.get(name), torch.tensor([u])
    v = torch.linspace(*problem.lower_box, 2001)[:, None]
    g = torch.stack([problem.lower_loss(u, x) for x in v])
    f = torch.stack([problem.upper_loss(u, x) for x in v])
    tied = g <= g.min() + 1e-12
    assert int(tied.sum()) > 1
    assert float(problem.hyperobjective(u)) == pytest.approx(float(f[tied].min()), abs=1e-12)


@pytest.mark.parametrize("name", [p.name for p in testing.problems("nonsingular")])
def test_nonsingular_means_it(name):
    problem = testing.get(name)
    for u in some_upper(problem, 5):
        v = problem.best_lower(u)
        if problem.lower_loss is not None:
            jacobian = hessian(problem.lower_loss, 1)(u, v)
        else:
            jacobian = torch.eye(len(v)) - jacrev(problem.lower_map, 1)(u, v)
        assert float(torch.linalg.svdvals(jacobian).min()) > 1e-4
        assert problem.exact_hypergradient is not None


@pytest.mark.parametrize("name", [p.name for p in testing.problems("singular")])
def test_singular_means_it(name):
    problem = testing.get(name)
    for u in some_upper(problem, 5):
        H = hessian(problem.lower_loss, 1)(u, problem.best_lower(u))
        assert float(torch.linalg.svdvals(H).min()) < 1e-12
    assert problem.exact_hypergradient is None


@chosen(lambda p: p.lower_map is not None)
def test_fixed_point_of_a_contraction(problem):
    for u in some_upper(problem, 5):
        v = problem.best_lower(u)
        assert float((problem.lower_map(u, v) - v).norm()) < 1e-14
        other = v + torch.randn(v.shape, generator=generator())
        assert (problem.lower_map(u, other) - v).norm() < (other - v).norm()


# The hypergradient.


@chosen(lambda p: p.exact_hypergradient is not None)
def test_hypergradient_against_central_differences(problem):
    for u in some_upper(problem, 5, seed=2):
        exact, step = problem.exact_hypergradient(u), 1e-6
        assert exact.shape == u.shape
        differences = torch.stack(
            [
                (problem.hyperobjective(u + step * e) - problem.hyperobjective(u - step * e))
                / (2 * step)
                for e in torch.eye(len(u))
            ]
        )
        # Rounding: the value's last digit over the step.
        noise = 1e-8 + 4e-16 * float(problem.hyperobjective(u).abs()) / step
        assert float((differences - exact).norm()) < 1e-7 * float(exact.norm()) + 10 * noise


@chosen(lambda p: p.exact_hypergradient is not None and p.lower_loss is not None)
def test_hypergradient_against_implicit_differentiation(problem):
    points = (u for u in some_upper(problem, 1000, seed=3) if unconstrained_at(problem, u))
    points = list(itertools.islice(points, 3))
    assert len(points) == 3
    for u in points:
        v = problem.best_lower(u)
        found, info = functional.hypergradient(problem.upper_loss, problem.lower_loss, u, v)
        assert info.converged
        exact = problem.exact_hypergradient(u)
        assert float((found - exact).norm()) < 1e-8 * (1 + float(exact.norm()))


@chosen(lambda p: p.lower_map is not None)
def test_hypergradient_of_a_fixed_point(problem):
    for u in some_upper(problem, 5):
        v = problem.best_lower(u)
        by_u, by_v = jacrev(problem.lower_map, (0, 1))(u, v)
        f_u, f_v = grad(problem.upper_loss, (0, 1))(u, v)
        total = f_u + f_v @ torch.linalg.solve(torch.eye(len(v)) - by_v, by_u)
        torch.testing.assert_close(problem.exact_hypergradient(u), total, rtol=1e-10, atol=1e-12)


# The solution.


@every_problem
def test_solutions_are_solutions(problem):
    for u, v in problem.solutions:
        assert float(problem.error(u, v)) < 1e-12
        value = float(problem.upper_loss(u, v))
        assert value == pytest.approx(problem.optimal_value, rel=1e-12, abs=1e-12)
        assert feasible(lower_constraints(problem), u, v)
        assert feasible(upper_constraints(problem), u, v)
        best = problem.best_lower(u)
        if problem.lower_loss is None:
            torch.testing.assert_close(v, best, rtol=0, atol=1e-13)
        else:
            gap = problem.lower_loss(u, v) - problem.lower_loss(u, best)
            assert float(gap.abs()) < 1e-12
    unique = not problem.tags & {"many_solutions", "unattained"}
    assert not unique or len(problem.solutions) == 1
    assert ("unattained" in problem.tags) == (not problem.solutions)


@every_problem
def test_nothing_feasible_is_better(problem):
    source, h = generator(4), upper_constraints(problem)
    candidates = some_upper(problem, 100, seed=5)
    for u, _ in problem.solutions:
        steps = 10 ** (-6 * torch.rand(60, 1, generator=source))
        candidates += [u + s * torch.randn(u.shape, generator=source) for s in steps]
    if problem.upper_box is not None:
        candidates = [u.clamp(*problem.upper_box) for u in candidates]
    slack = 1e-12 * (1 + abs(problem.optimal_value))
    tried = 0
    for u in candidates:
        v = problem.best_lower(u)
        if feasible(h, u, v, slack=0):
            tried += 1
            assert float(problem.upper_loss(u, v)) >= problem.optimal_value - slack
    assert tried > 50


@chosen(lambda p: p.exact_hypergradient and p.solutions and "constrained" not in p.tags)
def test_hypergradient_vanishes_at_solutions(problem):
    for u, _ in problem.solutions:
        scale = float(hessian(problem.hyperobjective)(u).norm()) * (1 + float(u.norm()))
        assert float(problem.exact_hypergradient(u).norm()) < 1e-12 * (1 + scale)


@every_problem
def test_error_is_positive_away_and_never_above_the_distance(problem):
    for u, v in (problem.start(generator(seed)) for seed in range(20)):
        error = problem.error(u, v)
        assert error.shape == ()
        assert float(error) > 1e-6
        if "unattained" in problem.tags or problem.name == "weighted_cleaning":
            continue  # measured in weights, not in u
        for a, b in problem.solutions:
            size = max(1.0, math.hypot(float(a.norm()), float(b.norm())))
            apart = math.hypot(float((u - a).norm()), float((v - b).norm()))
            assert float(error) <= apart / size + 1e-12
            if problem.distance is None and len(problem.solutions) == 1:
                assert float(error) == pytest.approx(apart / size)


def test_error_along_the_ray_of_half_space():
    problem = testing.get("half_space")
    u, v = problem.solutions[0]
    normal = jacrev(problem.h_lower, 1)(u, v)[0]
    assert float(problem.error(u + 3 * normal, v)) < 1e-12
    assert torch.allclose(problem.best_lower(u + 3 * normal), v)
    assert float(problem.error(u - 3 * normal, v)) > 0.1
    assert float(problem.error(u, v + normal)) > 0.1


@pytest.mark.parametrize("number", [22, 23])
def test_error_in_the_null_space(number):
    """SMD22 is blind to it in both levels, SMD23 in u only."""
    problem = testing.get(f"smd{number}")
    u, v = problem.solutions[0]
    null = torch.linalg.eigh(hessian(problem.lower_loss, 1)(u, v)).eigenvectors[:, 0]
    assert float(problem.error(u + null, v)) < 1e-12
    assert float(problem.upper_loss(u + null, v)) == pytest.approx(0, abs=1e-12)
    expected = 0.0 if number == 22 else 1.0
    assert float(problem.error(u, v + null)) == pytest.approx(expected, abs=1e-12)
    assert float(problem.upper_loss(u, v + null)) == pytest.approx(expected, abs=1e-12)


def test_smd24_is_unique_although_the_published_error_is_blind():
    problem = testing.get("smd24")
    u, v = problem.solution()
    null = torch.linalg.eigh(hessian(problem.lower_loss, 1)(u, v)).eigenvectors[:, 0]
    for moved in ((u + null, v), (u, v + null)):
        assert float(problem.published_error(*moved)) < 1e-12
        assert float(problem.error(*moved)) > 0.1
        assert float(problem.upper_loss(*moved)) > problem.optimal_value + 0.9


def test_error_along_the_weights_that_clean_as_well():
    problem = testing.get("weighted_cleaning")
    u, v = problem.solutions[0]
    directions = torch.linalg.svd(jacrev(problem.best_lower)(u)).Vh
    step = 1e-4  # the set is curved in u: a step along it errs by O(step^2)
    assert float(problem.error(u + step * directions[-1], v)) < 10 * step**2
    assert float(problem.error(u + step * directions[0], v)) > 1e-2 * step


def test_no_unique_solution_says_so():
    for name in ("mb_2007_16", "coreset", "smd22"):
        with pytest.raises(ValueError, match=f"{name} has no unique solution"):
            testing.get(name).solution()


def test_coreset_is_approached_from_above():
    problem = testing.get("coreset")
    values = []
    for size in (5.0, 10.0, 20.0):
        u = torch.tensor([-size, math.log(0.8), -size, math.log(0.2)])
        values.append(float(problem.hyperobjective(u)) - problem.optimal_value)
        error = float(problem.error(u, problem.best_lower(u)))
    assert values[0] > values[1] > values[2] > 0
    assert error < 1e-7


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


# The interface.


@every_problem
def test_start(problem):
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
