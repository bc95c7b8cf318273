"""Changes to the code that nothing else notices: each has its test here."""

import copy
import sys
import types

import pytest
import torch
from tasks import Task

from torch_penalty_bilevel import (
    HypergradientOptimizer,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    UnusedParameterError,
)
from torch_penalty_bilevel.adapters.constraints import ConstrainedLevel
from torch_penalty_bilevel.checks.suspicions import DependenceWatch
from torch_penalty_bilevel.constraints import Ball, Box, Inequality
from torch_penalty_bilevel.levels.trial_step import stepped
from torch_penalty_bilevel.multipliers import LeastSquares
from torch_penalty_bilevel.multipliers.least_squares_state import LeastSquaresState
from torch_penalty_bilevel.penalties import Losses
from torch_penalty_bilevel.tensors import Pair
from torch_penalty_bilevel.workers import ALONE


def test_a_checkpoint_with_other_sample_counts_is_refused_before_anything_changes():
    saved = copy.deepcopy(Task().run(2).optimizer.state_dict())
    u, task = torch.zeros(5, requires_grad=True), Task()
    optimizer = PenaltyBilevelOptimizer([u], task.net.parameters())
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has shape \(8,\).*\(5,\)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_options_that_a_hook_changed_are_put_back_when_the_step_fails():
    task = Task(lower_steps=2).run(1)
    rate, seen = task.optimizer.lower.param_groups[0]["lr"], []

    def halve(rule, *_):
        rule.param_groups[0]["lr"] *= 0.5
        seen.append(rule.param_groups[0]["lr"])

    def lower():
        return task.lower() * (float("nan") if seen else 1.0)

    task.optimizer.lower.register_step_pre_hook(halve)
    with pytest.raises(NonFiniteError):
        task.optimizer.step(task.upper, lower)
    assert seen == [0.5 * rate]  # v moved once before the step failed
    assert task.optimizer.lower.param_groups[0]["lr"] == rate


def test_the_tracker_of_a_group_added_later_starts_at_v():
    task = Task(penalty="value").run(2)
    late = torch.tensor([3.0, -2.0], requires_grad=True)
    task.optimizer.add_param_group({"params": [late], "level": "lower"})
    assert torch.equal(task.optimizer._own_state()["tracker"][-1], late.detach())


def test_an_exception_late_in_a_step_leaves_the_moments_of_the_tracker():
    task = Task(penalty="value", lower_steps=2).run(2)
    before = copy.deepcopy(task.optimizer._own_state()["moments"])
    calls = []

    def lower():
        calls.append(1)
        # One call looks at the new lines, three belong to the first evaluation.
        return task.lower() * (float("nan") if len(calls) > 4 else 1.0)

    with pytest.raises(NonFiniteError):
        task.optimizer.step(task.upper, lower)
    after = task.optimizer._own_state()["moments"]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)


def test_a_map_given_as_a_dict_goes_by_label_not_by_order():
    ends = []
    for turned in (False, True):
        u = torch.tensor([0.5], requires_grad=True)
        a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
        optimizer = PenaltyBilevelOptimizer(
            [u], [("a", a), ("b", b)], penalty="fixed_point", lower_lr=0.1
        )

        def phi(u=u, a=a, b=b, turned=turned):
            entries = {"a": 0.5 * a + u, "b": 0.2 * b - u}
            return dict(reversed(entries.items())) if turned else entries

        for _ in range(3):
            optimizer.step(lambda a=a, b=b: ((a - 1) ** 2 + b**2).sum(), phi)
        ends.append(torch.cat([u, a, b]).detach())
    assert torch.equal(*ends)
    assert ends[0][1] > 0 > ends[0][2]


def test_a_group_tensor_replaced_by_one_of_another_length_is_named():
    for change in (
        lambda held: held.__setitem__(0, torch.zeros(7, requires_grad=True)),
        lambda held: held.append(torch.zeros(7, requires_grad=True)),
    ):
        task = Task().run(1)
        change(task.optimizer.lower.param_groups[0]["params"])
        with pytest.raises(ValueError, match=r"of shape \(7,\) is not what its group held"):
            task.run(1)


