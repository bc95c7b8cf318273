"""The fixed-point and value-gap formulations: twins, closed forms, laws and failures."""

import copy
import itertools
import math

import pytest
import torch
from oracles import FixedPointTwin, ValueGapTwin, exact_hypergradient, map_derivatives
from problems import normal
from stepping import PROBLEMS, A, C, build, closures, quadratic_f, quadratic_g, start
from tasks import assert_unchanged, everything
from torch import nn

from torch_penalty_bilevel import (
    BilevelWarning,
    EpsilonTest,
    FiniteDifference,
    FixedPoint,
    LeastSquares,
    NondeterministicClosureError,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    UnusedParameterError,
    ValueGap,
)

LIVE = ["auto", "double_backward"]
W = normal(4, 4, seed=31)
W = 0.8 * W / torch.linalg.matrix_norm(W, 2)


def curved_phi(u, v):
    return torch.tanh(W @ v + u @ C)


def target_f(u, v):
    return ((v - 0.2) ** 2).sum() + 0.1 * u @ u + 0.3 * u.sum() * v[0]


def wrap(f, phi, u, v, curvature):
    """Two callables for ``step``."""
    if curvature == "functional":
        return (lambda a, b: f(a[0], b[0])), (lambda a, b: (phi(a[0], b[0]),))
    return (lambda: f(u, v)), (lambda: (phi(u, v),))


def close(mine, theirs, tolerance=1e-11):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# Fixed point: the step.


@pytest.mark.parametrize("curvature", [*LIVE, "functional"])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_fixed_point_step_equals_its_twin_after_every_step(lower_steps, curvature):
    options = {"damping": 0.8, "share": 0.5, "ridge": 0.05}
    u0, v0 = start()
    twin = FixedPointTwin(target_f, curved_phi, u0, v0, 0.02, lower_steps, **options)
    u, v, optimizer = build(
        u0,
        v0,
        upper_lr=0.02,
        lower_lr=0.02,
        lower_steps=lower_steps,
        curvature=curvature,
        penalty=FixedPoint(LeastSquares(**options)),
    )
    f, phi = wrap(target_f, curved_phi, u, v, curvature)
    for _ in range(25):
        at = u.detach().clone(), v.detach().clone()
        close(optimizer.step(f, phi), (twin.step(), twin.value)[1])
        close(u.detach(), twin.u)
        close(v.detach(), twin.v)
        close(u.grad, twin.upper_grad)
        close(optimizer.adjoint[0], twin.nu)
        close(optimizer.metrics.residual_norm, twin.residual)
        close(optimizer.metrics.adjoint_residual_norm, twin.certificate)
        if lower_steps == 1:
            r = at[1] - curved_phi(*at)
            close(optimizer.metrics.lower_loss, 0.5 * r @ r)


def test_fixed_point_under_the_published_schedule():
    """q = gamma r and the v-gradient grad_v f + B q + lambda r, B = (I - Phi_v)'."""
    rule = EpsilonTest(weight=0.3, damping=0.2)
    u, v, optimizer = build(*start(), penalty=FixedPoint(rule))
    at = u.detach().clone(), v.detach().clone()
    _, _, _, f_v, r, B, _ = map_derivatives(target_f, curved_phi, *at)
    optimizer.lower_step(*wrap(target_f, curved_phi, u, v, "auto"))
    close(v.grad, f_v + B @ (0.3 * r) + 0.2 * r)


# Fixed point: closed forms.


