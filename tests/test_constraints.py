"""Sets, faces and inequalities: projections, closed forms, known optima, false fixed points."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from tasks import Task

from torch_penalty_bilevel import (
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.constraints import Ball, Box, Inequality, NonNegative, Simplex

SGD, Adam = torch.optim.SGD, torch.optim.Adam
PLAIN = Stationarity(LeastSquares(share=0.0))
SETS = {
    "box": Box(-0.5, 0.7),
    "non_negative": NonNegative(),
    "simplex": Simplex(),
    "ball": Ball(1.3),
    "rows": Ball(0.8, rows=True),
}


def leaf(values, dtype=torch.float64):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def in_set(name, x, tolerance):
    if name == "box":
        return bool(((x >= -0.5) & (x <= 0.7)).all())
    if name == "non_negative":
        return bool((x >= 0).all())
    if name == "simplex":
        return bool((x >= 0).all()) and bool(((x.sum(-1) - 1).abs() <= tolerance).all())
    if name == "ball":
        return bool(x.norm() <= 1.3 + tolerance)
    return bool((x.norm(dim=1) <= 0.8 + tolerance).all())


# Projections.

POINTS = arrays(np.float64, (2, 3), elements=st.floats(-4, 4, width=32))


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None)
@given(x=POINTS, other=POINTS)
def test_projection_is_feasible_idempotent_and_closest(name, x, other):
    """Closest: <x - Px, y - Px> <= 0 for every y of the set (the projection theorem)."""
    project = SETS[name].project
    x, y = torch.from_numpy(x), project(torch.from_numpy(other))
    p = project(x)
    assert in_set(name, p, 1e-12)
    assert torch.equal(project(p), p)
    assert float(((x - p) * (y - p)).sum()) <= 1e-11


def test_simplex_projection_equals_a_generic_solver():
    x = torch.tensor([0.9, -0.3, 0.8, 0.1])
    solved = minimize(
        lambda y: ((y - x.numpy()) ** 2).sum(),
        np.full(4, 0.25),
        bounds=[(0, None)] * 4,
        constraints={"type": "eq", "fun": lambda y: y.sum() - 1},
        method="SLSQP",
        tol=1e-14,
    )
    np.testing.assert_allclose(Simplex().project(x).numpy(), solved.x, atol=1e-7)
    torch.testing.assert_close(Simplex().project(x), torch.tensor([0.55, 0, 0.45, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_in_low_precision(dtype):
    x = (3 * torch.randn(5, 7)).to(dtype)
    for name, constraint in SETS.items():
        p = constraint.project(x)
        assert p.dtype == dtype
        assert in_set(name, p.double(), 16 * torch.finfo(dtype).eps), name
        assert torch.equal(constraint.project(p), p), name


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None)
@given(x=POINTS, g=POINTS)
def test_tangent_gradient_is_the_projection_onto_the_tangent_cone(name, x, g):
    """-P g = lim (project(x - t g) - x) / t, and P is an orthogonal projector."""
    constraint = SETS[name]
    x = constraint.project(torch.from_numpy(x))
    g = torch.from_numpy(g)
    if name == "box":
        bounds = (x + 0.5).abs(), (x - 0.7).abs()
    elif name in ("ball", "rows"):
        bounds = ((x.norm() - 1.3).abs(),) if name == "ball" else ((x.norm(dim=1) - 0.8).abs(),)
    else:
        bounds = (x,)
    # Almost at the bound is not at it: the quotient below then sees the bound, the face does not.
    rounding = 1e-14 if name in ("ball", "rows") else 0.0
    assume(not any(bool(((b > rounding) & (b < 1e-3)).any()) for b in bounds))
    face = constraint.face(x, g)
    t = 1e-7
    limit = (constraint.project(x - t * g) - x) / t
    torch.testing.assert_close(-face.tangent(g), limit, rtol=0, atol=2e-5)
    once = face.tangent(g)
    torch.testing.assert_close(face.tangent(once), once, rtol=0, atol=1e-12)


# Upper level: adaptive rules and projections.

Q = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
SLOPE = torch.tensor([-1.0, -0.5, 3.0, 0.2, 2.0], dtype=torch.float64)
# Stationarity on the face {0, 1}: x0 - 1 = 2 x1 - 0.5 = tau with x0 + x1 = 1.
OPTIMUM = torch.tensor([5 / 6, 1 / 6, 0, 0, 0], dtype=torch.float64)


def on_simplex(start, rule, steps=250):
    u, v = leaf(start), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(rule([u]), SGD([v], 0.5), upper_constraint=Simplex())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(
            lambda: 0.5 * u @ Q @ u + SLOPE @ u, lambda: 0.5 * (v - u.sum()).square().sum()
        )
        scheduler.step()
        assert in_set("simplex", u.detach(), 1e-12)
    return u, optimizer


@pytest.mark.parametrize("start", [[0.2] * 5, [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
def test_adam_on_a_simplex_reaches_the_optimum_from_centre_and_vertices(start):
    u, optimizer = on_simplex(start, lambda p: Adam(p, 0.05))
    torch.testing.assert_close(u.detach(), OPTIMUM, rtol=0, atol=1e-4)
    assert float(optimizer.metrics.upper_grad_norm) < 1e-3


def test_adams_equal_steps_move_on_a_simplex():
    """All entries of the gradient are negative: sign steps are normal to the simplex."""
    u, v = leaf(torch.full((3,), 1 / 3)), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u], SGD([v], 0.5), upper_lr=0.05, upper_constraint=Simplex()
    )
    slope = torch.tensor([-3.0, -2.0, -1.0])
    for _ in range(60):
        optimizer.step(lambda: slope @ u, lambda: 0.5 * (v - u.sum()).square().sum())
    torch.testing.assert_close(u.detach(), torch.eye(3)[0])


def test_a_stationary_vertex_is_left_alone():
    """At e_0 with the smallest gradient there, the tangent gradient is zero, moments included."""
    u, v = leaf(torch.eye(3)[0]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer([u], SGD([v], 0.5), upper_constraint=Simplex())
    slope = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(5):
        optimizer.step(lambda: slope @ u, lambda: 0.5 * (v - u.sum()).square().sum())
    assert torch.equal(u.detach(), torch.eye(3)[0])
    assert float(optimizer.metrics.upper_grad_norm) == 0
    assert torch.equal(u.grad, torch.zeros(3))


def test_entries_held_at_a_bound_do_not_pay_for_a_rules_scaling():
    """SGD scaled by (1, 10, 1) from (1/2, 1/2, 0): plain projection would let entry 2 in."""
    u = torch.tensor([0.5, 0.5, 0.0])
    gradient = torch.tensor([-1.0, 1.0, 100.0])
    face = Simplex().face(u, gradient)
    scaled = u - 0.01 * torch.tensor([1.0, 10, 1]) * face.tangent(gradient)
    assert float(Simplex().project(scaled)[2]) > 0  # the false move
    moved = face.retract(u, scaled)
    assert float(moved[2]) == 0
    assert float(gradient @ (moved - u)) < 0


def test_box_above_closed_form_8():
    """F = 0.5 (v - 2)^2, v = u in [-1, 1]: u = v = 1, F = 0.5, projected gradient 0."""
    u, v = leaf([0.0]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=0.05, lower_lr=0.05, upper_constraint=Box(-1.0, 1.0)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = optimizer.step(lambda: 0.5 * (v - 2).square().sum(), lambda: g8(u, v))
        scheduler.step()
    assert u.item() == 1.0
    torch.testing.assert_close(v.item(), 1.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.item(), 0.5, rtol=0, atol=1e-6)
    assert float(optimizer.metrics.upper_grad_norm) == 0
    torch.testing.assert_close(optimizer.adjoint[0].item(), 1.0, rtol=0, atol=1e-6)


def g8(u, v):
    return 0.5 * (v - u).square().sum()


@pytest.mark.parametrize("reads", ["u", "v"])
def test_inequality_above_closed_form_8(reads):
    """The same bound as h <= 0: multiplier 1, whether h reads u or, through the adjoint, v."""
    u, v = leaf([0.0]), leaf([0.0])
    h = Inequality(lambda: (u if reads == "u" else v) - 1)
    optimizer = PenaltyBilevelOptimizer(
        SGD([u], 0.1), SGD([v], 0.3), penalty=PLAIN, upper_constraint=h
    )
    for _ in range(400):
        loss = optimizer.step(lambda: 0.5 * (v - 2).square().sum(), lambda: g8(u, v))
    torch.testing.assert_close(u.item(), 1.0, rtol=0, atol=1e-8)
    torch.testing.assert_close(loss.item(), 0.5, rtol=0, atol=1e-8)  # f, without the terms of h
    (mu,) = optimizer.inequality_multipliers["upper"]
    torch.testing.assert_close(mu.item(), 1.0, rtol=0, atol=1e-8)


# Lower level: hypergradients on the active face.

M = torch.tensor([[2.0, 0.4, 0, 0.1], [0.4, 1.5, 0.2, 0], [0, 0.2, 1.2, 0.3], [0.1, 0, 0.3, 1]])
M = M.double()
TARGET = torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64)
U0 = torch.tensor([2.0, -1.0, 0.5, 1.0], dtype=torch.float64)


def f_of(u, v):
    return 0.5 * (v - TARGET).square().sum() + 0.1 * u.sum() * v.sum()


def g_of(u, v):
    return 0.5 * v @ M @ v - u @ v


def solve_lower(constraint, u):
    v = constraint.project(torch.zeros(4))
    for _ in range(400):
        v = constraint.project(v - 0.4 * (M @ v - u))
    return v


def settled(constraint, start, rule=lambda p: SGD(p, 0.3), steps=400, curvature="auto"):
    """v and nu at convergence with u held."""
    u, v = leaf(U0), leaf(start)
    optimizer = PenaltyBilevelOptimizer(
        [u], rule([v]), upper_lr=0.0, lower_constraint=constraint, curvature=curvature
    )
    f, g = (lambda: f_of(u, v)), (lambda: g_of(u, v))
    if curvature == "functional":
        f, g = (lambda a, b: f_of(a[0], b[0])), (lambda a, b: g_of(a[0], b[0]))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(f, g)
        scheduler.step()
    return u, v, optimizer


LOWER = {
    "ball, active": (Ball(0.8), torch.zeros(4)),
    "ball, inactive": (Ball(50.0), torch.zeros(4)),
    "non-negative": (NonNegative(), torch.ones(4)),
    "box": (Box(-0.3, torch.tensor([0.4, 9, 9, 0.3])), torch.zeros(4)),
    "simplex, centre": (Simplex(), torch.full((4,), 0.25)),
    "simplex, vertex": (Simplex(), torch.eye(4)[3]),
}


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
@pytest.mark.parametrize("case", LOWER)
def test_lower_hypergradient_equals_differences_of_the_solution(case, curvature):
    constraint, start = LOWER[case]
    u, v, optimizer = settled(constraint, start, curvature=curvature)
    torch.testing.assert_close(v.detach(), solve_lower(constraint, U0), rtol=0, atol=1e-7)

    def value(x):
        return f_of(x, solve_lower(constraint, x))

    step = 1e-5
    differences = [(value(U0 + step * e) - value(U0 - step * e)) / (2 * step) for e in torch.eye(4)]
    torch.testing.assert_close(u.grad, torch.stack(differences), rtol=0, atol=1e-6)
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-6


def test_adam_below_reaches_the_same_face():
    for case in ("ball, active", "simplex, vertex"):
        constraint, start = LOWER[case]
        slow = settled(constraint, start)[0].grad
        u, v, _ = settled(constraint, start, lambda p: Adam(p, 0.05), steps=500)
        torch.testing.assert_close(v.detach(), solve_lower(constraint, U0), rtol=0, atol=1e-6)
        torch.testing.assert_close(u.grad, slow, rtol=0, atol=1e-5)


def test_box_constrained_ridge_closed_form():
    """H = X'X/N + I e^u, box: held entries have q = 0, free ones solve the reduced system."""
    x, y = torch.randn(20, 4), torch.randn(20)
    target = torch.randn(4)
    u, v = leaf([0.1]), leaf(torch.zeros(4))

    def g():
        return 0.5 * (x @ v - y).square().mean() + 0.5 * u.exp().sum() * v.square().sum()

    optimizer = PenaltyBilevelOptimizer(
        [u], SGD([v], 0.4), upper_lr=0.0, lower_constraint=Box(-0.05, 0.08)
    )
    for _ in range(300):
        optimizer.step(lambda: 0.5 * (v - target).square().sum(), g)
    w = v.detach()
    free = (w > -0.05) & (w < 0.08)
    assert 0 < int(free.sum()) < 4
    decay = u.detach().exp()
    H = x.T @ x / 20 + decay * torch.eye(4)
    q = torch.zeros(4)
    q[free] = -torch.linalg.solve(H[free][:, free], (w - target)[free])
    torch.testing.assert_close(optimizer.adjoint[0], q, rtol=0, atol=1e-9)
    torch.testing.assert_close(u.grad, decay * (w @ q), rtol=0, atol=1e-9)