def test_names_count_through_the_groups():
    """upper[1] is the second tensor, whatever group it is in."""
    a, b, v = (torch.ones(1, requires_grad=True) for _ in range(3))
    optimizer = PenaltyBilevelOptimizer([{"params": [a]}, {"params": [b]}], [v])
    with pytest.raises(UnusedParameterError, match=r"\['upper\[1\]'\]"):
        optimizer.step(lambda: v.square().sum(), lambda: (v - a).square().sum())


def test_a_lower_tensor_of_integers_is_refused_at_construction():
    u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(TypeError, match=r"'lower\[1\]' of lower has dtype torch.int64"):
        PenaltyBilevelOptimizer([u], [v, torch.ones(1, dtype=torch.int64)])


def test_twenty_silent_evaluations_count_in_a_row_alone():
    watch = DependenceWatch()
    watch.due = False
    for _ in range(3):
        for _ in range(19):
            watch.listen([True, False])
        watch.listen([False, False])
        assert not watch.due
    for _ in range(20):
        watch.listen([True, False])
    assert watch.due


def test_a_subclass_decays_as_the_class_whose_step_it_takes():
    class Renamed(torch.optim.SGD):
        pass

    class Other(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    PenaltyBilevelOptimizer([u], Renamed([v], lr=0.1, weight_decay=0.1))
    with pytest.raises(ValueError, match=r"Other with weight_decay=0.1 decoupled"):
        PenaltyBilevelOptimizer([u], Other([v], lr=0.1, weight_decay=0.1))


def test_a_rule_that_raises_has_its_decay_back(monkeypatch):
    u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    lower = torch.optim.SGD([v], lr=0.1, weight_decay=0.1)
    optimizer = PenaltyBilevelOptimizer([u], lower)

    def failing(*_, **__):
        raise MemoryError

    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", failing)
    with pytest.raises(MemoryError):
        optimizer.step(lambda: v.square().sum(), lambda: (v - u).square().sum())
    assert lower.param_groups[0]["weight_decay"] == 0.1


def test_a_late_group_has_first_values_to_start_from_again():
    u, v, late = (torch.full((1,), s, requires_grad=True) for s in (1.0, 0.5, -0.5))
    optimizer = HypergradientOptimizer([u], [v], method="one_step", warm_start=False, lower_lr=0.1)

    def step():
        optimizer.step(
            lambda: (v + late).square().sum(),
            lambda: (v - u).square().sum() + (late - u).square().sum(),
        )

    late.requires_grad_(False)
    step()
    optimizer.add_param_group({"params": [late.requires_grad_()], "level": "lower"})
    step()
    ends = float(v.detach()), float(late.detach())
    step()
    # Adam's first step of 0.1 from where each began.
    assert (float(v.detach()), float(late.detach())) == pytest.approx(ends, abs=1e-6)
    assert ends == pytest.approx((0.6, -0.4), abs=1e-6)


def test_steps_on_the_linear_system_are_the_smallest_rate_of_the_lower_groups():
    u, v, w = (torch.ones(1, requires_grad=True) for _ in range(3))
    lower = torch.optim.SGD([{"params": [v], "lr": 0.3}, {"params": [w], "lr": 0.01}])
    optimizer = HypergradientOptimizer([u], lower, method="neumann")
    assert optimizer._options_at(0).step_size == 0.01


def test_the_engine_of_a_hypergradient_is_loaded():
    def built():
        u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
        return HypergradientOptimizer([u], [v], lower_lr=0.1)

    first, second = built(), built()
    first.curvature.switch()
    second.load_state_dict(first.state_dict())
    assert second.curvature.switched


def test_memory_of_inequalities_stays_last_when_a_group_comes_late():
    u, v = torch.ones(2, requires_grad=True), torch.full((2,), 0.9, requires_grad=True)
    late = torch.zeros(3, requires_grad=True)
    bound = Inequality(lambda: v - 0.5, weight=2.0, rate=0.5)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_constraint=bound)

    def f():
        return (v - 2).square().sum() + late.square().sum()

    def g():
        return (v - u).square().sum() + (late - 1).square().sum()

    late.requires_grad_(False)
    for _ in range(3):
        optimizer.step(f, g)
    z = optimizer._dual.multiplier[-1].clone()
    assert bool(z.any())
    optimizer.add_param_group({"params": [late.requires_grad_()], "level": "lower"})
    for memory in (optimizer._dual.multiplier, optimizer._dual.probe, optimizer._adjoint):
        assert [tuple(t.shape) for t in memory] == [(2,), (3,), (2,)]
    assert torch.equal(optimizer._dual.multiplier[-1], z)
    optimizer.step(f, g)
    assert [tuple(q.shape) for q in optimizer.adjoint] == [(2,), (3,)]