@pytest.mark.parametrize("curvature", ["auto", "functional"])
def test_tanh_equilibrium(curvature):
    """Problem 11: z = tanh(Wz + Uu), n = 8, non-symmetric; dF = (DU)' (I - DW)^-T grad_z f."""
    n, m = 8, 5
    weight, inject = normal(n, n, seed=41), 0.5 * normal(n, m, seed=42)
    weight = 0.9 * weight / torch.linalg.matrix_norm(weight, 2)
    goal = 0.3 * normal(n, seed=43)

    def phi(u, z):
        return torch.tanh(weight @ z + inject @ u)

    def f(u, z):
        return 0.5 * ((z - goal) ** 2).sum() + 0.05 * u @ u

    def equilibrium(u):
        z = torch.zeros(n)
        for _ in range(400):
            z = phi(u, z)
        return z

    def exact(u):
        z = equilibrium(u)
        D = torch.diag(1 - z**2)
        slope = torch.linalg.solve((torch.eye(n) - D @ weight).T, z - goal)
        return 0.1 * u + (D @ inject).T @ slope

    u0 = 0.5 * normal(m, seed=44)
    u, z = u0.clone().requires_grad_(), torch.zeros(n, requires_grad=True)
    functions = wrap(f, phi, u, z, curvature)
    still = PenaltyBilevelOptimizer(
        [u],
        torch.optim.SGD([z], lr=1.0),
        penalty=FixedPoint(LeastSquares(share=0.0)),
        curvature=curvature,
    )
    for _ in range(400):
        still.lower_step(*functions)
    still.upper_step(*functions)
    close(u.grad, exact(u0), 1e-9)
    # The whole problem, against a Newton step on the exact hypergradient.
    u, z = u0.clone().requires_grad_(), torch.zeros(n, requires_grad=True)
    lower = torch.optim.SGD([z], lr=0.5)
    optimizer = PenaltyBilevelOptimizer(
        [u], lower, upper_lr=0.02, penalty="fixed_point", curvature=curvature, lower_steps=2
    )
    functions = wrap(f, phi, u, z, curvature)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.upper, 1200)
    for _ in range(1200):
        optimizer.step(*functions)
        scheduler.step()
    best = u.detach()
    for _ in range(6):
        best = best - torch.linalg.solve(torch.func.jacrev(exact)(best), exact(best))
    assert float(exact(best).norm()) < 1e-12
    torch.testing.assert_close(u.detach(), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.detach(), equilibrium(best), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turn", [0.1, 0.3])
def test_multiplier_of_a_rotating_map(turn):
    """Phi_v = 0.9 I + turn K: B's eigenvalues are 0.1 +- i turn, so a step 1 / ||B|| diverges.

    At turn = 0.3, |1 - (0.1 + 0.3 i) / 0.316| = 1.17; with L = 1 the modulus is that of Phi_v's
    eigenvalues, 0.95.
    """
    K = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    jacobian = 0.9 * torch.eye(2) + turn * K
    push = torch.tensor([[0.05, 0.02], [0.0, 0.04]])
    u, v, optimizer = build(
        torch.tensor([0.4, -0.3]),
        torch.tensor([1.0, 2.0]),
        penalty="fixed_point",
        upper_lr=0.0,
        lower_lr=0.0,
    )
    functions = wrap(target_2, lambda a, b: jacobian @ b + push @ a, u, v, "auto")
    for _ in range(600):
        optimizer.lower_step(*functions)
    exact = -torch.linalg.solve((torch.eye(2) - jacobian).T, 2 * (v.detach() - 0.2))
    close(optimizer.adjoint[0], exact, 1e-9)
    optimizer.upper_step(*functions)
    close(u.grad, 2 * u.detach() - push.T @ exact, 1e-9)


def target_2(u, v):
    return ((v - 0.2) ** 2).sum() + (u**2).sum()


def test_linear_map_in_closed_form():
    """v = Mv + Pu: v* = Su with S = (I - M)^-1 P, so u solves (S'S + rho I) u = S' t."""
    M = torch.tensor([[0.5, 0.3, 0.0], [-0.4, 0.2, 0.1], [0.2, 0.0, -0.3]])
    P, goal = normal(3, 2, seed=51), normal(3, seed=52)
    S = torch.linalg.solve(torch.eye(3) - M, P)
    best = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(2), S.T @ goal)
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    lower = torch.optim.SGD([v], lr=0.5)
    optimizer = PenaltyBilevelOptimizer([u], lower, upper_lr=0.02, penalty="fixed_point")
    functions = wrap(
        lambda a, b: 0.5 * ((b - goal) ** 2).sum() + 0.05 * a @ a,
        lambda a, b: M @ b + P @ a,
        u,
        v,
        "auto",
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.upper, 1500)
    for _ in range(1500):
        optimizer.step(*functions)
        scheduler.step()
    torch.testing.assert_close(u.detach(), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(v.detach(), S @ best, rtol=0, atol=1e-6)
    adjoint = -torch.linalg.solve((torch.eye(3) - M).T, S @ best - goal)
    torch.testing.assert_close(optimizer.adjoint[0], adjoint, rtol=0, atol=1e-6)


# Fixed point: what the closure may return.


def test_maps_of_several_tensors_in_every_spelling():
    """Tuple, list and dict by name give the same step; a lone tensor serves one parameter."""
    results = []
    for spelling in ("tuple", "list", "dict", "functional"):
        u = torch.tensor([0.3], requires_grad=True)
        a = torch.tensor([0.1, 0.2], requires_grad=True)
        b = torch.tensor(0.4, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u],
            [("a", a), ("b", b)],
            penalty="fixed_point",
            curvature="functional" if spelling == "functional" else "auto",
        )

        def image(u, a, b):
            return {"a": 0.3 * a + u, "b": 0.2 * b + 0.1 * a.sum()}

        def f(u, a, b):
            return (a - 1).square().sum() + b.square() + u.square().sum()

        for _ in range(5):
            if spelling == "functional":
                optimizer.step(
                    lambda up, low, f=f: f(up[0], low["a"], low["b"]),
                    lambda up, low, image=image: image(up[0], low["a"], low["b"]),
                )
                continue

            def phi(u=u, a=a, b=b, image=image, spelling=spelling):
                found = image(u, a, b)
                return {"tuple": tuple, "list": list, "dict": lambda _: found}[spelling](
                    found.values()
                )

            optimizer.step(lambda u=u, a=a, b=b, f=f: f(u, a, b), phi)
        results.append(torch.cat([u.detach(), a.detach(), b.detach()[None]]))
    for other in results[1:]:
        close(other, results[0], 1e-14)