def half_space(rate=0.1, weight=1.0, offset=0.3, curvature="auto", steps=500, rule=None):
    """Closed form 9: g = 0.5 |v - u|^2 subject to a'v <= b, u held."""
    a = torch.tensor([0.6, 0.8, 0.0])
    u, v, t = leaf([1.0, -0.2, 0.4]), leaf(torch.zeros(3)), torch.tensor([0.2, 0.5, -0.1])
    f, g, h = (
        lambda: 0.5 * (v - t).square().sum(),
        lambda: g8(u, v),
        lambda: (a @ v - offset).reshape(1),
    )
    if curvature == "functional":
        f = lambda x, y: 0.5 * (y[0] - t).square().sum()  # noqa: E731
        g = lambda x, y: g8(x[0], y[0])  # noqa: E731
        h = lambda x, y: (a @ y[0] - offset).reshape(1)  # noqa: E731
    optimizer = PenaltyBilevelOptimizer(
        [u],
        rule([v]) if rule else SGD([v], 0.3),
        upper_lr=0.0,
        penalty=PLAIN,
        curvature=curvature,
        lower_constraint=Inequality(h, weight=weight, rate=rate),
    )
    for _ in range(steps):
        optimizer.step(f, g)
    excess = max(0.0, float(a @ u.detach()) - offset)
    best = u.detach() - excess * a
    exact = (torch.eye(3) - (excess > 0) * torch.outer(a, a)) @ (best - t)
    return u, v, optimizer, best, exact, excess


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
@pytest.mark.parametrize("offset", [0.3, 0.6])
def test_half_space_below_closed_form_9(offset, curvature):
    """v = u - max(0, a'u - b) a, dF = (I - aa' 1[active])(v - t), z = max(0, a'u - b)."""
    u, v, optimizer, best, exact, excess = half_space(offset=offset, curvature=curvature)
    torch.testing.assert_close(v.detach(), best, rtol=0, atol=1e-7)
    torch.testing.assert_close(u.grad, exact, rtol=0, atol=1e-6)
    (z,) = optimizer.inequality_multipliers["lower"]
    torch.testing.assert_close(z.item(), excess, rtol=0, atol=1e-7)
    assert float(optimizer.metrics.residual_norm) < 1e-7
    assert [t.shape for t in optimizer.adjoint] == [v.shape]


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_guard_sees_the_curvature_of_the_ascending_system(weight):
    """q ascends along z, so its curvature is q_v' (I + w aa') q_v: a' q_v q_z cancels. Without the
    change of sign a saddle would pass for negative curvature, or hide it."""
    u, v, optimizer, *_ = half_space(weight=weight)
    q_v, q_z = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0])
    before = optimizer._dual.scalars["signed_curvature"]
    optimizer._dual = optimizer._dual._replace(multiplier=(q_v, q_z))
    a, t = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([0.2, 0.5, -0.1])
    optimizer.lower_step(lambda: 0.5 * (v - t).square().sum(), lambda: g8(u, v))
    seen = (optimizer._dual.scalars["signed_curvature"] - 0.9 * before) / 0.1
    expected = float(q_v @ q_v + weight * (a @ q_v) ** 2)
    assert seen == pytest.approx(expected, rel=1e-9)


