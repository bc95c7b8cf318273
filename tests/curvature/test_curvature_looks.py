"""When "auto" looks at both engines, what it must not choose, and how it comes back."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import pytest
import torch
from choosing import Task, Zigzag, normalised
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import Automatic, DoubleBackward
from torch_penalty_bilevel.curvature.alarm import Alarm
from torch_penalty_bilevel.tensors import Pair

FIRST, PERIOD = Automatic._FIRST, Automatic._PERIOD


def with_kink(layer: nn.Module) -> nn.Sequential:
    return normalised().insert(3, layer)


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.ReLU(), "Relu"), (nn.LeakyReLU(), "LeakyRelu"), (nn.Hardtanh(-2, 2), "Hardtanh")],
)
def test_kinks_are_never_left_to_differences_by_choice(layer, name) -> None:
    """One lucky look chose them for 500 evaluations in which they were off by 70 times ||H q||."""
    task = Task(with_kink(layer))
    task.run(4 * FIRST)
    assert not task.engine.switched
    assert name in task.engine.reason
    assert task.lower_calls == 4 * FIRST  # no look evaluates


def test_looks_come_at_doubling_distances() -> None:
    task = Task(normalised())
    due = [FIRST]
    while due[-1] < 3 * PERIOD:
        due.append(due[-1] + min(FIRST * 2 ** len(due), PERIOD))
    looks: list[int] = []
    at, q = task_point(task)
    for number in range(1, due[-1]):
        task.engine._evaluations = number - 1
        before = task.engine._next_look
        if number in (due[0], *due) or number % 97 == 0:
            task.engine.linearise(lambda *_: task.g(), at).product(q)
        if task.engine._next_look != before:
            looks.append(number)
        task.engine._works = True
    assert looks == due[:-1]


def task_point(task: Task) -> tuple[Pair, tuple[Tensor, ...]]:
    at = Pair((task.scores,), tuple(task.net.parameters()))
    torch.manual_seed(2)
    return at, tuple(torch.randn_like(v) for v in at.lower)


def test_alarm_against_its_definition() -> None:
    alarm, a, s = Alarm(), 0.0, 0.0
    ratios: list[float] = []
    for step in range(200):
        size = 0.5 if step < 120 else 0.5 * 1.05 ** (step - 120)
        alarm = alarm.after(size, 2.0)
        a, s = 0.9 * a + 0.1 * size**2, 0.9 * s + 0.1 * 4.0
        ratios.append(math.sqrt(a / s))
        least = min(ratios[10:], default=math.inf)  # settled by then
        assert_close(alarm.least, least, rtol=1e-12, atol=0)
        assert alarm.rings == (step >= 50 and ratios[-1] > 3 * least), step
    assert alarm.rings
    assert not alarm.reset().rings


def test_alarm_keeps_still_below_what_a_difference_promises_and_without_a_slope() -> None:
    small = Alarm()
    for step in range(200):
        small = small.after(1e-6 * 1.05**step, 1.0)  # ends at 0.016: no worse than 1 %
    assert not small.rings
    off = Alarm()
    for _ in range(200):
        off = off.after(1.0, 0.0)
    assert not off.rings


def test_a_growing_certificate_brings_the_look_forward_and_double_backward_back() -> None:
    """A loss that turns wild between two looks: no difference sees the curvature of sin(1e4 z)."""

    class Wild(nn.Module):
        size = 0.0

        def forward(self, z: Tensor) -> Tensor:
            return z + self.size * torch.sin(1e4 * z)

    wild = Wild()
    task = Task(normalised().insert(3, wild)).run(FIRST)
    engine = task.engine
    assert engine.switched
    at, q = task_point(task)
    engine._evaluations, engine._next_look = 200, 600
    for _ in range(60):
        engine.observe(0.5, 1.0)
    assert engine._next_look == 600
    wild.size = 1e-2
    for _ in range(20):
        engine.observe(5.0, 1.0)
    product = engine.linearise(lambda *_: task.g(), at).product(q)
    assert engine._evaluations == 201
    assert not engine.switched
    expected = DoubleBackward().linearise(lambda *_: task.g(), at).product(q)
    assert all(map(torch.equal, product.lower, expected.lower))


def test_an_alarm_brings_one_look_and_no_more() -> None:
    task = Task(normalised()).run(FIRST)
    engine = task.engine
    at, q = task_point(task)
    engine._evaluations, engine._next_look = 200, 600
    for size in [0.5] * 60 + [5.0] * 20:
        engine.observe(size, 1.0)
    assert engine._next_look == 200
    engine.linearise(lambda *_: task.g(), at).product(q)
    assert engine.switched  # a false alarm
    engine.observe(5.0, 1.0)
    assert engine._next_look > engine._evaluations


def test_the_optimizer_reports_its_certificate_to_the_engine() -> None:
    task = Task(normalised())
    alarm = Alarm()
    for _ in range(3):
        task.run(1)
        a = float(task.optimizer.metrics.adjoint_residual_norm)
        alarm = alarm.after(a, task.optimizer._seen[2].slope)
    assert task.engine._alarm == alarm


# Where double backward is silently wrong.


def equilibrium(w: Tensor, x: Tensor, unrolled: bool) -> Tensor:
    """z = tanh(w0 z + w1 x + w2): unrolled, or with its implicit gradient made in a hook."""

    def step(z: Tensor) -> Tensor:
        return torch.tanh(w[0] * z + w[1] * x + w[2])

    def iterated(function, z: Tensor) -> Tensor:
        for _ in range(30):
            z = function(z)
        return z

    if unrolled:
        return iterated(step, torch.zeros_like(x))
    with torch.no_grad():
        z = iterated(step, torch.zeros_like(x))
    at = z.clone().requires_grad_()
    again, out = step(at), step(z)
    if out.requires_grad:

        def implicit(gradient: Tensor) -> Tensor:
            def series(y: Tensor) -> Tensor:
                return torch.autograd.grad(again, at, y, retain_graph=True)[0] + gradient

            return iterated(series, gradient)

        out.register_hook(implicit)
    return out


def solved(kind, unrolled: bool, engine: str, dtype=torch.float64, steps: int = 100):
    """The hypergradient at the lower solution, after ``steps`` of the multiplier; u is held."""
    torch.manual_seed(0)
    x, xv, noise = (torch.randn(20, dtype=torch.float64).to(dtype) for _ in range(3))
    y, yv = x.sin() + 0.3 * noise, xv.sin()
    w = torch.full((3,), 0.3, dtype=dtype, requires_grad=True)
    u = torch.zeros(20, dtype=dtype, requires_grad=True)

    def f() -> Tensor:
        return (equilibrium(w, xv, unrolled) - yv).square().mean()

    def g(unrolled: bool = unrolled) -> Tensor:
        fit = (equilibrium(w, x, unrolled) - y).square()
        return (u.exp() * fit).mean() + 0.05 * w.square().sum()

    solver = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure() -> Tensor:
        w.grad = torch.autograd.grad(g(True), w)[0]
        return g(True).detach()

    solver.step(closure)
    lower = torch.optim.SGD([w], lr=0.3)
    optimizer = kind([u], lower, upper_lr=0.0, curvature=engine)
    for _ in range(steps):
        optimizer.step(f, g)
    return u.grad, optimizer, (f, g)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "steps"), [(PenaltyBilevelOptimizer, 400), (HypergradientOptimizer, 12)]
)
def test_a_gradient_made_in_a_hook_is_seen_and_the_hypergradient_right(kind, steps) -> None:
    """The graph of that gradient does not show how it depends on v: double backward is 20 % off."""
    exact, *_ = solved(HypergradientOptimizer, True, "double_backward", steps=1)
    with pytest.warns(BilevelWarning, match="does not see how the gradient depends on v"):
        found, optimizer, _ = solved(kind, False, "auto", steps=steps)
    assert optimizer.curvature.switched
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_a_gradient_made_in_a_hook_is_seen_in_float32() -> None:
    exact, *_ = solved(HypergradientOptimizer, True, "double_backward", steps=1)
    with pytest.warns(BilevelWarning, match="made in a hook"):
        found, *_ = solved(PenaltyBilevelOptimizer, False, "auto", torch.float32)
    # A difference of float32 gradients errs by 1e-3.
    assert float((found - exact).norm() / exact.norm()) < 1e-2


def test_the_self_check_takes_its_verdict_from_the_resolved_level() -> None:
    for engine, agrees in (("finite_difference", True), ("double_backward", False)):
        _, optimizer, closures = solved(PenaltyBilevelOptimizer, False, engine)
        report = optimizer.check_hypergradient(*closures)
        assert report.agrees == agrees
        verdict = str(report).splitlines()[0]
        assert ("DISAGREES with the re-solved" in verdict) != agrees
        assert "by double_backward" in verdict


# Where differences must serve.


@pytest.mark.parametrize("kinked", [True, False])
def test_fused_attention_beside_kinks_is_taken_in_its_plain_form(kinked) -> None:
    """Differences across ReLU told .58 of noisy labels right where double backward has .82."""

    def made(plain: bool) -> Task:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "relu" if kinked else "gelu")
        net = nn.Sequential(nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), nn.Linear(8, 3))
        task = Task(net, torch.float64)
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            return task.run(3)

    with pytest.warns(BilevelWarning, match="plain form" if kinked else "switched to finite"):
        task = made(False)
    assert task.engine.switched != kinked
    if kinked:
        # The first upper losses came from kernels that round differently.
        assert_close(task.point(), made(True).point(), rtol=0, atol=1e-8)
        twin = Automatic()
        twin.unpack(task.engine.packed())
        assert twin._plain_attention


def test_unsteady_differences_are_reported_once_where_they_must_serve() -> None:
    task = Task(normalised().insert(3, Zigzag()))
    task.net.insert(4, nn.Hardsigmoid())  # no second derivative
    with pytest.warns(BilevelWarning) as record:
        task.run(4 * FIRST)
    messages = [str(each.message) for each in record]
    assert "switched to finite differences" in messages[0]
    assert "neighbouring steps differ" in messages[1]
    assert len(messages) == 2
    assert all("sdpa_kernel(SDPBackend.MATH)" in text for text in messages)


def test_steady_differences_are_not() -> None:
    task = Task(normalised().insert(3, nn.Hardsigmoid()))
    with pytest.warns(BilevelWarning) as record:
        task.run(4 * FIRST)
    assert len(record) == 1


def test_an_earlier_checkpoint_goes_on() -> None:
    """Its engine entry knew no looks at doubling distances and no alarm."""
    task = Task(normalised()).run(FIRST)
    saved = copy.deepcopy(task.optimizer.state_dict())
    keys = ("switched", "relative_step", "works", "weighs_costs", "evaluations", "next_look")
    own = next(g["bilevel"] for g in saved["param_groups"] if g.get("bilevel"))
    own["engine"] = {k: own["engine"][k] for k in keys}
    other = Task(normalised())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.optimizer.load_state_dict(saved)
    assert other.engine.switched
    assert other.engine._gap == PERIOD
    assert other.engine._alarm == Alarm()
