"""``HypergradientOptimizer``: every method live, loops, checkpoints, and steps that fail."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from memory import peak_bytes
from problems import normal, spd
from torch import Tensor, nn
from torch.testing import assert_close

from torch_penalty_bilevel import (
    HypergradientOptimizer,
    NondeterministicClosureError,
    NonFiniteError,
    UnusedParameterError,
    testing,
)
from torch_penalty_bilevel.constraints import Box, Inequality

SOLVERS = ("cg", "cg_normal", "neumann", "fixed_point", "stochastic", "approx_grad")
METHODS = (*SOLVERS, "reverse", "one_step", "alternating")


class Quadratic:
    """Dense and small: v*(u), H, J and the slopes are matrices here."""

    def __init__(self, seed: int = 0) -> None:
        self.A, self.C = spd(4, seed, 5.0), normal(3, 4, seed=seed + 1)
        self.target, self.offset = normal(4, seed=seed + 2), normal(3, seed=seed + 3)

    def f(self, u: Tensor, v: Tensor) -> Tensor:
        return (v - self.target).square().sum() / 2 + (u - self.offset).square().sum() / 2

    def g(self, u: Tensor, v: Tensor) -> Tensor:
        return v @ self.A @ v / 2 + u @ self.C @ v

    def residual(self, u: Tensor, v: Tensor) -> Tensor:
        return self.A @ v + self.C.T @ u

    def exact(self, u: Tensor) -> Tensor:
        slope = -torch.linalg.solve(self.A, self.C.T @ u) - self.target
        return u - self.offset - self.C @ torch.linalg.solve(self.A, slope)


class Run:
    """Live tensors with an optimizer over them."""

    def __init__(self, problem: Any = None, lr: float = 0.1, **options: Any) -> None:
        self.problem = problem or Quadratic()
        self.u = normal(3, seed=8).requires_grad_()
        self.v = normal(4, seed=9).requires_grad_()
        upper = torch.optim.SGD([self.u], lr=options.pop("upper_lr", 0.05))
        lower = torch.optim.SGD([self.v], lr=lr, momentum=options.pop("momentum", 0.0))
        self.optimizer = HypergradientOptimizer(upper, lower, **options)
        self.closures = (
            lambda: self.problem.f(self.u, self.v),
            lambda: self.problem.g(self.u, self.v),
        )

    def step(self, times: int = 1) -> Tensor:
        for _ in range(times):
            loss = self.optimizer.step(*self.closures)
        return loss


# One step.


@pytest.mark.parametrize(
    ("method", "curvature"),
    [(method, "auto") for method in (*SOLVERS, "reverse")]
    # One solver and one unrolled method are enough for the second engine.
    + [("cg_normal", "functional"), ("reverse", "functional")],
)
@pytest.mark.parametrize(
    "name",
    ["quadratic", "scalar_ridge", "feature_ridge", "weighted_cleaning", "minimax", "fixed_point"],
)
def test_closed_forms(name: str, method: str, curvature: str) -> None:
    problem = testing.get(name)
    u, v = (t.requires_grad_() for t in problem.start(torch.Generator().manual_seed(0)))
    is_map = problem.lower_map is not None
    lower = problem.lower_map or problem.lower_loss
    rate = 1.0
    if not is_map:
        hessian = torch.func.hessian(problem.lower_loss, argnums=1)(u.detach(), v.detach())
        rate = 1 / float(torch.linalg.matrix_norm(hessian, 2))
    options: dict[str, Any] = {"inner_iterations": 3000} if method in SOLVERS else {}
    optimizer = HypergradientOptimizer(
        [u],
        torch.optim.SGD([v], lr=rate),
        upper_lr=0.0,
        method=method,
        lower_steps=300,  # the contraction is 0.9 or less: 2e-14
        lower_is_map=is_map,
        curvature=curvature,
        **options,
    )
    if curvature == "functional":
        pair = (lambda u, v: problem.upper_loss(u[0], v[0]), lambda u, v: _packed(lower, u, v))
    else:
        pair = (lambda: problem.upper_loss(u, v), lambda: lower(u, v))
    loss = optimizer.step(*pair)
    # 1e-10 (where the adjoint solve stops) times ||J A^{-1}||, which is below 100 here.
    assert_close(u.grad, problem.exact_hypergradient(u.detach()), rtol=0, atol=1e-8)
    assert_close(v.detach(), problem.best_lower(u.detach()), rtol=0, atol=1e-9)
    assert_close(loss, problem.upper_loss(u, v).detach(), rtol=1e-12, atol=1e-14)
    assert float(optimizer.metrics.residual_norm) < 1e-9
    assert float(optimizer.metrics.adjoint_residual_norm) < 1e-8


def _packed(lower: Any, u: Any, v: Any) -> Any:
    value = lower(u[0], v[0])
    return value if value.dim() == 0 else (value,)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_the_truth(method: str) -> None:
    run = Run(method=method, lower_steps=2, upper_lr=0.0, step_size=None)
    run.step()
    p, u, v = run.problem, run.u.detach(), run.v.detach()
    (q,), m = run.optimizer.adjoint, run.optimizer.metrics
    assert_close(m.upper_loss, p.f(u, v), rtol=1e-13, atol=0)
    assert_close(m.lower_loss, p.g(u, v), rtol=1e-13, atol=0)
    assert float(m.residual_norm) == pytest.approx(float(p.residual(u, v).norm()), rel=1e-12)
    certificate = float((v - p.target + p.A @ q).norm())
    assert float(m.adjoint_residual_norm) == pytest.approx(certificate, rel=1e-9, abs=1e-12)
    assert float(m.upper_grad_norm) == pytest.approx(float(run.u.grad.norm()), rel=1e-12)
    assert_close(run.u.grad, u - p.offset + p.C @ q, rtol=1e-12, atol=1e-13)
    assert float(m.penalty_weight) == float(m.damping) == 0


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        # f and its gradient 1, g linearised at the end 1, lower steps 2: 4, and then
        ("alternating", {}, 4),
        ("one_step", {}, 5),  # J q and H q in one product
        ("reverse", {}, 9),  # linearise and product per step, and the certificate
        ("reverse", {"truncation": 1}, 7),
        ("fixed_point", {"inner_iterations": 3}, 7),  # the last product also gives J q
        ("neumann", {"inner_iterations": 3}, 8),  # one more to confirm the residual
        ("cg", {"inner_iterations": 2}, 7),
        ("cg_normal", {"inner_iterations": 2}, 7),
        ("stochastic", {"inner_iterations": 2, "samples": 3}, 4 + 2 * 9 + 2 * 3 + 1),
    ],
)
def test_gradient_evaluations(method: str, options: Any, count: int) -> None:
    run = Run(method=method, lower_steps=2, **options)
    run.step()
    assert run.optimizer.metrics.gradient_evaluations == count
    run.optimizer.warm_start = False
    run.step()
    assert run.optimizer.metrics.gradient_evaluations == 2 * count


# Several steps against a plain loop on matrices.


def twin(run: Run, method: str, steps: int, T: int, K: int, warm: str) -> tuple[Tensor, Tensor]:
    p, u, v = run.problem, run.u.detach().clone(), run.v.detach().clone()
    lr, first, q = 0.1, v.clone(), torch.zeros(4)
    I = torch.eye(4)  # noqa: E741
    for _ in range(steps):
        v = v if warm in ("both", "lower") else first
        q = q if warm in ("both", "adjoint") else torch.zeros(4)
        for _ in range(T):
            v = v - lr * p.residual(u, v)
        slope = v - p.target
        if method == "fixed_point" or method == "stochastic":
            for _ in range(K):
                q = q - lr * (p.A @ q + slope)
        elif method == "neumann":
            left = slope + p.A @ q
            terms = [torch.linalg.matrix_power(I - lr * p.A, k) for k in range(K + 1)]
            q = q - lr * sum(terms) @ left
        elif method == "approx_grad":
            for _ in range(K // 2):
                s = p.A @ (p.A @ q + slope)
                q = q - (s @ s) / (p.A @ s).square().sum() * s
        elif method == "cg_normal":
            q = krylov_best(p.A, slope, q, K // 2, normal_equations=True)
        elif method == "cg":
            q = krylov_best(p.A, slope, q, K, normal_equations=False)
        elif method == "reverse":
            q = -lr * sum(torch.linalg.matrix_power(I - lr * p.A, k) for k in range(T)) @ slope
        elif method == "one_step":
            q = -lr * slope
        else:
            q = torch.zeros(4)
        u = u - 0.05 * (u - p.offset + p.C @ q)
    return u, v


def krylov_best(A: Tensor, slope: Tensor, q: Tensor, k: int, normal_equations: bool) -> Tensor:
    """What conjugate gradients minimise, by a dense solve on an orthogonal Krylov basis."""
    M = A @ A if normal_equations else A
    left = -(A @ q + slope)
    left = A @ left if normal_equations else left
    basis = torch.linalg.qr(
        torch.stack([torch.linalg.matrix_power(M, j) @ left for j in range(k)], 1)
    ).Q
    return q + basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ left)


@pytest.mark.parametrize("warm", ["both", "lower", "adjoint", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_loops_are_those_of_the_plain_twin(method: str, warm: str) -> None:
    T, K = 3, 2 if method in ("cg", "cg_normal", "approx_grad") else 4
    option = {"both": True, "none": False}.get(warm, warm)
    count = {"inner_iterations": K} if method in SOLVERS else {}
    run = Run(method=method, lower_steps=T, warm_start=option, **count)
    expected = twin(run, method, 4, T, K, warm)
    run.step(4)
    assert_close(run.u.detach(), expected[0], rtol=1e-10, atol=1e-12)
    assert_close(run.v.detach(), expected[1], rtol=1e-10, atol=1e-12)


def test_a_cold_start_forgets_the_moments_of_the_lower_rule() -> None:
    run = Run(method="cg", lower_steps=3, warm_start=False, momentum=0.9, upper_lr=0.0)
    run.step()
    first = run.v.detach().clone()
    run.step()
    assert torch.equal(run.v.detach(), first)
    run.optimizer.warm_start = True
    run.step()
    assert not torch.equal(run.v.detach(), first)


def test_counts_may_grow_with_the_step() -> None:
    calls = []
    run = Run(
        method="fixed_point",
        lower_steps=lambda k: calls.append(k) or k + 1,
        inner_iterations=lambda k: 2 * k + 1,
    )
    run.step(3)
    assert calls == [0, 1, 2]
    # Per step: T lower steps, f, g linearised, K products, and one for a start that is not zero.
    expected = sum((k + 1) + 2 + (2 * k + 1) + (k > 0) for k in range(3))
    assert run.optimizer.metrics.gradient_evaluations == expected
    run.optimizer.lower_steps = lambda k: 0
    with pytest.raises(ValueError, match="lower_steps must be an integer >= 1, got 0"):
        run.step()


def test_linear_optimizer() -> None:
    """ApproxGrad with Adam, whose steps stay about lr long: it comes that near."""
    lr = 2e-3
    make = lambda q: torch.optim.Adam(q, lr=lr)  # noqa: E731
    run = Run(method="approx_grad", linear_optimizer=make, inner_iterations=30, lower_steps=20)
    near = 5.0 * 2 * lr  # ||A|| times lr for each of four unknowns
    run.step()
    assert float(run.optimizer.metrics.adjoint_residual_norm) > 5 * near
    run.step(150)
    assert float(run.optimizer.metrics.adjoint_residual_norm) < near


# Maps.


@pytest.mark.parametrize("curvature", ["auto", "double_backward"])
def test_a_map_with_several_tensors_and_names(curvature: str) -> None:
    u = torch.tensor([0.4], requires_grad=True)
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(0.3 * normal(2, 2, seed=1))

    def phi() -> dict[str, Tensor]:
        mixed = torch.tanh(0.5 * layer.weight.T @ layer.bias.outer(layer.bias) + u)
        return {"weight": mixed, "bias": 0.5 * layer.bias.flip(0) * u + layer.weight[0]}

    optimizer = HypergradientOptimizer(
        [u],
        torch.optim.SGD(layer.named_parameters(), lr=1.0),
        upper_lr=0.0,
        method="cg_normal",
        lower_steps=200,
        inner_iterations=100,
        lower_is_map=True,
        curvature=curvature,
    )
    f = lambda: layer.weight.sum() + layer.bias.square().sum()  # noqa: E731
    optimizer.step(f, phi)
    assert float(optimizer.metrics.residual_norm) < 1e-12

    def value(shift: float) -> float:
        with torch.no_grad():
            u.add_(shift)
            for _ in range(300):
                for name, new in phi().items():
                    getattr(layer, name).copy_(new)
            u.sub_(shift)
            return float(f())

    # h^2 = 1e-12 and eps / h = 2e-10, times third derivatives and values of the order of 100.
    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(u.grad) == pytest.approx(difference, abs=1e-7)


# Randomness and buffers.


class Noisy:
    """A network with dropout on batches drawn by torch's generator."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.X, self.y = torch.randn(40, 3), torch.randn(40, 1)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.u = torch.tensor(-1.0, requires_grad=True)
        self.rule = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer = HypergradientOptimizer([self.u], self.rule, upper_lr=0.0, **options)

    def f(self) -> Tensor:
        return self.net(self.X[:5]).square().sum()

    def g(self) -> Tensor:
        rows = torch.randint(0, 40, (8,))
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.net(self.X[rows]) - self.y[rows]).square().mean() + self.u.exp() * decay