def test_a_lone_tensor_and_a_frozen_parameter():
    u, v, optimizer = build(*start(), penalty="fixed_point")
    optimizer.step(lambda: target_f(u, v), lambda: curved_phi(u, v))
    frozen = torch.ones(2)
    u, v = (t.requires_grad_() for t in start())
    both = PenaltyBilevelOptimizer([u], [frozen.requires_grad_(), v], penalty="fixed_point")
    frozen.requires_grad_(False)
    both.step(lambda: target_f(u, v) + frozen.sum(), lambda: (frozen.detach(), curved_phi(u, v)))
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(v.detach(), start()[1])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda u, v: v.sum(), ValueError, "0-d tensor, a loss.*shaped like the lower"),
        (lambda u, v: (v[:2],), ValueError, r"entry 0 has shape \(2,\).*\(4,\)"),
        (lambda u, v: (v, v), ValueError, "returned 2 tensors; .*tuple of 1 tensor"),
        (lambda u, v: (curved_phi(u, v).detach(),), ValueError, "does not depend on any parameter"),
        (lambda u, v: ([1.0] * 4,), TypeError, "entry 0 is list, not a tensor"),
        (lambda u, v: (torch.ones(4, dtype=torch.int64),), TypeError, "dtype torch.int64"),
        (lambda u, v: None, TypeError, "returned NoneType; penalty="),
        (lambda u, v: {"v": v}, ValueError, r"dict with keys \['v'\]"),
    ],
)
def test_what_a_map_may_not_return(bad, error, message):
    u, v, optimizer = build(*start(), penalty="fixed_point")
    with pytest.raises(error, match=message):
        optimizer.step(lambda: target_f(u, v), lambda: bad(u, v))


@pytest.mark.parametrize("penalty", ["stationarity", "value"])
def test_a_tuple_where_a_loss_belongs_hints_at_the_fixed_point(penalty):
    u, v, optimizer = build(*start(), penalty=penalty)
    with pytest.raises(TypeError, match='pass penalty="fixed_point"'):
        optimizer.step(lambda: target_f(u, v), lambda: (curved_phi(u, v),))


def test_finite_differences_are_refused_at_construction():
    for curvature in ("finite_difference", FiniteDifference()):
        with pytest.raises(ValueError, match='use curvature="auto", "double_backward" or "func'):
            build(*start(), penalty="fixed_point", curvature=curvature)


def test_dependence_of_maps_is_checked():
    u, v, optimizer = build(*start(), penalty="fixed_point")
    with pytest.raises(UnusedParameterError, match=r"upper\[0\]"):
        optimizer.step(lambda: v.square().sum(), lambda: W @ v)
    with pytest.warns(BilevelWarning, match="Phi does not depend on any upper parameter"):
        optimizer.step(lambda: target_f(u, v), lambda: W @ v)


