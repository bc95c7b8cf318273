"""torch.compile under the optimizer: the values of the eager code, and no compilation too many."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from torch_penalty_bilevel import (
    DoubleBackwardError,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
)

N, VALIDATION = 24, 9
FORMS = ("module", "in place", "function")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.b(torch.tanh(self.drop(self.norm(self.a(x)))))


def task(form, backend, engine, make=PenaltyBilevelOptimizer, **options):
    torch.manual_seed(0)
    net = Net().double()
    x, y = torch.randn(N + VALIDATION, 5).double(), torch.randint(0, 3, (N + VALIDATION,))
    u = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    model = torch.compile(net, backend=backend) if form == "module" else net
    if form == "in place":
        net.compile(backend=backend)

    def upper():
        return F.cross_entropy(model(x[N:]), y[N:])

    def lower():
        return (u.sigmoid() * F.cross_entropy(model(x[:N]), y[:N], reduction="none")).mean()

    if form == "function":
        upper, lower = (torch.compile(f, backend=backend) for f in (upper, lower))
    rates = {"upper_lr": 0.1, "lower_lr": 0.02}
    optimizer = make([u], net.parameters(), curvature=engine, **rates, **options)
    return net, u, optimizer, upper, lower


def run(steps, *args, **options):
    net, u, optimizer, upper, lower = task(*args, **options)
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        losses = [optimizer.step(upper, lower) for _ in range(steps)]
    assert int(net.norm.num_batches_tracked) == steps
    ends = (torch.stack(losses), u.detach(), net.b.weight.detach(), net.norm.running_var)
    return (*ends, torch.rand(1)), [str(w.message) for w in record]


def assert_same(mine, other, atol):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_the_eager_code(form, engine):
    counter = CompileCounterWithBackend("aot_eager")
    expected, _ = run(5, "eager", None, "double_backward")
    mine, warned = run(5, form, counter, engine)
    # Central differences (float64) err by about 1e-9, and Adam divides by small gradients.
    assert_same(mine, expected, atol=1e-6)
    assert counter.frame_count <= 2  # f and g, or one module at two batch sizes
    switched = "switched to finite differences: torch.compile leaves no second derivative"
    assert [text.split(". ")[0] for text in warned] == ([switched] if engine == "auto" else [])


def test_through_inductor(monkeypatch):
    """Its random numbers are its own; with torch's it must take the steps of the eager code."""
    import torch._inductor.config as inductor

    monkeypatch.setitem(globals(), "VALIDATION", N)  # f and g share one graph: less to compile
    counter = CompileCounterWithBackend("inductor")
    expected, _ = run(4, "eager", None, "double_backward")
    with inductor.patch(fallback_random=True):
        mine, _ = run(4, "module", counter, "auto")
    assert_same(mine, expected, atol=1e-6)  # as above
    assert counter.frame_count == 1


def test_inductor_replays_its_own_masks():
    """J q by a difference against s'(u_i) <grad l_i, q> / N under the same numbers."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model = torch.compile(net, backend="inductor")
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    u = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], net.parameters(), curvature="finite_difference", penalty="paper"
    )

    def losses():
        return F.cross_entropy(model(x), y, reduction="none")

    torch.manual_seed(4)
    optimizer.upper_step(
        lambda: net[2].weight.square().sum(), lambda: (u.sigmoid() * losses()).mean()
    )
    for i in range(6):
        torch.manual_seed(4)
        slopes = torch.autograd.grad(losses()[i], list(net.parameters()))
        along = sum((s * q).sum() for s, q in zip(slopes, optimizer.adjoint, strict=True))
        # Central differences err by about 1e-9 relative; another mask changes all digits.
        torch.testing.assert_close(u.grad[i], 0.25 * along / 6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_explicit_double_backward_names_the_remedy_and_changes_nothing(form):
    net, u, optimizer, upper, lower = task(form, "aot_eager", "double_backward")
    before = [t.clone() for t in (u, *net.parameters(), *net.buffers(), torch.get_rng_state())]
    with pytest.raises(DoubleBackwardError, match=r'torch\.compile.*"finite_difference"'):
        optimizer.step(upper, lower)
    after = (u, *net.parameters(), *net.buffers(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("fatal", [2, 4, 6])
def test_a_failing_closure_leaves_a_compiled_module_as_it_was(fatal):
    net, u, optimizer, upper, lower = task("module", "aot_eager", "finite_difference")
    optimizer.step(upper, lower)
    calls = 0

    def trap():
        nonlocal calls
        calls += 1
        loss = lower()
        if calls == fatal:
            raise KeyError("stop")
        return loss

    before = [t.clone() for t in (u, *net.parameters(), *net.buffers(), torch.get_rng_state())]
    with pytest.raises(KeyError):
        optimizer.step(upper, trap)
    after = (u, *net.parameters(), *net.buffers(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_hypergradient_optimizer():
    ends = []
    for form, engine in (("eager", "double_backward"), ("in place", "auto")):
        options = {"make": HypergradientOptimizer, "method": "cg", "lower_steps": 2, "damping": 5.0}
        ends.append(run(3, form, "aot_eager", engine, **options)[0])
    assert_same(ends[1], ends[0], atol=1e-6)  # as above


def test_self_check_has_an_exact_reference():
    """It looks at the uncompiled code, which has a second derivative."""
    reports = []
    for form in ("eager", "module", "function"):
        _, _, optimizer, upper, lower = task(form, "aot_eager", "finite_difference")
        for _ in range(3):
            optimizer.step(upper, lower)
        torch.manual_seed(0)
        reports.append(optimizer.check_hypergradient(upper, lower, resolve=False, damping=3.0))
    for report in reports[1:]:
        # The points differ by what the differences of two steps err.
        assert report.cosine == pytest.approx(reports[0].cosine, rel=1e-5)
        assert report.relative_error == pytest.approx(reports[0].relative_error, rel=1e-5)


def test_a_look_leaves_a_compiled_teacher_compiled():
    """Dynamo gives up functions that it meets under a mode, as the one that counts bytes."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    net, teacher = nn.Linear(5, 3).double(), nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double()
    compiled = torch.compile(teacher, backend=counter)
    u, x = torch.zeros(8, dtype=torch.float64, requires_grad=True), torch.randn(8, 5).double()

    def lower():
        with torch.no_grad():
            target = compiled(x)
        return (u.sigmoid() * (net(x).exp() - target).square().sum(1)).mean()

    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), upper_lr=0.1, lower_lr=0.01)
    for _ in range(12):
        optimizer.step(lambda: net(x).square().mean(), lower)
    assert "bytes" in optimizer.curvature.reason  # it has looked
    assert counter.frame_count == 1
    with torch.no_grad():
        compiled(x[:3])  # another shape: compiled again, unless Dynamo has given up
    assert counter.frame_count == 2