def test_reverse_repeats_batches_and_dropout_masks() -> None:
    """Autograd through the same steps with the same draws."""
    noisy = Noisy(method="reverse", lower_steps=4)
    noisy.optimizer._dependence_checked = True  # it draws nothing, but keep the draws simple
    state, start = torch.get_rng_state(), copy.deepcopy(noisy.net.state_dict())
    noisy.optimizer.step(noisy.f, noisy.g)
    reached = [p.detach().clone() for p in noisy.net.parameters()]

    noisy.net.load_state_dict(start)
    torch.set_rng_state(state)
    names = [name for name, _ in noisy.net.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in noisy.net.parameters()]

    def called(x: Tensor) -> Tensor:
        return torch.func.functional_call(noisy.net, dict(zip(names, values, strict=True)), (x,))

    for _ in range(4):
        rows = torch.randint(0, 40, (8,))
        fit = (called(noisy.X[rows]) - noisy.y[rows]).square().mean()
        loss = fit + noisy.u.exp() * sum(p.square().sum() for p in values)
        slopes = torch.autograd.grad(loss, values, create_graph=True)
        values = [v - 0.1 * s for v, s in zip(values, slopes, strict=True)]
    for mine, other in zip(reached, values, strict=True):
        assert_close(mine, other.detach(), rtol=1e-12, atol=1e-14)
    loss = called(noisy.X[:5]).square().sum()
    (expected,) = torch.autograd.grad(loss, noisy.u)
    assert_close(noisy.u.grad, expected, rtol=1e-10, atol=1e-13)