def test_maps_need_no_second_derivative():
    """A custom function without one, which other penalties switch engines for or refuse."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    results = []
    for tanh in (torch.tanh, Once.apply):
        u, v, optimizer = build(*start(), penalty="fixed_point")
        for _ in range(3):
            optimizer.step(lambda: target_f(u, v), lambda: tanh(W @ v + u @ C))  # noqa: B023
        results.append(u.detach().clone())
    close(*results, 1e-14)


# Value gap: the step.


VALUE_OPTIONS = [
    {},
    {"weight": 4.0, "growth": 0.1},
    {"weight": 7.0, "relative": False, "growth": 0.05},
    {"cap": 1.5},
]


@pytest.mark.parametrize("curvature", [*LIVE, "functional", "finite_difference"])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_value_step_equals_its_twin_after_every_step(lower_steps, curvature):
    compare_value("curved", lower_steps, curvature, {})


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("options", VALUE_OPTIONS, ids=str)
def test_value_options_equal_their_twin(options, name):
    compare_value(name, 2, "auto", options)


def compare_value(name, lower_steps, curvature, options):
    u0, v0 = start()
    twin = ValueGapTwin(*PROBLEMS[name], u0, v0, 0.02, lower_steps, **options)
    u, v, optimizer = build(
        u0,
        v0,
        upper_lr=0.02,
        lower_lr=0.02,
        lower_steps=lower_steps,
        curvature=curvature,
        penalty=ValueGap(**options),
    )
    f, g = closures(name, u, v, curvature)
    for _ in range(25):
        loss = optimizer.step(f, g)
        gamma = twin.gamma
        twin.step()
        close(loss, twin.value, 1e-10)
        close(u.detach(), twin.u, 1e-10)
        close(v.detach(), twin.v, 1e-10)
        close(optimizer.state_dict()["bilevel"]["tracker"][0], twin.z, 1e-10)
        close(u.grad, twin.upper_grad, 1e-10)
        close(optimizer.adjoint[0], twin.q, 1e-10)
        close(optimizer.metrics.residual_norm, twin.residual, 1e-10)
        close(optimizer.metrics.adjoint_residual_norm, twin.certificate, 1e-10)
        if lower_steps == 1:
            assert float(optimizer.metrics.penalty_weight) == pytest.approx(gamma, rel=1e-10)
    assert optimizer.metrics.gradient_evaluations == 3 * 25 * lower_steps


@pytest.mark.parametrize(("scale_f", "scale_g"), [(1e4, 1), (1e-4, 1), (1, 1e4), (1, 1e-4)])
def test_relative_weight_does_not_see_units(scale_f, scale_g):
    """Left over: Adam's eps = 1e-8 beside gradients of size 1e-4."""
    paths = []
    for factors in ((1, 1), (scale_f, scale_g)):
        u, v, optimizer = build(*start(), upper_lr=0.02, lower_lr=0.02, penalty="value")
        f, g = closures("curved", u, v, "auto")
        for _ in range(60):
            optimizer.step(lambda: factors[0] * f(), lambda: factors[1] * g())  # noqa: B023
        paths.append(torch.cat([u.detach(), v.detach()]))
    moved = float((paths[0] - torch.cat(start())).norm())
    assert float((paths[0] - paths[1]).norm()) < 1e-3 * moved


# Value gap: laws.


def settled_hypergradient(f, g, u0, v0, gamma, steps, lr):
    """The estimate at fixed u, when v and z have settled under plain gradient descent."""
    u = u0.clone().requires_grad_()
    v = v0.clone().requires_grad_()
    optimizer = PenaltyBilevelOptimizer(
        [u], torch.optim.SGD([v], lr=lr), penalty=ValueGap(gamma, relative=False)
    )
    for _ in range(steps):
        optimizer.lower_step(lambda: f(u, v), lambda: g(u, v))
    optimizer.upper_step(lambda: f(u, v), lambda: g(u, v))
    return u.grad, v.detach(), optimizer


def test_bias_is_of_order_one_over_gamma():
    """Against v_gamma = argmin f + gamma g in closed form, and slope -1 against the exact one."""
    u0, v0 = start()
    S = -torch.linalg.solve(A, C.T)
    exact, adjoint = exact_hypergradient(quadratic_f, quadratic_g, u0, S @ u0)
    errors, adjoint_errors = [], []
    gammas = [1e2, 1e3, 1e4]
    for gamma in gammas:
        estimate, v, optimizer = settled_hypergradient(
            quadratic_f, quadratic_g, u0, v0, gamma, 150, 0.3
        )
        # grad_v f = 2 A (v - 1/2) + sum(u), grad_v g = A v + C'u.
        v_gamma = torch.linalg.solve(
            (2 + gamma) * A, A @ torch.ones(4) - u0.sum() - gamma * C.T @ u0
        )
        close(v, v_gamma, 1e-9)
        close(optimizer.adjoint[0], gamma * (v_gamma - S @ u0), 1e-7)
        assert float(optimizer.metrics.adjoint_residual_norm) < 1e-7 * gamma
        errors.append(float((estimate - exact).norm()))
        adjoint_errors.append(float((optimizer.adjoint[0] - adjoint).norm()))
    for found in (errors, adjoint_errors):
        for one, ten in itertools.pairwise(found):
            assert math.log10(ten / one) == pytest.approx(-1.0, abs=0.02)


