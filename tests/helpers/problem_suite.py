"""What the tests of ``testing`` share: its problems, their constraints, points above."""

import pytest
import torch
from torch.func import grad, jacrev

from torch_penalty_bilevel import testing

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
