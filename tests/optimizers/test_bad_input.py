"""Arguments, closures and dependences that cannot be meant: an error that names them."""

import pytest
import torch
from tasks import Task

import torch_penalty_bilevel as tpb
from torch_penalty_bilevel import (
    BilevelWarning,
    EpsilonTest,
    FiniteDifference,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
    UnusedParameterError,
)
from torch_penalty_bilevel.checks.suspicions import zeros_in_a_row


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
        (lambda: LeastSquares(damping=0), "damping must be a finite number > 0, got 0"),
        (lambda: LeastSquares(damping=float("inf")), "damping must be a finite number > 0"),
        (lambda: LeastSquares(share=-1), "share must be a finite number >= 0, got -1"),
        (lambda: LeastSquares(share=float("nan")), "share must be"),
        (lambda: LeastSquares(ridge=-0.1), "ridge must be a finite number >= 0, got -0.1"),
        (lambda: EpsilonTest(weight=0), "weight must be a finite number > 0, got 0"),
        (lambda: EpsilonTest(damping=-1), "damping must be a finite number >= 0"),
        (lambda: EpsilonTest(tolerance=0), "tolerance must be a finite number > 0"),
        (lambda: EpsilonTest(growth=0.5), "growth must be a finite number >= 1"),
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


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_a_difference_of_zero_is_not_taken_for_independence(others, direct):
    """u = (A, B) = 0 in v A B: both depend, but no first derivative along v shows it at zero."""
    A, B, C = leaf(3), leaf(3), leaf(3)
    v = torch.ones(3, requires_grad=True)
    upper = [A, B, C] if others else [A, B]
    optimizer = PenaltyBilevelOptimizer(upper, [v], curvature="finite_difference")
    optimizer.step(
        lambda: (v.square() + A + B).sum() if direct else v.square().sum(),
        lambda: ((v * A * B - 1) ** 2 + (v - C if others else v) ** 2).sum(),
    )
    for p in (A, B):  # neither refused nor left out: grad_u f, as J q is still zero
        assert torch.equal(p.grad, torch.full_like(p, float(direct)))


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


def test_first_step_of_finite_differences_takes_no_second_derivative(monkeypatch):
    """The graph of r, made to see what depends on what, would hold twice the activations."""
    made = []
    original = torch.autograd.grad

    def grad(*args, create_graph=False, **options):
        made.append(create_graph)
        return original(*args, create_graph=create_graph, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    for curvature, twice in (("finite_difference", False), ("double_backward", True)):
        made.clear()
        task = Task(curvature=curvature)
        task.run(1)
        assert made
        assert any(made) == twice


def test_three_zeros_in_a_row_are_reported_once():
    counts, count = [], 0
    for vanished in (True, True, False, True, True):  # warnings are errors here
        count = zeros_in_a_row(count, vanished)
        counts.append(count)
    assert counts == [1, 2, 0, 1, 2]
    with pytest.warns(BilevelWarning, match="exactly zero three times"):
        count = zeros_in_a_row(count, True)
    assert zeros_in_a_row(count, True) == zeros_in_a_row(count, False) == 3
