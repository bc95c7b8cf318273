"""A step that raises half-way, or meets a number that is not finite, has changed nothing."""

import random

import numpy as np
import pytest
import torch
from tasks import Task, assert_unchanged, everything, noisy_task

from torch_penalty_bilevel import NonFiniteError


@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("warm", [0, 2])
def test_a_raising_closure_leaves_everything_untouched(lower_steps, curvature, penalty, warm):
    """At every call of either closure that a step makes."""
    calls = 0
    for fatal in range(1, 40):
        task = noisy_task(lower_steps=lower_steps, curvature=curvature, penalty=penalty)
        task.run(warm)
        before = everything(task)
        calls = 0

        def trap(closure, fatal=fatal):
            nonlocal calls
            calls += 1
            random.random()
            np.random.rand()
            loss = closure()
            if calls == fatal:
                raise KeyError("stop")
            return loss

        try:
            task.optimizer.step(lambda: trap(task.upper), lambda: trap(task.lower))  # noqa: B023
        except KeyError:
            assert_unchanged(before, task)
        else:
            break
    # Central differences (float64) call g twice more per product; checks run once per optimizer.
    differences = curvature == "finite_difference"
    evaluations = lower_steps + (penalty == "paper")
    products = evaluations * (2 if penalty == "stationarity" else 1)  # with a probe in each
    # The first step sees what depends on what: from the same evaluation, or by a difference of g.
    # The first step with other lines of code looks for the modules they use, and whether g repeats.
    once = 2 + differences if warm else 5 * differences
    assert calls == 2 * evaluations + 2 * differences * products + once


QUANTITIES = {
    "upper loss f": lambda t: (lambda: t.upper() + float("inf"), t.lower),
    "lower loss g": lambda t: (t.upper, lambda: t.lower() * float("nan")),
    "residual grad_v g": lambda t: (t.upper, lambda: t.lower() + broken(t.net[2].bias, 1)),
    "upper slope grad_v f": lambda t: (lambda: t.upper() + broken(t.net[2].bias, 1), t.lower),
    "second-order product H q": lambda t: (t.upper, lambda: t.lower() + broken(t.net[2].bias, 2)),
    r"hypergradient of 'upper\[0\]'": lambda t: (lambda: t.upper() + broken(t.weights, 1), t.lower),
}


def broken(p, order):
    """A finite term whose derivative of the given order is infinite: |p - p0|^(order - 1/2)."""
    shifted = p - p.detach()
    return (shifted.square() ** (0.5 * (order - 0.5))).sum() if order == 1 else Kink.apply(p).sum()


class Kink(torch.autograd.Function):
    """Zero, with a zero gradient whose own derivative is infinite."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return InfiniteSlope.apply(x) * grad


class InfiniteSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("inf"))


@pytest.mark.parametrize("lower_steps", [1, 2])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_non_finite_quantity_is_named_and_nothing_changes(quantity, lower_steps):
    task = Task(lower_steps=lower_steps, curvature="double_backward").run(3)
    before = everything(task)
    upper, lower = QUANTITIES[quantity](task)
    with pytest.raises(NonFiniteError, match=f"{quantity} is not finite in step 4"):
        task.optimizer.step(upper, lower)
    assert_unchanged(before, task)
    twin = Task(lower_steps=lower_steps, curvature="double_backward").run(5)
    assert torch.equal(task.run(2).point(), twin.point())


def test_non_finite_in_the_last_of_several_evaluations_undoes_the_earlier_ones():
    task = Task(lower_steps=3).run(1)
    before = everything(task)
    calls = []

    def lower():
        calls.append(1)
        return task.lower() * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(NonFiniteError, match="lower loss g is not finite in step 2"):
        task.optimizer.step(task.upper, lower)
    assert_unchanged(before, task)
