"""The suite's solutions: nothing feasible is better, and the error is a distance to them."""

import math

import pytest
import torch
from problem_suite import (
    chosen,
    every_problem,
    feasible,
    generator,
    hessian,
    lower_constraints,
    some_upper,
    upper_constraints,
)
from torch.func import jacrev

from torch_penalty_bilevel import testing


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