def test_multipliers_of_lower_inequalities_ascend_by_their_own_steps():
    """z by kappa rho r, never below 0; its part of nu by min(rho, 1 / L) of its residual."""
    for weight, bound, step in ((10.0, 4.0, 0.25), (0.1, 4.0, 0.1), (3.0, 0.0, 3.0)):
        restriction = ConstrainedLevel("lower", Inequality(lambda: None, weight=weight, rate=0.5))
        restriction.multipliers = (torch.tensor([0.1, 1.0]),)
        nu, a, r = torch.tensor([1.0, 2.0]), torch.tensor([0.3, -0.6]), torch.tensor([-9.0, 0.2])
        dual = LeastSquaresState((torch.zeros(3), nu), curvature=bound)
        seen = types.SimpleNamespace(residual=(torch.zeros(3), r), adjoint_residual=(None, a))
        after = restriction.ascend_jointly(LeastSquares(), dual, dual, seen)
        torch.testing.assert_close(after.multiplier[-1], nu + step * a)
        assert torch.equal(after.multiplier[0], torch.zeros(3))
        expected = torch.tensor([0.0, 1.0 + 0.5 * weight * 0.2])
        torch.testing.assert_close(restriction.multipliers[0], expected)


def test_a_look_at_the_shape_of_an_inequality_draws_nothing():
    u, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_constraint=Inequality(lambda: v))
    state = torch.get_rng_state()
    losses = Losses(None, None, lower_values=(lambda u, v: torch.rand(3) + v[0].sum(),))
    dual = optimizer._sets.start(losses, Pair((u,), (v,)), optimizer._dual, ALONE)
    assert torch.equal(torch.get_rng_state(), state)
    assert tuple(dual.multiplier[-1].shape) == (3,)


def test_a_lent_rule_has_its_gradients_back():
    u, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    rule = torch.optim.SGD([u, v], lr=0.1)
    u.grad = v.grad = held = torch.full((2,), 3.0)
    (moved,), _ = stepped(rule, (v,), (torch.zeros(2),), (torch.ones(2),), ({},))
    torch.testing.assert_close(moved, torch.full((2,), -0.1))
    assert u.grad is held
    assert v.grad is held
    assert torch.equal(v.detach(), torch.ones(2))


def test_probes_of_a_sphere_see_its_curvature():
    """g = c'v at u = 1 is flat; on ||v|| = 1, where v = -c / |c|, the curvature is mu = |c|."""
    c = torch.tensor([0.6, -0.8]) * 3
    u, v = torch.ones(2, requires_grad=True), (-c / 3).clone().requires_grad_()
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_constraint=Ball(1.0), lower_lr=0.0)
    optimizer.step(lambda: (v * u).sum(), lambda: (c * u * v).sum())
    assert optimizer._dual.probed == pytest.approx(3.0)


def test_held_entries_of_a_box_stay_where_momentum_moves_them():
    face = Box(0.0, 1.0).face(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, -1.0, 1.0]))
    before, after = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.2, 0.8, 2.0])
    assert torch.equal(face.retract(before, after), torch.tensor([0.0, 1.0, 1.0]))