def test_weight_and_rate_change_the_path_and_not_the_solution():
    starts = [half_space(steps=10, weight=w, rate=r)[1] for w, r in ((1, 0.1), (3, 0.1), (1, 0.5))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
    for weight, rate in ((0.3, 1.0), (2.0, 0.5)):
        u, _, _, _, exact, _ = half_space(weight=weight, rate=rate)
        torch.testing.assert_close(u.grad, exact, rtol=0, atol=1e-6)


# Known optima. Definitions and optima: BASBLib (Paulavicius & Adjiman), QP-QP problems, after the
# papers named there. (F, g, upper h, lower h, boxes, start, rates, optimum (x, y), F*).


def stack(*rows):
    return torch.cat(rows)


BASBLIB = {
    "cw_1990_02": {  # Clark & Westerberg 1990; (3, 5) with F = 9 is a local solution
        "f": lambda x, y: (x - 3) ** 2 + (y - 2) ** 2,
        "g": lambda x, y: (y - 5) ** 2,
        "below": lambda x, y: stack(-2 * x + y - 1, x - 2 * y + 2, x + 2 * y - 14),
        "boxes": ((0, 8), (0, 8)),
        "start": (0.5, 2.0),
        "rates": (0.01, 0.1),
        "best": (1.0, 3.0, 5.0),
    },
    "d_1992_01": {  # Dempe 1992; F has zero slope and curvature at the optimum
        "f": lambda x, y: (x - 3.5) ** 2 + (y + 4) ** 2,
        "g": lambda x, y: (y - 3) ** 2,
        "below": lambda x, y: y**2 - x,
        "boxes": ((1, 10), (1, 10)),
        "start": (1.2, 1.0),
        "rates": (0.5, 0.05),
        "best": (1.0, 1.0, 31.25),
        "rate": 0.5,
        "point_tolerance": 0.1,  # F - F* = (x - 1)^3 / 2
        "tolerance": 1e-4,
    },
    "sc_1998_01": {  # Shimizu, Ishizuka & Bard 1997 after Gumus & Floudas 2001
        "f": lambda x, y: (x - 3) ** 2 + (y - 2) ** 2,
        "g": lambda x, y: (y - 5) ** 2 + 0 * x * y,  # v does not respond, and it is meant
        "above": lambda x, y: stack(-2 * x + y - 1, x - 2 * y + 2, x + 2 * y - 14),
        "boxes": ((0, 8), (0, 10)),
        "start": (0.5, 2.0),
        "rates": (0.03, 0.2),
        "best": (3.0, 5.0, 9.0),
    },
    "tmh_2007_01": {  # Tuy, Migdalas & Hoai-Phuong 2007; a linear lower level
        "f": lambda x, y: x**2 + y**2,
        "g": lambda x, y: -y + 0 * x,
        "below": lambda x, y: stack(3 * x + y - 15, x + y - 7, x + 3 * y - 15),
        "boxes": ((0, 10), (0, 10)),
        "start": (3.0, 4.0),
        "rates": (0.02, 0.1),
        "best": (1.5, 4.5, 22.5),
    },
    "b_1998_04": {  # Bard 1998; dy/dx = 50
        "f": lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        "g": lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        "boxes": ((-100, 100), (-100, 100)),
        "start": (10.05, 5.0),
        "rates": (1e-4, 0.5),
        "best": (10.016393442622950, 0.8196721311475, 81.3278688524590),
        "tolerance": 1e-3,
    },
    "b_1998_05": {  # the same with y >= 0
        "f": lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        "g": lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        "boxes": ((-100, 100), (0, 100)),
        "start": (5.0, 5.0),
        "rates": (0.05, 0.5),
        "best": (1.0, 0.0, 1.0),
    },
    "sa_1981_01": {  # Shimizu & Aiyoshi 1981; feasible only for x >= 10, a kink at the optimum
        "f": lambda x, y: x**2 + (y - 10) ** 2,
        "g": lambda x, y: (x + 2 * y - 30) ** 2,
        "above": lambda x, y: y - x,
        "below": lambda x, y: x + y - 20,
        "boxes": ((0, 15), (0, 20)),
        "start": (12.0, 7.0),
        "rates": (0.01, 0.05),
        "best": (10.0, 10.0, 100.0),
        "tolerance": 2e-2,
    },
}


@pytest.mark.parametrize("name", BASBLIB)
def test_known_optima_of_basblib(name):
    problem = BASBLIB[name]
    u, v = leaf([problem["start"][0]]), leaf([problem["start"][1]])
    sets = [[Box(float(low), float(high))] for low, high in problem["boxes"]]
    rate = problem.get("rate", 0.1)
    for level, key in enumerate(("above", "below")):
        if key in problem:
            sets[level].append(Inequality(lambda key=key: problem[key](u, v), rate=rate))
    optimizer = PenaltyBilevelOptimizer(
        SGD([u], problem["rates"][0]),
        SGD([v], problem["rates"][1]),
        penalty=PLAIN,
        warmup_steps=60,
        upper_constraint=sets[0],
        lower_constraint=sets[1],
    )
    for _ in range(450):
        loss = optimizer.step(lambda: problem["f"](u, v).sum(), lambda: problem["g"](u, v).sum())
    x, y, best = problem["best"]
    tolerance = problem.get("tolerance", 2e-4)
    near = problem.get("point_tolerance", tolerance)
    assert abs(u.item() - x) < near * max(1, abs(x))
    assert abs(v.item() - y) < near * max(1, abs(y))
    assert abs(loss.item() - best) < tolerance * max(1, abs(best))


@pytest.mark.parametrize("name", BASBLIB)
def test_the_table_of_optima_is_right(name):
    """Brute force: the lower problem on a grid of y for a grid of x, then the best feasible pair.

    Only solutions in the start's basin count where the table says so (cw_1990_02 is global).
    """
    problem = BASBLIB[name]
    (xl, xh), (yl, yh) = problem["boxes"]
    px, py, best = problem["best"]
    x = torch.linspace(max(xl, px - 4), min(xh, px + 4), 1601)[:, None]
    y = torch.linspace(max(yl, py - 8), min(yh, py + 8), 3201)[None, :]
    x, y = torch.broadcast_tensors(x, y)

    def allowed(key):
        if key not in problem:
            return torch.ones_like(x, dtype=torch.bool)
        values = problem[key](x[None], y[None])
        return (values <= 1e-9).all(0)

    g = torch.where(allowed("below"), problem["g"](x, y), torch.inf)
    reply = g.argmin(1)
    rows = torch.arange(len(reply))
    feasible = g[rows, reply].isfinite() & allowed("above")[rows, reply]
    edge = (reply == 0) & (y[0, 0] > yl) | (reply == y.shape[1] - 1) & (y[0, -1] < yh)
    values = torch.where(feasible & ~edge, problem["f"](x, y)[rows, reply], torch.inf)
    found = int(values.argmin())
    spacing = float(x[1, 0] - x[0, 0])
    assert abs(float(x[found, 0]) - px) < 0.1 + 2 * spacing
    assert abs(float(values[found]) - best) < 0.02 * max(1, best)


# Contract: rollback, resume, rows, dtypes, frozen parameters, errors.


def constrained_task(**options):
    task = Task()
    task.weights.data.fill_(1 / 8)
    below = Inequality(lambda: task.net[2].weight.square().sum().reshape(1) - 0.05)
    above = Inequality(lambda: task.weights[:2].sum() - 0.2 + 0 * task.net[2].bias.sum())
    task.optimizer = PenaltyBilevelOptimizer(
        [task.weights],
        task.net.parameters(),
        upper_lr=0.05,
        lower_lr=0.02,
        upper_constraint=[Simplex(), above],
        lower_constraint=[Box(-0.6, 0.6), below],
        **options,
    )
    return task


def all_state(task):
    flat = {"point": task.point(), "rng": torch.get_rng_state()}
    own = task.optimizer.state_dict()["bilevel"]
    for key in ("multiplier", "probe", "adjoint"):
        flat |= {f"{key}{i}": t.clone() for i, t in enumerate(own[key])}
    for level, tensors in own["inequalities"].items():
        flat |= {f"{level}{i}": t.clone() for i, t in enumerate(tensors)}
    return flat


@pytest.mark.parametrize("lower_steps", [1, 2])
def test_a_failed_step_changes_nothing(lower_steps):
    task = constrained_task(lower_steps=lower_steps)
    task.net[0].weight.data.clamp_(-0.6, 0.6)
    task.run(4)
    before = all_state(task)
    assert float(before["lower0"]) > 0  # the constraint is at work
    calls = itertools.count(1)

    def upper():
        loss = task.upper()
        return loss * float("nan") if next(calls) == lower_steps else loss

    with pytest.raises(NonFiniteError):
        task.optimizer.step(upper, task.lower)
    after = all_state(task)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_multipliers_follow_what_all_workers_see():
    """A second worker with h = 0 halves the average, so mu grows by half."""
    grown = []
    for other in (1.0, 0.5):
        u, v = leaf([2.0]), leaf([0.0])
        optimizer = PenaltyBilevelOptimizer(
            [u],
            [v],
            upper_constraint=Inequality(lambda u=u: u - 1),
            reduce=lambda tensors, other=other: tuple(other * t for t in tensors),
        )
        loss = optimizer.step(lambda: v.square().sum(), lambda: g8(u, v))  # noqa: B023
        assert loss.item() == pytest.approx(0.0)  # f itself, although the term of h is 0.5
        grown.append(optimizer.inequality_multipliers["upper"][0].item())
    assert grown == [pytest.approx(0.1), pytest.approx(0.05)]


def test_first_failing_step_also_changes_nothing():
    task = constrained_task()
    before = all_state(task)
    with pytest.raises(NonFiniteError):
        task.optimizer.step(lambda: task.upper() * float("nan"), task.lower)
    after = all_state(task)
    assert all(torch.equal(before[k], after[k]) for k in before)
    task.run(2)
    assert torch.equal(task.point(), constrained_task().run(2).point())


def test_resume_is_bit_equal():
    whole, first = constrained_task().run(8), constrained_task().run(4)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second = constrained_task()
    second.weights.data.copy_(first.weights.data)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    second.run(4)
    assert torch.equal(whole.point(), second.point())
    mine, theirs = (t.optimizer.inequality_multipliers for t in (whole, second))
    for level in ("upper", "lower"):
        assert float(mine[level][0].sum()) > 0
        assert torch.equal(mine[level][0], theirs[level][0])


def test_a_checkpoint_of_other_inequalities_is_refused():
    state = constrained_task().run(1).optimizer.state_dict()
    plain = Task()
    with pytest.raises(ValueError, match="construct with the same ones"):
        plain.optimizer.load_state_dict(state)


def test_copies_keep_their_projection():
    task = Task(upper_constraint=Box(-0.1, 0.1)).run(3)
    assert float(task.weights.detach().abs().max()) <= 0.1
    twin = copy.deepcopy(task)
    assert torch.equal(twin.run(3).point(), task.run(3).point())


def test_absent_rows_stay_bit_equal_under_constraints():
    """Rows of simplices that were not in the batch keep their distribution and their moments."""
    u, v = leaf(torch.softmax(torch.randn(4, 3), 1)), leaf(torch.zeros(3))
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, upper_constraint=Simplex())
    for batch in ([0, 1], [2]):
        before, state = u.detach().clone(), optimizer.upper.state.get(u, {})
        moments = state["exp_avg"].clone() if state else torch.zeros(4, 3)
        for _ in range(2):
            optimizer.step(
                lambda: (v - 1).square().sum(),
                lambda batch=batch: (v - u[batch].sum(0)).square().sum(),
            )
        away = [i for i in range(4) if i not in batch]
        assert torch.equal(u.detach()[away], before[away])
        assert torch.equal(optimizer.upper.state[u]["exp_avg"][away], moments[away])
        assert not torch.equal(u.detach()[batch], before[batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_steps_stay_feasible(dtype):
    u, v = leaf(torch.full((4,), 0.25), dtype), leaf(torch.zeros(4), dtype)
    frozen = torch.full((2,), 7.0, dtype=dtype)
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v, frozen],
        upper_lr=0.05,
        lower_lr=0.05,
        upper_constraint=Simplex(),
        lower_constraint=Ball(0.4),
    )
    for _ in range(40):
        optimizer.step(lambda: (v - 1).square().sum(), lambda: (v - 3 * u).square().sum())
    eps = torch.finfo(dtype).eps
    assert in_set("simplex", u.detach().double(), 4 * eps)
    assert float(v.detach().double().norm()) <= 0.4 * (1 + 16 * eps)
    assert float(v.detach().double().norm()) > 0.39
    assert torch.equal(frozen, torch.full((2,), 7.0, dtype=dtype))