def test_reverse_refuses_data_it_cannot_repeat() -> None:
    rows = iter(normal(100, 4, seed=1))
    run = Run(method="reverse", lower_steps=3)
    before = run.v.detach().clone()
    closure = lambda: run.problem.g(run.u, run.v) + next(rows) @ run.v  # noqa: E731
    with pytest.raises(NondeterministicClosureError, match="repeats"):
        run.optimizer.step(run.closures[0], closure)
    assert torch.equal(run.v.detach(), before)


def test_reverse_refuses_steps_that_are_not_plain() -> None:
    run = Run(method="reverse", lower_steps=2, momentum=0.9)
    with pytest.raises(ValueError, match="without momentum"):
        run.step()
    run = Run(method="reverse", lower_steps=2)
    clip = lambda *_: nn.utils.clip_grad_norm_([run.v], 1e-3) and None  # noqa: E731
    run.optimizer.lower.register_step_pre_hook(clip)
    with pytest.raises(ValueError, match="hooks"):
        run.step()
    u, v = torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)
    assert isinstance(HypergradientOptimizer([u], [v], method="reverse").lower, torch.optim.SGD)
    assert isinstance(HypergradientOptimizer([u], [v]).lower, torch.optim.Adam)


def test_memory_of_reverse_is_that_of_the_iterates() -> None:
    v = normal(20, seed=1).requires_grad_()
    u = torch.tensor(0.3, requires_grad=True)
    grid = torch.linspace(0, 1, 2000)[:, None]

    def run(steps: int) -> None:
        rule = torch.optim.SGD([v], lr=0.01)
        optimizer = HypergradientOptimizer(
            [u], rule, upper_lr=0.0, method="reverse", lower_steps=steps
        )
        optimizer._dependence_checked = True
        optimizer.step(lambda: v.square().sum(), lambda: torch.tanh(grid * v + u).square().mean())

    run(2)
    few, many = peak_bytes(lambda: run(5)), peak_bytes(lambda: run(25))
    iterate, activation = 20 * 8, 2000 * 20 * 8
    assert few > 2 * activation
    # Per step an iterate, a 0-d loss and the state of torch's generator (about 5 kB).
    generator = torch.get_rng_state().numel()
    assert many - few <= 20 * (iterate + generator + 256)
    assert 20 * (iterate + generator + 256) < activation


