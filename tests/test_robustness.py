"""Bad input, bad numbers, exceptions half-way: a clear error and nothing changed."""

import random

import numpy as np
import pytest
import torch
from test_torch_contract import Task
from torch import nn

import torch_penalty_bilevel as tpb
from torch_penalty_bilevel import (
    BilevelWarning,
    EpsilonTest,
    FiniteDifference,
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    UnusedParameterError,
)


def leaf(*shape):
    return torch.zeros(*shape, requires_grad=True)


# Construction.

U, V = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize(
    ("upper", "lower", "options", "error", "message"),
    [
        ([U], [V, U], {}, ValueError, r"'upper\[0\]' of shape \(2,\) is in both levels"),
        ([], [V], {}, ValueError, "upper is empty"),
        ([U], iter(()), {}, ValueError, "lower is empty"),
        ([torch.zeros(1)], [V], {}, ValueError, "no parameter of upper requires grad"),
        ([U], [torch.zeros(1)], {}, ValueError, "no parameter of lower requires grad"),
        (U, [V], {}, TypeError, r"write \[upper\]"),
        ([U], {"v": V}, {}, TypeError, "lower is a dict"),
        (3, [V], {}, TypeError, "upper must be tensors"),
        ([U], [V], {"upper_lr": -1.0}, ValueError, "upper_lr must be a finite number >= 0, got -1"),
        ([U], [V], {"lower_lr": float("nan")}, ValueError, "lower_lr must be"),
        ([U], [V], {"lower_lr": "big"}, ValueError, "lower_lr must be"),
        ([U], [V], {"lower_steps": 0}, ValueError, "lower_steps must be an integer >= 1, got 0"),
        ([U], [V], {"lower_steps": 1.5}, ValueError, "lower_steps must be an integer"),
        ([U], [V], {"lower_steps": True}, ValueError, "lower_steps must be an integer"),
        ([U], [V], {"warmup_steps": -1}, ValueError, "warmup_steps must be an integer >= 0"),
        ([U], [V], {"penalty": "stationary"}, ValueError, "penalty must be one of"),
        ([U], [V], {"penalty": Stationarity}, TypeError, "penalty must be a name or an object"),
        ([U], [V], {"penalty": None}, TypeError, "penalty must be"),
        ([U], [V], {"curvature": "hessian"}, ValueError, "curvature must be one of"),
        ([U], [V], {"curvature": FiniteDifference}, TypeError, "curvature must be a name or"),
        ([U], [V], {"reduce": 3}, TypeError, "reduce must be a callable"),
        (
            [{"params": [U], "level": "lower"}],
            [V],
            {},
            ValueError,
            "given as upper says level='lower'",
        ),
    ],
)
def test_construction_errors_name_argument_value_and_remedy(upper, lower, options, error, message):
    with pytest.raises(error, match=message):
        PenaltyBilevelOptimizer(upper, lower, **options)


def test_ready_rules_are_checked():
    sgd = torch.optim.SGD([U], lr=0.1)
    with pytest.raises(ValueError, match=r"upper_lr=0.1 has no effect: upper is a ready SGD"):
        PenaltyBilevelOptimizer(sgd, [V], upper_lr=0.1)
    with pytest.raises(ValueError, match="cannot be LBFGS"):
        PenaltyBilevelOptimizer(sgd, torch.optim.LBFGS([V]))
    with pytest.raises(ValueError, match="same optimizer"):
        PenaltyBilevelOptimizer(sgd, sgd)
    with pytest.raises(TypeError, match="complex"):
        PenaltyBilevelOptimizer(
            torch.optim.SGD([torch.zeros(1, dtype=torch.complex64, requires_grad=True)]), [V]
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LeastSquares(damping=0), "damping must be > 0, got 0"),
        (lambda: LeastSquares(damping=float("inf")), "damping must be > 0"),
        (lambda: LeastSquares(share=-1), "share must be >= 0, got -1"),
        (lambda: LeastSquares(share=float("nan")), "share must be"),
        (lambda: LeastSquares(ridge=-0.1), "ridge must be >= 0, got -0.1"),
        (lambda: EpsilonTest(weight=0), "weight must be > 0, got 0"),
        (lambda: EpsilonTest(damping=-1), "damping must be >= 0"),
        (lambda: EpsilonTest(tolerance=0), "tolerance must be > 0"),
        (lambda: EpsilonTest(growth=0.5), "growth must be >= 1"),
        (lambda: EpsilonTest(decay=0), r"decay must lie in \(0, 1\]"),
        (lambda: EpsilonTest(decay=1.1), r"decay must lie in \(0, 1\]"),
        (lambda: FiniteDifference(relative_step=0), r"relative_step must lie in \(0, 1\)"),
        (lambda: FiniteDifference(relative_step=1), r"relative_step must lie in \(0, 1\)"),
        (lambda: Stationarity("newton"), "multiplier must be one of"),
    ],
)
def test_option_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_rule_must_be_a_rule():
    for wrong in (LeastSquares, 3):
        with pytest.raises(TypeError, match="multiplier must be a name or an object"):
            Stationarity(wrong)