def test_constraints_change_the_outcome():
    free = Task().run(5).point()
    for options in (
        {"upper_constraint": Box(-0.01, 0.01)},
        {"lower_constraint": Ball(0.5)},
    ):
        task = Task()
        for p in task.net.parameters():
            p.data.mul_(0.1)
        task.optimizer = PenaltyBilevelOptimizer(
            [task.weights], task.net.parameters(), upper_lr=0.05, lower_lr=0.02, **options
        )
        assert not torch.equal(task.run(5).point(), free)


def test_one_lower_entry_with_opposite_gradients_still_learns_its_multiplier():
    """r = -grad_v f / |grad_v f| at the start: their directions cancel in the curvature probe."""
    u, v = leaf([4.0]), leaf([0.0])  # grad_v f = 8 and r = -4: they cancel without rounding
    optimizer = PenaltyBilevelOptimizer([u], SGD([v], 0.0), upper_lr=0.0, penalty=PLAIN)
    for _ in range(3):
        optimizer.step(lambda: (v + u).square().sum(), lambda: (v - 0.5 * u).square().sum())
    assert optimizer.adjoint[0].item() == pytest.approx(-4.0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Box(1.0, 0.0), ValueError, "low <= high, got low=1.0 and high=0.0"),
        (lambda: Box(float("nan"), 0.0), ValueError, "low <= high"),
        (lambda: Ball(0), ValueError, "radius must be a finite number > 0, got 0"),
        (lambda: Ball("1"), ValueError, "radius must be a finite number > 0, got '1'"),
        (lambda: Ball(float("inf")), ValueError, "radius must be"),
        (lambda: Inequality(3), TypeError, "closure must be callable"),
        (lambda: Inequality(torch.zeros, weight=0), ValueError, "weight must be .*, got 0"),
        (lambda: Inequality(torch.zeros, rate=1.5), ValueError, r"rate must lie in \(0, 1\], got"),
    ],
)
def test_constraint_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"upper_constraint": Simplex}, TypeError, "upper_constraint must be an object"),
        ({"lower_constraint": 3.0}, TypeError, "lower_constraint must be an object"),
        ({"upper_constraint": [Box(0, 1), Ball(1)]}, ValueError, "two projections, Box and Ball"),
        ({"upper_constraint": Simplex()}, ValueError, r"'upper\[0\]' .* outside of upper_constr"),
        ({"upper_constraint": Box(0, torch.ones(3))}, ValueError, "do not broadcast"),
        ({"upper_constraint": Ball(1, rows=True)}, ValueError, "needs rows, got a parameter"),
        ({"lower_constraint": Simplex()}, ValueError, "Simplex needs a tensor with a last"),
        (
            {"lower_constraint": Inequality(torch.zeros), "penalty": "paper"},
            ValueError,
            "needs a multiplier rule that knows a bound on H",
        ),
        *[
            (
                {"lower_constraint": constraint, "penalty": penalty},
                ValueError,
                f"penalty='{penalty}' cannot serve a lower_constraint.* use penalty=\"stationarity",
            )
            for penalty in ("value", "fixed_point")
            for constraint in (Box(-1, 1), Inequality(torch.zeros))
        ],
    ],
)
def test_level_constraints_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        PenaltyBilevelOptimizer([leaf(torch.zeros(2))], [leaf(0.0)], **options)