def test_stochastic_draws_a_batch_for_every_product() -> None:
    draws = []
    run = Run(method="stochastic", lower_steps=2, inner_iterations=3, samples=1)
    run.closures = (run.closures[0], lambda: draws.append(0) or run.problem.g(run.u, run.v))
    run.optimizer._dependence_checked = True
    run.step()
    # 2 lower steps, one linearisation for the certificate, 1 + 3 products, 1 for J q.
    assert len(draws) == 2 + 1 + 4 + 1


@pytest.mark.parametrize("method", ["cg", "reverse", "stochastic"])
def test_batch_norm_moves_once_per_step(method: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(16, 3) + 1
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    u = torch.tensor(0.0, requires_grad=True)
    rule = torch.optim.SGD(net.parameters(), lr=0.01)
    options = {} if method == "reverse" else {"damping": 1.0, "inner_iterations": 3}
    optimizer = HypergradientOptimizer([u], rule, method=method, lower_steps=3, **options)
    fresh = copy.deepcopy(net)
    fresh(X)  # what one forward pass does

    def g() -> Tensor:
        return net(X).square().mean() + u.exp() * sum(p.square().sum() for p in net.parameters())

    optimizer.step(lambda: (net(X) - 1).square().mean(), g)
    assert_close(net[1].running_mean, fresh[1].running_mean)
    assert int(net[1].num_batches_tracked) == 1


# Torch's contract.


def test_groups_schedulers_hooks_and_new_groups() -> None:
    run = Run(method="cg", lower_steps=2)
    optimizer = run.optimizer
    assert [g["level"] for g in optimizer.param_groups] == ["upper", "lower"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    run.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.05]
    assert seen == [1]
    w = torch.zeros(2, requires_grad=True)
    optimizer.add_param_group({"params": [w], "level": "lower", "lr": 0.1})
    run.closures = (
        lambda: run.problem.f(run.u, run.v) + (w - 1).square().sum(),
        lambda: run.problem.g(run.u, run.v) + (w - run.u[:2]).square().sum(),
    )
    run.step()
    assert [t.shape for t in optimizer.adjoint] == [run.v.shape, w.shape]
    assert bool((w != 0).all())


def test_frozen_lower_parameters_stay() -> None:
    run = Run(method="cg", lower_steps=2)
    w = torch.ones(2, requires_grad=True)
    run.optimizer.add_param_group({"params": [w], "level": "lower", "lr": 0.1})
    w.requires_grad_(False)
    run.step(2)
    assert torch.equal(w, torch.ones(2))
    assert torch.equal(run.optimizer.adjoint[1], torch.zeros(2))
    assert bool((run.optimizer.adjoint[0] != 0).all())


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_resuming_is_bit_equal(how: str, warm_start: bool) -> None:
    options = {"method": "fixed_point", "lower_steps": 2, "warm_start": warm_start}
    whole = Run(momentum=0.5, **options)
    whole.step(3)
    if how == "state_dict":
        part = Run(momentum=0.5, **options)
        buffer = io.BytesIO()
        torch.save(whole.optimizer.state_dict(), buffer)
        with torch.no_grad():
            part.u.copy_(whole.u)
            part.v.copy_(whole.v)
        buffer.seek(0)
        part.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        part = copy.copy(whole)
        duplicate = copy.deepcopy(whole.optimizer)
        if how == "pickle":
            duplicate = pickle.loads(pickle.dumps(whole.optimizer))
        part.optimizer = duplicate
        (part.u,), (part.v,) = (g["params"] for g in duplicate.param_groups)
        part.closures = (
            lambda: part.problem.f(part.u, part.v),
            lambda: part.problem.g(part.u, part.v),
        )
    whole.step(3)
    part.step(3)
    assert torch.equal(whole.u, part.u)
    assert torch.equal(whole.v, part.v)
    assert torch.equal(whole.optimizer.adjoint[0], part.optimizer.adjoint[0])
    a, b = (r.optimizer.metrics.gradient_evaluations for r in (whole, part))
    assert a == b


def test_a_checkpoint_of_another_method_is_refused() -> None:
    run, other = Run(method="cg"), Run(method="neumann")
    with pytest.raises(ValueError, match="made with method 'cg'"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())


# All or nothing.


def snapshot(run: Run) -> list[Any]:
    state = run.optimizer.state_dict()
    flat = torch.utils._pytree.tree_leaves(state)
    kept = [t.clone() if isinstance(t, Tensor) else t for t in flat]
    metrics = run.optimizer.metrics
    return [run.u.detach().clone(), run.v.detach().clone(), torch.get_rng_state(), metrics, *kept]


def same(left: list[Any], right: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b

    return len(left) == len(right) and all(map(equal, left, right))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("failure", ["raise", "nan"])
def test_a_failing_step_changes_nothing(method: str, warm_start: bool, failure: str) -> None:
    """Fail at every single call of either closure in turn."""
    run = Run(method=method, lower_steps=2, momentum=0.0, warm_start=warm_start)
    run.step(2)
    good, failed = run.closures, 0
    for doomed in range(1, 40):
        calls = [0]

        def guarded(closure: Any, calls: list[int] = calls, doomed: int = doomed) -> Any:
            def call() -> Tensor:
                calls[0] += 1
                torch.rand(())
                if calls[0] == doomed:
                    if failure == "raise":
                        raise KeyError("doomed")
                    return closure() * float("nan")
                return closure()

            return call

        before = snapshot(run)
        message = ""
        try:
            run.optimizer.step(*map(guarded, good))
        except (KeyError, NonFiniteError) as error:
            message = str(error)
        if not message:
            break
        failed += 1
        assert same(before, snapshot(run)), doomed
        assert ("doomed" if failure == "raise" else "in step 3; nothing was changed") in message
    assert failed >= 3
    assert failed == calls[0]


def test_an_upper_rule_that_raises_undoes_the_step() -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("upper")

    for warm_start in (True, False):
        run = Run(method="cg", warm_start=warm_start)
        handle = run.optimizer.upper.register_step_pre_hook(refuse)
        before = snapshot(run)
        with pytest.raises(KeyError, match="upper"):
            run.step()
        assert same(before, snapshot(run))
        handle.remove()
        run.step()
        assert run.optimizer.state_dict()["bilevel"]["steps"] == 1


def test_a_breakdown_of_the_solver_is_an_error() -> None:
    run = Run(method="cg")
    run.problem.A = -run.problem.A
    before = snapshot(run)
    with pytest.raises(NonFiniteError, match=r"adjoint: curvature .* in step 1; nothing was"):
        run.step()
    assert same(before, snapshot(run))
    run = Run(method="fixed_point", step_size=10.0)
    with pytest.raises(NonFiniteError, match="diverged"):
        run.step()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "forward"}, ValueError, "functional.hypergradient"),
        ({"method": "magic"}, ValueError, "method must be one of"),
        ({"truncation": 2}, ValueError, "truncation=2 has no effect with method='cg'"),
        ({"method": "reverse", "inner_iterations": 2}, ValueError, "inner_iterations=2 has no"),
        ({"lower_steps": 0}, ValueError, "lower_steps must be an integer >= 1"),
        ({"inner_iterations": 1.5}, ValueError, "inner_iterations must be an integer >= 1"),
        ({"warm_start": "both"}, ValueError, "warm_start must be"),
        ({"lower_is_map": True, "curvature": "finite_difference"}, ValueError, "transposed"),
        ({"upper_constraint": Inequality(lambda: 0)}, ValueError, "projection"),
        ({"upper_constraint": Box(5, 6)}, ValueError, "starts outside"),
        ({"damping": -1.0}, ValueError, "damping must be >= 0"),
    ],
)
def test_construction_errors(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Run(**options)


def test_unused_upper_parameters_are_named() -> None:
    run = Run(method="cg")
    w = torch.zeros(2, requires_grad=True)
    run.optimizer.add_param_group({"params": [w], "level": "upper"})
    with pytest.raises(UnusedParameterError, match=r"upper\[1\]"):
        run.step()
    run = Run(method="alternating")
    run.closures = (lambda: run.v.square().sum(), run.closures[1])
    with pytest.raises(UnusedParameterError, match="follows grad_u f alone"):
        run.step()


def test_reduce_averages_everything() -> None:
    """Workers with half of each loss, and a reduction that doubles, are one worker."""
    for method in METHODS:
        one = Run(method=method, lower_steps=2)
        half = Run(method=method, lower_steps=2, reduce=lambda ts: tuple(2 * t for t in ts))
        f, g = half.closures
        half.closures = (lambda f=f: f() / 2, lambda g=g: g() / 2)
        one.step(3)
        half.step(3)
        assert_close(one.u, half.u, rtol=1e-12, atol=1e-13)
        assert_close(one.v, half.v, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_lower_precision(method: str, dtype: torch.dtype) -> None:
    exact, low = Run(method=method, lower_steps=3), Run(method=method, lower_steps=3)
    exact.step()
    u, v = (t.detach().to(dtype).requires_grad_() for t in (normal(3, seed=8), normal(4, seed=9)))
    rules = torch.optim.SGD([u], lr=0.05), torch.optim.SGD([v], lr=0.1)
    p = low.problem
    for name in ("A", "C", "target", "offset"):
        setattr(p, name, getattr(p, name).to(dtype))
    optimizer = HypergradientOptimizer(*rules, method=method, lower_steps=3)
    optimizer.step(lambda: p.f(u, v), lambda: p.g(u, v))
    assert u.grad.dtype == dtype
    # A few hundred roundings, times the condition number 5.
    slack = 100 * torch.finfo(dtype).eps
    assert_close(u.grad.double(), exact.u.grad, rtol=slack, atol=slack)


# Rates, in small.


def test_without_a_warm_start_accuracy_is_bought_by_iterations_with_one_it_is_free() -> None:
    """Grazzi et al. (2020): AID errs by O(q^T + q^K); a warm start carries it to zero."""

    def final(**options: Any) -> float:
        run = Run(method="fixed_point", lr=0.3, upper_lr=0.05, **options)
        run.step(400)
        return float(run.problem.exact(run.u.detach()).norm())

    q = 1 - 0.3 * 1.0  # ||I - lr A||, eigenvalues of A between 1 and 5: max(0.7, 0.5)
    biases = [final(lower_steps=k, inner_iterations=k, warm_start=False) for k in (5, 10, 20)]
    for shorter, longer, k in zip(biases, biases[1:], (5, 10), strict=False):
        # The bias shrinks by q^k from k to 2k iterations, T q^T at the worst.
        assert longer < 3 * q**k * shorter
        assert longer > 1e-3 * q**k * shorter
    assert final(lower_steps=5, inner_iterations=5) < 1e-9
    growing = final(
        lower_steps=lambda k: 2 + k // 4, inner_iterations=lambda k: 2 + k // 4, warm_start=False
    )
    assert growing < 1e-9


def test_projected_hypergradient_descent_ends_at_a_constrained_solution() -> None:
    run = Run(method="cg", lr=0.3, lower_steps=10, upper_constraint=Box(-2.0, 2.0))
    run.problem.offset = torch.tensor([10.0, 0.0, -10.0])
    free = Run(method="cg", lr=0.3, lower_steps=10)
    free.problem.offset = run.problem.offset
    run.step(300)
    free.step(300)
    u = run.u.detach()
    assert float(free.u.detach().abs().max()) > 2.5  # the bounds matter
    assert float(u.abs().max()) <= 2
    # Stationary: a projected step of the exact hypergradient stays where it is.
    moved = (u - run.problem.exact(u)).clamp(-2, 2)
    assert_close(moved, u, rtol=0, atol=1e-8)
    assert bool((u.abs() == 2).any())


def test_stochastic_bilevel_gradient_with_and_without_warm_start() -> None:
    """BSGM on batches: with a warm start and decreasing steps the iterates settle near u*."""
    X, noise = normal(200, 4, seed=1), normal(200, 4, seed=2)
    target, C = normal(4, seed=3), normal(3, 4, seed=4)

    def run(warm: bool, steps: int, T: int) -> float:
        torch.manual_seed(0)
        u, v = torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)
        rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=0.1)
        optimizer = HypergradientOptimizer(
            *rules, method="stochastic", lower_steps=T, inner_iterations=T, warm_start=warm
        )
        # Without a warm start v has as far to go in every step: only u's steps decrease.
        decreasing = optimizer if warm else optimizer.upper
        scheduler = torch.optim.lr_scheduler.LambdaLR(decreasing, lambda k: 20 / (20 + k))

        def g() -> Tensor:
            rows = torch.randint(0, 200, (16,))
            fit = ((v - noise[rows]).square() * X[rows].square()).sum(1).mean() / 2
            return fit + v.square().sum() / 2 - u @ C @ v

        def f() -> Tensor:
            rows = torch.randint(0, 200, (16,))
            return (v - target - noise[rows]).square().sum(1).mean() / 2 + u.square().sum() / 2

        for _ in range(steps):
            optimizer.step(f, g)
            scheduler.step()
        # The closed form: diagonal lower Hessian D, v* = D^{-1}(s + C'u).
        D = X.square().mean(0) + 1
        s, goal = (X.square() * noise).mean(0), target + noise.mean(0)
        S = C / D
        best = torch.linalg.solve(torch.eye(3) + S @ S.T, S @ (goal - s / D))
        return float((u.detach() - best).norm() / best.norm())

    warm, cold, hasty = run(True, 600, 1), run(False, 100, 30), run(False, 100, 1)
    # Noise of batches of 16 with steps down to 1/30 of 0.1, or 30 steps of 0.1 from zero.
    assert warm < 0.15
    assert cold < 0.15
    assert hasty > 2 * max(warm, cold)  # one step from zero: biased towards v = 0, q = 0