# Closures.


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda task: None, TypeError, "returned NoneType, not a tensor"),
        (lambda task: task.lower().item(), TypeError, "returned float, not a tensor"),
        (lambda task: task.lower().reshape(1), ValueError, r"shape \(1,\); return a 0-d loss"),
        (lambda task: task.lower().detach(), ValueError, "does not depend on any parameter"),
        (lambda task: torch.tensor(3), TypeError, "dtype torch.int64"),
    ],
)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_what_closures_return_is_checked(level, bad, error, message):
    task = Task()
    pair = {"upper": task.upper, "lower": task.lower} | {level: lambda: bad(task)}
    with pytest.raises(error, match=f"{level}_closure .*{message}"):
        task.optimizer.step(pair["upper"], pair["lower"])


def test_a_closure_that_calls_backward_is_explained():
    task = Task()

    def lower():
        loss = task.lower()
        loss.backward()
        return loss

    with pytest.raises(tpb.DoubleBackwardError, match="called backward"):
        PenaltyBilevelOptimizer(
            [task.weights], task.net.parameters(), curvature="double_backward"
        ).step(task.upper, lower)


def test_a_one_level_call_is_explained():
    task = Task()
    with pytest.raises(TypeError, match="needs two closures"):
        task.optimizer.step(task.upper, None)


def test_step_works_under_no_grad():
    one, two = Task(), Task()
    with torch.no_grad():
        one.run(2)
    assert torch.equal(one.point(), two.run(2).point())


# Dependence.


def test_an_upper_parameter_nothing_depends_on_is_named():
    task = Task()
    forgotten = leaf(2)
    options = {"upper_lr": 0.1, "lower_lr": 0.1}
    named = [("weights", task.weights), ("forgotten", forgotten)]
    for curvature in ("double_backward", "finite_difference"):
        optimizer = PenaltyBilevelOptimizer(
            named, task.net.named_parameters(), curvature=curvature, **options
        )
        with pytest.raises(UnusedParameterError, match="forgotten") as caught:
            optimizer.step(task.upper, task.lower)
        assert "weights" not in str(caught.value)
        allowed = PenaltyBilevelOptimizer(
            named, task.net.named_parameters(), curvature=curvature, allow_unused=True, **options
        )
        allowed.step(task.upper, task.lower)
        assert torch.equal(forgotten, torch.zeros(2))


def test_unused_is_found_for_pure_functions_and_for_separable_losses():
    """g = g1(u) + g2(v) gives u a gradient of g but no gradient of grad_v g."""
    u, v = leaf(2), torch.ones(2, requires_grad=True)
    for curvature in ("double_backward", "finite_difference"):
        optimizer = PenaltyBilevelOptimizer([u], [v], curvature=curvature)
        with pytest.raises(UnusedParameterError, match=r"upper\[0\]"):
            optimizer.step(lambda: v.square().sum(), lambda: u.sum() + v.square().sum())
    optimizer = PenaltyBilevelOptimizer([("u", u)], [("v", v)], curvature="functional")
    with pytest.raises(UnusedParameterError, match="'u'"):
        optimizer.step(
            lambda upper, lower: lower["v"].square().sum(),
            lambda upper, lower: upper["u"].sum() + lower["v"].square().sum(),
        )