@pytest.mark.parametrize("penalty", ["value", "fixed_point"])
def test_other_formulations_take_upper_constraints(penalty):
    """Closed form 8 with v = u as a loss and as a map: u stops at the bound, mu goes to 1."""
    below = (lambda u, v: g8(u, v)) if penalty == "value" else (lambda u, v: 0.5 * (v + u))
    for kind in ("set", "inequality"):
        u, v = leaf([0.0]), leaf([0.0])
        h = Inequality(lambda u=u: u - 1)
        optimizer = PenaltyBilevelOptimizer(
            SGD([u], 0.05),
            SGD([v], 0.3),
            penalty=penalty,
            upper_constraint=Box(-1.0, 1.0) if kind == "set" else h,
        )
        for _ in range(600):
            optimizer.step(lambda v=v: 0.5 * (v - 2).square().sum(), lambda u=u, v=v: below(u, v))
            assert kind == "inequality" or abs(u.item()) <= 1
        torch.testing.assert_close(u.item(), 1.0, rtol=0, atol=1e-2)
        if kind == "inequality":
            (mu,) = optimizer.inequality_multipliers["upper"]
            torch.testing.assert_close(mu.item(), 1.0, rtol=0, atol=5e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"lower_constraint": Box(-1, 1)},
        {"lower_constraint": Inequality(torch.zeros)},
        {"upper_constraint": Inequality(torch.zeros)},
    ],
)
def test_the_self_check_refuses_what_it_cannot_compare(options):
    u, v = leaf([0.5]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer([u], [v], **options)
    (name,) = options
    with pytest.raises(ValueError, match=f"takes no {name} other than an upper projection"):
        optimizer.check_hypergradient(lambda: v.square().sum(), lambda: g8(u, v))


def test_the_self_check_works_beside_an_upper_projection():
    u, v = leaf([0.5]), leaf([0.5])
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_constraint=Box(0, 1))
    report = optimizer.check_hypergradient(lambda: v.square().sum(), lambda: g8(u, v))
    torch.testing.assert_close(report.exact[0].item(), 1.0)


