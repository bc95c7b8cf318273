"""Changes to numbers that nothing else notices: norms, counts, thresholds, exact zeros."""

import math
import warnings

import pytest
import torch
from choosing import Zigzag

from torch_penalty_bilevel import (
    BilevelWarning,
    DoubleBackward,
    EpsilonTest,
    LeastSquares,
    NondeterministicClosureError,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.checks.exact import ImplicitProblem, implicit_hypergradient
from torch_penalty_bilevel.curvature import Automatic
from torch_penalty_bilevel.evaluation import Norms
from torch_penalty_bilevel.functional import hypergradient
from torch_penalty_bilevel.hypergradients import MethodOptions
from torch_penalty_bilevel.multipliers import Watch
from torch_penalty_bilevel.penalties import Losses
from torch_penalty_bilevel.tensors import Pair
from torch_penalty_bilevel.undo.repeats import check_repeats
from torch_penalty_bilevel.workers import ALONE


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def implicit(g, v, engine=None):
    losses = Losses(lambda u, v: v[0].sum(), lambda u, v: g(v[0]))
    return ImplicitProblem(losses, Pair((leaf(0.0),), (v,)), engine or DoubleBackward(), ALONE)


# Rules.


def test_probes_go_on_while_the_last_one_saw_too_little():
    rule = LeastSquares()
    state = rule.start((torch.zeros(2),)).but(steps=11, curvature=1.0)
    for probed, wanted in ((0.05, True), (0.5, False)):
        assert rule.probes(state.but(probed=probed)) == wanted


def test_the_multiplier_waits_while_the_probes_see_no_curvature():
    u, v, on = leaf(1.0), leaf(0.5), [1.0]
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.01, upper_lr=0.0)

    def steps(count):
        for _ in range(count):
            optimizer.step(
                lambda: (v - 3).square().sum() + u.square().sum(),
                lambda: on[0] * (v - u).square().sum(),
            )
        return optimizer._dual.multiplier[0].clone()

    steps(30)
    on[0] = 0.0
    waiting = steps(21)  # in which a probe has come
    assert float(optimizer.metrics.adjoint_residual_norm) > 1
    assert torch.equal(steps(10), waiting)


def test_the_watch_wants_a_slope_and_filled_averages():
    watch = Watch(adjoint_square=1e8, slope_square=1.0, slope=1.0)
    silent = Norms(0.0, 0.0, 1e4, 0.0, 0.0, 0.0, 0.0, 0.0)
    watch.looked_at(silent, 500)  # warnings are errors here
    with pytest.warns(BilevelWarning, match="on average over the last 100"):
        watch.looked_at(silent._replace(slope=1.0), 500)
    assert not watch.is_hopeless(99)
    assert watch.is_hopeless(100)


# What a step reports.


def test_norms_and_scalars_of_the_metrics():
    a, b, v = leaf(1.0), leaf(1.0, 2.0), leaf(0.5)
    rule = Stationarity(EpsilonTest(weight=2.0, damping=0.5))
    optimizer = PenaltyBilevelOptimizer([a, b], [v], penalty=rule)
    optimizer.step(
        lambda: (v - a).square().sum() + b.square().sum(), lambda: (v - a).square().sum()
    )
    metrics = optimizer.metrics
    assert float(metrics.penalty_weight) == 2.0
    assert float(metrics.damping) == 0.5
    both = math.hypot(float(a.grad.norm()), float(b.grad.norm()))
    assert float(metrics.upper_grad_norm) == pytest.approx(both, rel=1e-12)
    assert min(float(a.grad.norm()), float(b.grad.norm())) > 0.1


def test_a_second_batch_costs_one_more_gradient():
    counts = []
    for independent in (False, True):
        u, v = leaf(1.0), leaf(0.5)
        penalty = Stationarity("paper", independent_batches=independent)
        optimizer = PenaltyBilevelOptimizer([u], [v], penalty=penalty)
        optimizer.step(lambda v=v: v.square().sum(), lambda u=u, v=v: (v - u).square().sum())
        counts.append(optimizer.metrics.gradient_evaluations)
    assert counts[1] == counts[0] + 2  # of two evaluations