def test_a_parameter_that_drops_out_of_later_graphs_is_named():
    task = Task()
    other = leaf(1)
    optimizer = PenaltyBilevelOptimizer([task.weights, other], task.net.parameters())
    optimizer.step(task.upper, lambda: task.lower() * (1 + other.square().sum() + other.sum()))
    with pytest.raises(UnusedParameterError, match=r"upper\[1\]"):
        optimizer.step(task.upper, task.lower)


def test_swapped_closures_are_suspected():
    task = Task()
    with pytest.warns(BilevelWarning, match="swapped"):
        task.optimizer.step(task.lower, task.upper)
    u, v = leaf(1), leaf(1)
    with pytest.raises(ValueError, match="does not depend on any lower parameter"):
        PenaltyBilevelOptimizer([u], [v]).step(lambda: v.sum(), lambda: u.square().sum())


def test_a_hypergradient_of_exactly_zero_is_named_once():
    task = Task()

    u = leaf(1)
    optimizer = PenaltyBilevelOptimizer([u], task.net.parameters())

    def blind():
        loss = (task.net(task.x[:8]) - task.y[:8]).square().mean()
        return loss + seen * u.sum() * task.net[0].weight.sum()

    seen = torch.zeros(())
    for _ in range(3):  # the multiplier is zero in the first: two suspicious evaluations
        optimizer.step(task.upper, blind)
    with pytest.warns(BilevelWarning, match="exactly zero three times"):
        optimizer.step(task.upper, blind)
    for value in (0.0, 0.1, 0.0, 0.0, 0.0, 0.0):  # warnings are errors here: it is said once
        seen.fill_(value)
        optimizer.step(task.upper, blind)


def test_lower_steps_at_a_fixed_upper_point_are_not_suspicious():
    """What depends on u alone is computed once for many lower steps: no loss then sees u."""
    u, v = leaf(1), leaf(1)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.1, allow_unused=True)

    def upper_loss(u=u):
        return (v - 1 - u).square().sum()

    def lower_loss(u=u):
        return (v - u - 2).square().sum()

    optimizer.step(upper_loss, lower_loss)  # looks at what the losses depend on
    fixed = u.detach().clone()
    for _ in range(6):  # warnings are errors here
        optimizer.lower_step(lambda: upper_loss(fixed), lambda: lower_loss(fixed))
    optimizer.step(upper_loss, lower_loss)
    assert u.grad.item() != 0


# All or nothing.


def everything(task):
    """All that a step may touch, by value."""
    state = task.optimizer.state_dict()
    flat = [task.point(), torch.get_rng_state(), task.optimizer.metrics.upper_loss]
    for entry in state["state"].values():
        flat += [torch.as_tensor(x).clone() for x in entry.values()]
    flat += [t.clone() for t in state["bilevel"]["multiplier"] + state["bilevel"]["probe"]]
    flat += [torch.as_tensor(x).clone() for x in state["bilevel"]["scalars"].values()]
    flat += [torch.as_tensor(state["bilevel"][k]) for k in ("steps", "gradient_evaluations")]
    flat += [t.clone() for t in task.optimizer.adjoint]
    flat += [b.clone() for b in task.net.buffers()]
    return flat, random.getstate(), np.random.get_state()[1].tolist()


def assert_unchanged(before, task):
    after = everything(task)
    assert before[1:] == after[1:]
    assert len(before[0]) == len(after[0])
    for a, b in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def noisy_task(**options):
    task = Task(**options)
    task.net.insert(1, nn.BatchNorm1d(4))
    task.net.append(nn.Dropout(0.2))
    task.optimizer = PenaltyBilevelOptimizer(
        [task.weights], task.net.parameters(), upper_lr=0.05, lower_lr=0.02, **options
    )
    return task


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
    once = 0 if warm else 2 + differences
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
