"""Sample weights on a lower loss whose second derivative is missing or cut, beside a slow twin."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torch_penalty_bilevel import DoubleBackwardError, PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import DoubleBackward, FiniteDifference, VectorJacobian
from torch_penalty_bilevel.tensors import Pair


class Once(torch.autograd.Function):
    """Cross entropy of a linear layer with torch's decorator for gradients without a graph."""

    @staticmethod
    def forward(ctx, x, w, t):
        ctx.save_for_backward(x, w, t)
        return F.cross_entropy(x @ w.T, t, reduction="none")

    @staticmethod
    @once_differentiable
    def backward(ctx, go):
        return slopes(go, *ctx.saved_tensors)


class Cut(Once):
    """The same, its gradient computed where autograd does not look: as a C++ kernel would."""

    @staticmethod
    def backward(ctx, go):
        with torch.no_grad():
            return slopes(go, *ctx.saved_tensors)


class Worded(Once):
    """The same, refusing a second derivative in words of its own."""

    @staticmethod
    def backward(ctx, go):
        return Refusing.apply(go, *ctx.saved_tensors)


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return slopes(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("fused_ce: backward of backward is left to the reader")


def slopes(go, x, w, t):
    d = ((x @ w.T).softmax(1) - F.one_hot(t, len(w))) * go[:, None]
    return d @ w, d.T @ x, None


def chunked(x, w, t):
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    chunks = options.LinearCrossEntropyOptions(batch_chunk_size=8, chunking_method=None)
    return F.linear_cross_entropy(x, w, t, reduction="none", options=chunks)


def plain(x, w, t):
    return F.cross_entropy(x @ w.T, t, reduction="none")


LOSSES = {"once": Once.apply, "cut": Cut.apply, "worded": Worded.apply, "chunked": chunked}


class Task:
    """v a linear classifier, u a weight per sample; ``decay`` joins a term with a whole graph."""

    def __init__(self, loss, engine, decay=0.0, start=0.0):
        torch.manual_seed(0)
        x, y = torch.randn(48, 5).double(), torch.randint(0, 3, (48,))
        self.w = torch.full((3, 5), start, dtype=torch.float64, requires_grad=True)
        self.u = torch.zeros(32, dtype=torch.float64, requires_grad=True)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u], [self.w], curvature=engine, upper_lr=0.1, lower_lr=0.1
        )
        self.upper = lambda: F.cross_entropy(x[32:] @ self.w.T, y[32:])
        self.lower = lambda: (
            (self.u.sigmoid() * loss(x[:32], self.w, y[:32])).mean() + decay * self.w.square().sum()
        )

    def run(self, steps=5):
        for _ in range(steps):
            self.optimizer.step(self.upper, self.lower)
        return self.u.detach(), self.w.detach(), *self.optimizer.adjoint


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
@pytest.mark.parametrize("name", LOSSES)
def test_steps_are_those_of_the_slow_twin(name, engine, decay):
    expected = Task(plain, "double_backward", decay).run()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        mine = Task(LOSSES[name], engine, decay).run()
    for a, b in zip(mine, expected, strict=True):
        # Central differences (float64) err by about 1e-9, and Adam divides by small gradients.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    said = [str(w.message) for w in record]
    assert len(said) == (engine == "auto")
    assert all("switched to finite differences" in s and '"auto"' not in s for s in said)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_explicit_double_backward_names_the_remedy(name, decay):
    task = Task(LOSSES[name], "double_backward", decay)
    with pytest.raises(DoubleBackwardError, match='curvature="finite_difference"') as caught:
        task.run(1)
    assert not task.u.any()
    if name == "worded":
        assert "left to the reader" in str(caught.value)


class Pull(torch.autograd.Function):
    """|v - u|^2 / 2 without second derivative."""

    @staticmethod
    def forward(ctx, u, v):
        ctx.save_for_backward(u, v)
        return 0.5 * (v - u).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, go):
        u, v = ctx.saved_tensors
        return go * (u - v), go * (v - u)


class Decay(Pull):
    """u |v|^2 / 2 likewise."""

    @staticmethod
    def forward(ctx, u, v):
        ctx.save_for_backward(u, v)
        return 0.5 * (u * v.square()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, go):
        u, v = ctx.saved_tensors
        return go * v.square() / 2, go * u * v


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
@pytest.mark.parametrize(("loss", "start"), [(Pull, 1.0), (Decay, 0.0)])
def test_a_start_at_the_solution_does_not_hide_the_dependence(loss, start, engine):
    """r = 0 to the last digit, so a difference along r sees nothing; J = 0 too with ``Decay``."""
    u = torch.ones(3, dtype=torch.float64, requires_grad=True)
    v = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], curvature=engine)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "switched to finite differences")
        optimizer.step(lambda: (v - 2).square().sum(), lambda: loss.apply(u, v))
    assert optimizer.metrics.residual_norm == 0


class HiddenPull(Pull):
    """|v - u|^2 / 2 with a gradient that autograd takes for a constant."""

    @staticmethod
    def backward(ctx, go):
        with torch.no_grad():
            u, v = ctx.saved_tensors
            return go * (u - v), go * (v - u)


def test_one_entry_that_is_cut_off_is_found_beside_others_that_are_not():
    """u is in the graph of r through a; what b hides is seen by a difference along b alone."""
    u = torch.ones(3, requires_grad=True)
    a, b = (torch.full((3,), s, requires_grad=True) for s in (0.5, 0.2))
    optimizer = PenaltyBilevelOptimizer([u], [a, b], curvature="double_backward")
    with pytest.raises(DoubleBackwardError, match="depends on more than its graph says"):
        optimizer.step(
            lambda: (a + b).square().sum(),
            lambda: (u * (a - 1).square()).sum() + HiddenPull.apply(u, b),
        )


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_a_constant_entry_of_r_is_no_cut(start):
    """g is linear in b: its slope has no graph, rightly; that of a may vanish or not."""
    u = torch.ones(3, requires_grad=True)
    a, b = torch.full((3,), start, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [a, b], curvature="double_backward")
    optimizer.step(
        lambda: (a - 2).square().sum(),
        lambda: (u * (a - 1).square()).sum() + (3 * b).sum(),
    )
    assert torch.equal(optimizer.lower.param_groups[0]["params"][1].grad, torch.full((2,), 3.0))


@pytest.mark.parametrize("engine", [DoubleBackward, VectorJacobian, FiniteDifference])
def test_errors_of_the_loss_itself_are_not_refusals(engine):
    v = torch.ones(2, requires_grad=True)

    def fails(*_):
        raise RuntimeError("size mismatch in the user's own code")

    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        engine().linearise(fails, Pair((), (v,)))
    assert not isinstance(caught.value, DoubleBackwardError)


def test_an_error_of_the_first_derivative_is_not_a_refusal():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.sum()

        @staticmethod
        def backward(ctx, go):
            raise RuntimeError("bug in the user's backward")

    v = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="user's backward") as caught:
        DoubleBackward().linearise(lambda *_: Broken.apply(v), Pair((), (v,)))
    assert not isinstance(caught.value, DoubleBackwardError)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_not_a_refusal(failure):
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, go):
            raise failure

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            return v.square().sum()

        @staticmethod
        def backward(ctx, go):
            return 2 * go * Hungry.apply(ctx.saved_tensors[0])

    v = nn.Parameter(torch.ones(2))
    linearised = DoubleBackward().linearise(lambda *_: Loss.apply(v), Pair((), (v,)))
    with pytest.raises(RuntimeError) as caught:
        linearised.product((torch.ones(2),))
    assert caught.value is failure