def test_flat_lower_level_has_a_cube_root_law():
    """Problem 13: g = (v - u)^4 / 4, f = (v - 1)^2 / 2 + u^2 / 2, u* = 1/2; H = 0.

    From (u, v): u = 1 - v and (1 - v) = gamma (v - u)^3 give u = .419, .482, .496 at gamma = 1e2,
    1e4, 1e6. z - u falls like 1 / sqrt(steps) under SGD. Adam will not do here: its second moments
    remember larger slopes for 1,000 steps and z stops short of u.
    """
    errors = []
    for gamma, known in ((1e2, 0.419), (1e4, 0.482)):
        u = torch.tensor([0.3], requires_grad=True)
        v = torch.tensor([0.3], requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u],
            torch.optim.SGD([v], lr=10.0),
            upper_lr=0.01,
            penalty=ValueGap(gamma, relative=False),
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.upper, 2000)
        for _ in range(2000):
            optimizer.step(
                lambda: ((v - 1) ** 2 / 2 + u**2 / 2).sum(),  # noqa: B023
                lambda: ((v - u) ** 4 / 4).sum(),  # noqa: B023
            )
            scheduler.step()
        assert float(u.detach()) == pytest.approx(known, abs=2e-3)
        errors.append(0.5 - float(u.detach()))
    assert math.log(errors[1] / errors[0]) / math.log(1e2) == pytest.approx(-1 / 3, abs=0.03)


def test_toy_with_spurious_stationary_points_reaches_its_solution_set():
    """Problem 7, 200 starts at once: v = -u; stationary points of g and of |grad_v g|^2 with
    u + v of 2 to 6 are traps for penalties on the gradient.

    Left over: the bias, 0.05 at gamma = 190.
    """
    u0 = 3 * torch.rand(200)
    v0 = 6 * torch.rand(200) - 3
    u, v, optimizer = build(u0, v0, upper_lr=0.01, lower_lr=0.02, lower_steps=2, penalty="value")

    def f():
        return (
            torch.cos(4 * v + 2) / (1 + torch.exp(2 - 4 * u))
            + 0.5 * torch.log((4 * u - 2) ** 2 + 1)
        ).sum()

    def g():
        return ((u + v) ** 2 + u * torch.sin(u + v) ** 2).sum()

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        optimizer.step(f, g)
        with torch.no_grad():
            u.clamp_(0, 3)
        scheduler.step()
    gap = (u + v).detach().abs()
    assert float(gap.max()) < 0.1


def test_quadratic_is_solved_without_tuning():
    """The relative weight grows by itself: the bias falls below that of any fixed early weight."""
    S = -torch.linalg.solve(A, C.T)
    reduced = torch.func.grad(lambda x: quadratic_f(x, S @ x))
    best = -torch.linalg.solve(torch.func.jacrev(reduced)(torch.zeros(3)), reduced(torch.zeros(3)))
    errors = {}
    for cap in (1.0, 1e4):
        u, v, optimizer = build(
            *start(), upper_lr=0.05, lower_lr=0.05, lower_steps=3, penalty=ValueGap(cap=cap)
        )
        f, g = closures("quadratic", u, v, "auto")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
        for _ in range(500):
            optimizer.step(f, g)
            scheduler.step()
        errors[cap] = float((u.detach() - best).norm())
    assert errors[1e4] < 0.1
    assert errors[1.0] > 5 * errors[1e4]


# Value gap: both points see the same world.


class Net:
    """A network with dropout and BatchNorm, per-sample weights, a batch drawn per step."""

    def __init__(self, penalty="value", **options):
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)
        )
        self.x, self.y = torch.randn(24, 3), torch.randn(24, 1)
        self.weights = torch.zeros(16, requires_grad=True)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.weights],
            self.net.parameters(),
            penalty=penalty,
            upper_lr=0.05,
            lower_lr=0.02,
            **options,
        )
        self.batch, self.seen = torch.arange(16), []

    def upper(self):
        return (self.net(self.x[16:]) - self.y[16:]).square().mean()

    def lower(self):
        hook = self.net[4].register_forward_pre_hook(
            lambda module, inputs: self.seen.append(
                (inputs[0] == 0, module.weight.detach().clone())
            )
        )
        each = (self.net(self.x[self.batch]) - self.y[self.batch]).square().squeeze(1)
        hook.remove()
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.weights[self.batch].sigmoid() * each).mean() + 0.01 * decay

    def point(self):
        return torch.cat([p.detach().reshape(-1) for p in (self.weights, *self.net.parameters())])

    def run(self, steps):
        for _ in range(steps):
            self.batch = torch.randint(16, (8,))
            self.optimizer.step(self.upper, self.lower)
        return self


