"""The suite's lower levels and hypergradients, each derived a second time by numbers."""

import itertools
import math

import pytest
import scipy.optimize
import torch
from problem_suite import (
    chosen,
    feasible,
    generator,
    hessian,
    lower_constraints,
    some_upper,
    unconstrained_at,
)
from torch.func import grad, jacrev

from torch_penalty_bilevel import functional, testing

SCALAR_RANGE = 3.0  # how far from v* (or from the middle of its box) competitors are looked for


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