@pytest.mark.filterwarnings("ignore:the lower loss does not depend on")
def test_a_lower_tensor_of_f_alone_is_not_silent():
    """It is pulled to where f likes it."""
    u, v, w = leaf(1.0), leaf(0.5), leaf(0.0)
    optimizer = PenaltyBilevelOptimizer([u], [v, w], lower_lr=0.1)
    for _ in range(3):
        optimizer.step(
            lambda: (v - 3).square().sum() + (w - 1).square().sum(),
            lambda: (v - u).square().sum(),
        )
    assert optimizer._seen[2].silent == (False, False)
    assert float(w.detach()) > 0.05


# Refusals.


def test_a_start_of_another_shape_is_refused():
    v = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"a start tensor has shape \(3, 2\)"):
        hypergradient(
            lambda u, v: v.sum(), lambda u, v: (v - u).square().sum(), v, v, start=torch.ones(3, 2)
        )


def test_losses_that_differ_by_more_than_rounding_are_not_repeated():
    one = torch.tensor(1.0)
    check_repeats(one, one + 1e-9, "")
    for gap in (1e-6, 1e-3, 0.1):
        with pytest.raises(NondeterministicClosureError):
            check_repeats(one, one + gap, "")


# The exact side of the self-check.


def test_a_newton_step_that_goes_too_far_is_undone():
    """g = sqrt(1 + v^2) at v = 2: Newton goes to -8, where the slope is larger."""
    v = leaf(2.0)
    problem = implicit(lambda v: (1 + v.square()).sqrt().sum(), v)
    before = 2 / math.sqrt(5)
    assert problem._newton_step(before) == pytest.approx(8 / math.sqrt(65))
    assert float(v.detach()) == 2.0


def test_an_adjoint_that_least_squares_did_not_reach_is_no_number():
    H = torch.tensor([1.0, -2.0, 3.0, -4.0])
    u, v = leaf(1.0, 1.0, 1.0, 1.0), leaf(1.0, 1.0, 1.0, 1.0)
    losses = Losses(
        lambda u, v: u[0].sum() + v[0].sum(),
        lambda u, v: (H * v[0].square()).sum() / 2 + (u[0] * v[0]).sum(),
    )
    problem = ImplicitProblem(losses, Pair((u,), (v,)), DoubleBackward(), ALONE)
    lost = implicit_hypergradient(problem, MethodOptions(max_iterations=1), 1e-10)
    assert lost.solution.value[0].isnan().all()
    assert lost.hypergradient[0].isnan().all()
    found = implicit_hypergradient(problem, MethodOptions(max_iterations=20), 1e-10)
    torch.testing.assert_close(found.solution.value[0], -1 / H)
    torch.testing.assert_close(found.hypergradient[0], 1 - 1 / H)
    assert not found.positive_definite


def test_the_lower_solver_knows_no_units():
    ends = []
    for c in (1.0, 1e-12):
        v = leaf(-1.2, 1.0)
        banana = lambda v, c=c: c * (100 * (v[1] - v[0] ** 2) ** 2 + (1 - v[0]) ** 2)  # noqa: E731
        implicit(banana, v).solve_lower()
        ends.append(v.detach())
    for end in ends:
        torch.testing.assert_close(end, torch.ones(2), rtol=1e-6, atol=0)


class Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.square().sum() / 2

    @staticmethod
    def backward(ctx, go):
        return Once.apply(go * ctx.saved_tensors[0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, go):
        raise RuntimeError("no second derivative")


def test_which_engine_auto_ends_with_is_known_before_it_counts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        problem = implicit(Refused.apply, leaf(1.0, 2.0), Automatic())
    assert problem.engine_name == "finite_difference"
    assert problem.tolerance > 1e-7


def test_slopes_are_taken_over_a_share_of_u():
    """F(u) = sin(1000 u) at a thousandth: a step of eps^(1/5) itself would leave the slope."""
    u, v = leaf(1e-3), leaf(1e-3)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    report = optimizer.check_hypergradient(
        lambda: (1000 * v).sin().sum(), lambda: (v - u).square().sum() / 2
    )
    resolved = [abs(s.resolved) for s in report.slopes]
    assert resolved == pytest.approx([1000 * math.cos(1)] * len(resolved), rel=1e-5)


def test_engines_are_compared_also_where_the_adjoint_is_zero():
    u, v = leaf(1.0, 2.0), leaf(0.3, 0.7)
    zigzag = Zigzag()
    optimizer = PenaltyBilevelOptimizer([u], [v], curvature="double_backward")
    report = optimizer.check_hypergradient(
        lambda: u.square().sum() + 0 * v.sum(),
        lambda: (v - u).square().sum() + zigzag(v).sum(),
        resolve=False,
    )
    assert report.engine_difference > 0.1