def test_both_points_see_the_same_batch_mask_and_statistics():
    task = Net().run(3)
    task.seen.clear()
    running = [b.clone() for b in task.net.buffers()]
    task.run(1)
    (mask, at_v), (mask_again, at_z) = task.seen
    assert torch.equal(mask, mask_again)  # the same units dropped
    assert 0 < int(mask.sum()) < mask.numel()
    assert not torch.equal(at_v, at_z)
    # BatchNorm moved once, by v's forward pass: num_batches_tracked counts it.
    assert int(list(task.net.buffers())[2] - running[2]) == 1


def test_masks_change_between_steps_and_the_stream_is_that_of_one_evaluation():
    """The second evaluation draws nothing: the next random number is as with one fewer call."""
    drawn = []
    for penalty in ("value", "stationarity"):
        task = Net(penalty, curvature="double_backward").run(2)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    task = Net().run(4)
    masks = [mask for mask, _ in task.seen]
    assert not torch.equal(masks[-1], masks[-3])


def test_a_closure_that_draws_other_data_is_refused():
    u, v, optimizer = build(*start(), penalty="value")
    numbers = iter(range(100))
    with pytest.raises(NondeterministicClosureError, match="draw the batch outside"):
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v) * (1 + next(numbers)))


def test_autocast_copies_do_not_survive_the_swap():
    """Inside a caller's autocast block z must not be evaluated with cached copies of v."""
    u = torch.zeros(1, requires_grad=True)
    net = nn.Linear(2, 1, bias=False).float()
    optimizer = PenaltyBilevelOptimizer(
        [u], torch.optim.SGD(net.parameters(), lr=0.5), penalty=ValueGap(1.0, relative=False)
    )
    x = torch.ones(4, 2)
    seen = []

    def lower():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x.float())
        seen.append(float(out.detach()[0, 0]))
        return (out.float() - u.float()).square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            optimizer.step(lambda: (net(x.float()).float() + 2).square().mean(), lower)
    assert abs(seen[-2] - seen[-1]) > 0.1  # v was pulled away from z


def test_tracker_starts_where_v_is_at_the_first_step():
    """Weights loaded after construction count."""
    u, v, optimizer = build(*start(), penalty="value")
    with torch.no_grad():
        v += 1.0
    moved = v.detach().clone()
    optimizer.step(*closures("curved", u, v, "auto"))
    tracker = optimizer.state_dict()["bilevel"]["tracker"][0]
    assert float((tracker - moved).norm()) < 0.1


def test_tracker_moves_by_the_lower_rule_with_its_options_and_hooks():
    """SGD with momentum under a clipping hook, by hand."""
    u, v = (t.requires_grad_() for t in start())
    rule = torch.optim.SGD([v], lr=0.1, momentum=0.5)
    optimizer = PenaltyBilevelOptimizer([u], rule, penalty="value", upper_lr=0.01)
    rule.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_([v], 0.5) and None)
    z, velocity = v.detach().clone(), torch.zeros(4)
    for _ in range(5):
        t = A @ z + C.T @ u.detach()
        velocity = 0.5 * velocity + t * min(1.0, float(0.5 / (t.norm() + 1e-6)))
        z = z - 0.1 * velocity
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v))
        close(optimizer.state_dict()["bilevel"]["tracker"][0], z, 1e-12)
    assert list(rule.state) == [v]


def test_a_rule_that_counts_in_its_groups_counts_each_step_once():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    u, v = (t.requires_grad_() for t in start())
    optimizer = PenaltyBilevelOptimizer([u], Counting([v], lr=0.1), penalty="value")
    for _ in range(3):
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v))
    assert optimizer.lower.param_groups[0]["count"] == 3


# Contract.


FORMULATIONS = ["value", "fixed_point"]