def test_what_an_inequality_returns_is_checked():
    sizes = itertools.count(1)
    for h, error, message in (
        (lambda: 3.0, TypeError, "upper_constraint's Inequality returned float"),
        (lambda: torch.ones(2, dtype=torch.int64), TypeError, "returned torch.int64"),
        (lambda: torch.ones(next(sizes)), ValueError, "its multiplier belongs to entries"),
    ):
        task = Task(upper_constraint=Inequality(h))
        with pytest.raises(error, match=message):
            task.run(2)


def test_sparse_gradients_under_a_constraint_are_refused():
    table = torch.nn.Embedding(5, 2, sparse=True)
    v = leaf(torch.zeros(2))
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SparseAdam(table.parameters()), [v], upper_constraint=Ball(100.0)
    )
    with pytest.raises(TypeError, match="needs dense gradients"):
        optimizer.step(
            lambda: (v - 1).square().sum(),
            lambda: (v - table(torch.tensor([1])).sum(0)).square().sum(),
        )


def test_infeasible_points_are_projected_at_the_next_step():
    """E.g. after loading a model: entries outside count as at the bound."""
    u, v = leaf([0.5, 0.5]), leaf(torch.zeros(2))
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_constraint=Box(0, 1), lower_constraint=Box(-1, 1)
    )
    with torch.no_grad():
        u.copy_(torch.tensor([3.0, -2.0]))
        v.copy_(torch.tensor([9.0, 0.0]))
    optimizer.step(lambda: (v - u).square().sum(), lambda: (v - u).square().sum())
    assert in_set("box", u.detach() * 0.7, 0) or bool((u >= 0).all() & (u <= 1).all())
    assert float(v.detach().abs().max()) <= 1


def test_the_paper_rule_takes_projected_constraints():
    """Both levels; v ends at the bound, u's gradient vanishes there."""
    u, v = leaf([0.2]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v],
        upper_lr=0.02,
        lower_lr=0.02,
        penalty="paper",
        upper_constraint=NonNegative(),
        lower_constraint=Box(-1.0, 0.1),
    )
    for _ in range(60):
        optimizer.step(lambda: (v - 2).square().sum() + u.square().sum(), lambda: g8(u, v))
    assert v.item() <= 0.1
    assert u.item() >= 0