class Chain(Net):
    """The same data with a map: one damped gradient step on the loss, noisy by dropout."""

    def lower(self):
        if self.optimizer.penalty.name == "value":
            return super().lower()
        hidden = self.net(self.x[self.batch])
        pull = (self.weights[self.batch].sigmoid()[:, None] * hidden).mean()
        return tuple(0.5 * p + 0.1 * pull for p in self.net.parameters())


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_resume_is_bit_equal(penalty, at, tmp_path):
    whole = Chain(penalty, lower_steps=2).run(at)
    state = {
        "net": whole.net.state_dict(),
        "weights": whole.weights.detach(),
        "optimizer": whole.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    whole.run(5)
    resumed = Chain(penalty, lower_steps=2)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.net.load_state_dict(loaded["net"])
    with torch.no_grad():
        resumed.weights.copy_(loaded["weights"])
    resumed.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    resumed.run(5)
    assert torch.equal(whole.point(), resumed.point())
    assert torch.equal(whole.optimizer.adjoint[0], resumed.optimizer.adjoint[0])


@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_deepcopy_continues_bit_equally(penalty):
    one = Chain(penalty).run(3)
    two = copy.deepcopy(one)
    state = torch.get_rng_state()
    one.run(3)
    torch.set_rng_state(state)
    assert torch.equal(two.run(3).point(), one.point())


def test_checkpoints_of_another_formulation_are_refused():
    saved = Chain("fixed_point").run(1).optimizer.state_dict()
    for penalty in ("value", "stationarity"):
        with pytest.raises(ValueError, match="made with penalty 'fixed_point', this optimizer"):
            Chain(penalty).optimizer.load_state_dict(saved)


@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_groups_may_be_added_and_parameters_frozen(penalty):
    task = Chain(penalty).run(2)
    extra = torch.full((2,), 0.5, requires_grad=True)
    task.optimizer.add_param_group({"params": [extra], "level": "lower"})
    lower = task.lower

    def with_extra():
        value = lower()
        bent = 0.3 * extra + 0.1 * task.weights.sum()
        return (*value, bent) if penalty == "fixed_point" else value + (extra - bent).square().sum()

    task.lower = with_extra
    task.run(2)
    assert not torch.equal(extra.detach(), torch.full((2,), 0.5))
    frozen = task.net[0].weight
    frozen.requires_grad_(False)
    frozen.grad = None
    task.net.zero_grad()
    held = frozen.detach().clone()
    before = copy.deepcopy(task.optimizer.state_dict()["bilevel"])
    task.run(3)
    after = task.optimizer.state_dict()["bilevel"]
    assert torch.equal(frozen, held)
    for kept in ("multiplier", "tracker")[: 1 + (penalty == "value")]:
        assert torch.equal(before[kept][0], after[kept][0])
        assert not torch.equal(before[kept][1], after[kept][1])
    frozen.requires_grad_(True)
    task.run(1)
    assert not torch.equal(frozen.detach(), held)


@pytest.mark.parametrize("curvature", ["auto", "functional"])
def test_value_freezes_in_functional_mode_too(curvature):
    """With a frozen tensor both modes make the same step."""
    u, v = (t.requires_grad_() for t in start())
    held = torch.ones(4)
    optimizer = PenaltyBilevelOptimizer(
        [u], [held.requires_grad_(), v], penalty="value", curvature=curvature, lower_lr=0.05
    )
    held.requires_grad_(False)
    f = lambda a, b: quadratic_f(a[0], b[1] + 0.1 * b[0])  # noqa: E731
    g = lambda a, b: quadratic_g(a[0], b[1] + 0.1 * b[0])  # noqa: E731
    twin = ValueGapTwin(
        lambda a, b: quadratic_f(a, b + 0.1), lambda a, b: quadratic_g(a, b + 0.1), *start(), 0.05
    )
    twin.upper.lr = 1e-3
    for _ in range(4):
        if curvature == "functional":
            optimizer.step(f, g)
        else:
            optimizer.step(lambda: f((u,), (held, v)), lambda: g((u,), (held, v)))
        twin.step()
    close(v.detach(), twin.v)
    close(u.detach(), twin.u)
    assert torch.equal(held, torch.ones(4))


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("penalty", FORMULATIONS)
@pytest.mark.parametrize("warm", [0, 2])
def test_a_raising_closure_leaves_everything_untouched(penalty, lower_steps, warm):
    """At every call of either closure, the second call of a value evaluation included."""
    for fatal in range(1, 40):
        task = Chain(penalty, lower_steps=lower_steps).run(warm)
        before = everything(task), tracked(task)
        calls = 0

        def trap(closure, fatal=fatal):
            nonlocal calls
            calls += 1
            loss = closure()
            if calls == fatal:
                raise KeyError("stop")
            return loss

        try:
            task.optimizer.step(lambda: trap(task.upper), lambda: trap(task.lower))  # noqa: B023
        except KeyError:
            assert_unchanged(before[0], task)
            assert_same(before[1], tracked(task))
        else:
            break
    per_evaluation = 3 if penalty == "value" else 2
    assert calls == per_evaluation * lower_steps + (0 if warm else 2)


def tracked(task):
    own = task.optimizer.state_dict()["bilevel"]
    moments = [torch.as_tensor(x).clone() for m in own["moments"] for x in m.values()]
    return [t.clone() for t in own["tracker"]] + moments


def assert_same(before, after):
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lower_steps", [1, 3])
def test_a_hook_that_raises_in_the_trackers_step_undoes_it(lower_steps):
    task = Chain("value", lower_steps=lower_steps).run(2)
    before = everything(task), tracked(task)

    def stop(*_):
        raise KeyError("stop")

    handle = task.optimizer.lower.register_step_post_hook(stop)
    with pytest.raises(KeyError):
        task.optimizer.step(task.upper, task.lower)
    handle.remove()
    assert_unchanged(before[0], task)
    assert_same(before[1], tracked(task))
    task.run(1)


@pytest.mark.parametrize(
    ("penalty", "quantity", "call"),
    [
        ("value", "lower loss g", 1),
        ("value", r"lower loss g\(u, z\) at the tracker", 2),
        ("value", r"tracker residual grad_v g\(u, z\)", -2),
        ("fixed_point", "lower loss g", 1),
    ],
)
def test_a_non_finite_quantity_is_named_and_nothing_changes(penalty, quantity, call):
    task = Chain(penalty).run(3)
    before = everything(task), tracked(task)
    calls = 0

    def lower():
        nonlocal calls
        calls += 1
        value = task.lower()
        if calls != abs(call):
            return value
        if call < 0:  # finite with an infinite slope at this very point
            bias = task.net[4].bias
            return value + (bias - bias.detach()).square().pow(0.25).sum()
        bad = float("nan")
        return tuple(t * bad for t in value) if isinstance(value, tuple) else value * bad

    with pytest.raises(NonFiniteError, match=f"{quantity} is not finite in step 4"):
        task.optimizer.step(task.upper, lower)
    assert_unchanged(before[0], task)
    assert_same(before[1], tracked(task))


def test_value_reduces_two_shards_to_one_batch():
    """Every term is linear in the data: averaged shards are the whole batch."""
    x, y = normal(8, 4, seed=61), normal(8, seed=62)

    def losses(rows):
        def f(u, v):
            return (x[rows] @ v - y[rows]).square().mean() + u @ u

        def g(u, v):
            return (x[rows] @ v - u.sum()).square().mean() + 0.1 * v @ v

        return f, g

    whole = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    f, g = losses(slice(None))
    for _ in range(5):
        whole[2].step(lambda: f(*whole[:2]), lambda: g(*whole[:2]))
    tape = []
    for shard in (slice(0, 4), slice(4, 8)):
        u, v, optimizer = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
        recorded = []
        optimizer.reduce = lambda tensors: recorded.append(tensors) or tensors  # noqa: B023
        f, g = losses(shard)
        optimizer.step(lambda: f(u, v), lambda: g(u, v))  # noqa: B023
        tape.append(recorded)
    # One reduction per evaluation, and its average is the whole batch's.
    assert [len(t) for t in tape] == [1, 1]
    u, v, optimizer = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    optimizer.reduce = lambda _: tuple((a + b) / 2 for a, b in zip(tape[0][0], tape[1][0]))  # noqa: B905
    optimizer.step(lambda: f(u, v), lambda: g(u, v))
    one = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    f, g = losses(slice(None))
    one[2].step(lambda: f(*one[:2]), lambda: g(*one[:2]))
    close(u.detach(), one[0].detach())
    close(v.detach(), one[1].detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0}, "weight must be > 0, got 0"),
        ({"weight": math.inf}, "weight must be > 0, got inf"),
        ({"growth": -1}, "growth must be >= 0, got -1"),
        ({"cap": 0.5}, "cap must be >= 1, got 0.5"),
        ({"cap": math.nan}, "cap must be >= 1, got nan"),
    ],
)
def test_value_option_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ValueGap(**arguments)


def test_fixed_point_takes_the_rules_of_stationarity_and_leaves_them_as_they_were():
    rule = LeastSquares(share=0.1)
    FixedPoint(rule)
    Stationarity(rule)
    assert rule._least_curvature == 0.0
    with pytest.raises(ValueError, match="multiplier must be one of"):
        FixedPoint("newton")
    ends = []
    for multiplier in ("least_squares", LeastSquares(share=0.0), "paper"):
        u, v, optimizer = build(*start(), penalty=FixedPoint(multiplier))
        for _ in range(3):
            optimizer.step(*wrap(target_f, curved_phi, u, v, "auto"))
        ends.append(v.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_value_from_an_exact_lower_solution_still_moves():
    """grad_v g = 0 at the start gives no scale for gamma, and f sees u only through v."""
    u, v, optimizer = build(
        torch.zeros(3), torch.zeros(4), penalty="value", upper_lr=0.02, lower_lr=0.02
    )
    for _ in range(50):
        optimizer.step(lambda: (v - 0.5).square().sum(), lambda: quadratic_g(u, v))
    assert float(u.detach().norm()) > 0.1
    assert bool(torch.isfinite(optimizer.metrics.penalty_weight))
