"""Constraints in every other respect: rollback, resuming, dtypes, and what is refused."""

import copy
import io
import itertools

import pytest
import torch
from constrained import follow, in_set, leaf
from tasks import Task

from torch_penalty_bilevel import NonFiniteError, PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import (
    Ball,
    Box,
    BoxAndBall,
    Inequality,
    NonNegative,
    Simplex,
)


def constrained_task(**options):
    task = Task()
    task.weights.data.fill_(1 / 8)
    below = Inequality(lambda: task.net[2].weight.square().sum().reshape(1) - 0.05)
    above = Inequality(lambda: task.weights[:2].sum() - 0.2 + 0 * task.net[2].bias.sum())
    task.optimizer = PenaltyBilevelOptimizer(
        [task.weights],
        task.net.parameters(),
        upper_lr=0.05,
        lower_lr=0.02,
        upper_constraint=[Simplex(), above],
        lower_constraint=[Box(-0.6, 0.6), below],
        **options,
    )
    return task


def all_state(task):
    flat = {"point": task.point(), "rng": torch.get_rng_state()}
    own = task.optimizer._own_state()
    for key in ("multiplier", "probe", "adjoint"):
        flat |= {f"{key}{i}": t.clone() for i, t in enumerate(own[key])}
    for level, tensors in own["inequalities"].items():
        flat |= {f"{level}{i}": t.clone() for i, t in enumerate(tensors)}
    return flat


@pytest.mark.parametrize("lower_steps", [1, 2])
def test_a_failed_step_changes_nothing(lower_steps):
    task = constrained_task(lower_steps=lower_steps)
    task.net[0].weight.data.clamp_(-0.6, 0.6)
    task.run(4)
    before = all_state(task)
    assert float(before["lower0"]) > 0  # the constraint is at work
    calls = itertools.count(1)

    def upper():
        loss = task.upper()
        # The first call looks at what these new lines of code use.
        return loss * float("nan") if next(calls) == lower_steps + 1 else loss

    with pytest.raises(NonFiniteError):
        task.optimizer.step(upper, task.lower)
    after = all_state(task)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_first_failing_step_also_changes_nothing():
    task = constrained_task()
    before = all_state(task)
    with pytest.raises(NonFiniteError):
        task.optimizer.step(lambda: task.upper() * float("nan"), task.lower)
    after = all_state(task)
    assert all(torch.equal(before[k], after[k]) for k in before)
    task.run(2)
    assert torch.equal(task.point(), constrained_task().run(2).point())


def test_resume_is_bit_equal():
    whole, first = constrained_task().run(8), constrained_task().run(4)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second = constrained_task()
    second.weights.data.copy_(first.weights.data)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    second.run(4)
    assert torch.equal(whole.point(), second.point())
    mine, theirs = (t.optimizer.inequality_multipliers for t in (whole, second))
    for level in ("upper", "lower"):
        assert float(mine[level][0].sum()) > 0
        assert torch.equal(mine[level][0], theirs[level][0])


def test_a_checkpoint_of_other_inequalities_is_refused():
    state = constrained_task().run(1).optimizer.state_dict()
    plain = Task()
    with pytest.raises(ValueError, match="construct with the same ones"):
        plain.optimizer.load_state_dict(state)


def test_copies_keep_their_projection():
    task = Task(upper_constraint=Box(-0.1, 0.1)).run(3)
    assert float(task.weights.detach().abs().max()) <= 0.1
    twin = copy.deepcopy(task)
    assert torch.equal(twin.run(3).point(), task.run(3).point())


@pytest.mark.filterwarnings("ignore:the lower parameters .* have 16 bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_steps_stay_feasible(dtype):
    u, v = leaf(torch.full((4,), 0.25), dtype), leaf(torch.zeros(4), dtype)
    frozen = torch.full((2,), 7.0, dtype=dtype)
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v, frozen],
        upper_lr=0.05,
        lower_lr=0.05,
        upper_constraint=Simplex(),
        lower_constraint=Ball(0.4),
    )
    for _ in range(40):
        optimizer.step(lambda: (v - 1).square().sum(), lambda: (v - 3 * u).square().sum())
    eps = torch.finfo(dtype).eps
    assert in_set("simplex", u.detach().double(), 4 * eps)
    assert float(v.detach().double().norm()) <= 0.4 * (1 + 16 * eps)
    assert float(v.detach().double().norm()) > 0.39
    assert torch.equal(frozen, torch.full((2,), 7.0, dtype=dtype))


def test_constraints_change_the_outcome():
    """From the same start, near zero; the free run leaves both sets."""

    def run(**options):
        task = Task()
        for p in task.net.parameters():
            p.data.mul_(0.01)
        task.optimizer = PenaltyBilevelOptimizer(
            [task.weights], task.net.parameters(), upper_lr=0.05, lower_lr=0.02, **options
        )
        return task.run(5)

    free = run()
    assert float(free.weights.detach().abs().max()) > 0.01
    assert float(free.net[0].weight.detach().norm()) > 0.1
    boxed, inside = run(upper_constraint=Box(-0.01, 0.01)), run(lower_constraint=Ball(0.1))
    assert float(boxed.weights.detach().abs().max()) <= 0.01
    assert all(float(p.detach().norm()) <= 0.1 * (1 + 1e-12) for p in inside.net.parameters())
    assert not torch.equal(boxed.point(), free.point())
    assert not torch.equal(inside.point(), free.point())


def test_infeasible_points_are_projected_at_the_next_step():
    """E.g. after loading a model: entries outside count as at the bound."""
    u, v = leaf([0.5, 0.5]), leaf(torch.zeros(2))
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_constraint=Box(0, 1), lower_constraint=Box(-1, 1)
    )
    with torch.no_grad():
        u.copy_(torch.tensor([3.0, -2.0]))
        v.copy_(torch.tensor([9.0, 0.0]))
    optimizer.step(lambda: (v - u).square().sum(), lambda: (v - u).square().sum())
    assert bool((u >= 0).all() & (u <= 1).all())
    assert float(v.detach().abs().max()) <= 1


def test_the_paper_rule_takes_projected_constraints():
    """f pulls v to its bound, where u settles at 2u = gamma (v - u) with gamma = 0.01."""
    u, v = leaf([0.2]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v],
        upper_lr=0.02,
        lower_lr=0.02,
        penalty="paper",
        upper_constraint=NonNegative(),
        lower_constraint=Box(-1.0, 0.1),
    )
    for _ in range(200):
        optimizer.step(lambda: (v - 2).square().sum() + u.square().sum(), lambda: follow(u, v))
    assert float(optimizer.metrics.penalty_weight) == 0.01
    assert v.item() == 0.1
    # Adam at u is within 1e-6 of its fixed point after 200 steps.
    assert u.item() == pytest.approx(0.01 * 0.1 / 2.01, abs=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"upper_constraint": Simplex}, TypeError, "upper_constraint must be an object"),
        ({"lower_constraint": 3.0}, TypeError, "lower_constraint must be an object"),
        ({"upper_constraint": [Box(0, 1), Ball(1)]}, ValueError, "two projections, Box and Ball"),
        ({"upper_constraint": Simplex()}, ValueError, r"'upper\[0\]' .* outside of upper_constr"),
        ({"upper_constraint": Box(0, torch.ones(3))}, ValueError, "do not broadcast"),
        ({"upper_constraint": Ball(1, rows=True)}, ValueError, "needs rows, got a parameter"),
        ({"lower_constraint": Simplex()}, ValueError, "Simplex needs a tensor with a last"),
        (
            {"lower_constraint": Inequality(torch.zeros), "penalty": "paper"},
            ValueError,
            "needs a multiplier rule that knows a bound on H",
        ),
        *[
            (
                {"lower_constraint": constraint, "penalty": penalty},
                ValueError,
                f"penalty='{penalty}' cannot serve a lower_constraint.* use penalty=\"stationarity",
            )
            for penalty in ("value", "fixed_point")
            for constraint in (Box(-1, 1), Inequality(torch.zeros))
        ],
    ],
)
def test_level_constraints_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        PenaltyBilevelOptimizer([leaf(torch.zeros(2))], [leaf(0.0)], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lower_constraint": Box(-1, 1)},
        {"lower_constraint": Inequality(torch.zeros)},
        {"upper_constraint": Inequality(torch.zeros)},
    ],
)
def test_the_self_check_refuses_what_it_cannot_compare(options):
    u, v = leaf([0.5]), leaf([0.0])
    optimizer = PenaltyBilevelOptimizer([u], [v], **options)
    (name,) = options
    with pytest.raises(ValueError, match=f"takes no {name} other than an upper projection"):
        optimizer.check_hypergradient(lambda: v.square().sum(), lambda: follow(u, v))


def test_the_self_check_works_beside_an_upper_projection():
    u, v = leaf([0.5]), leaf([0.5])
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_constraint=Box(0, 1))
    report = optimizer.check_hypergradient(lambda: v.square().sum(), lambda: follow(u, v))
    torch.testing.assert_close(report.exact[0].item(), 1.0)


def test_what_an_inequality_returns_is_checked():
    sizes = itertools.count(1)
    for h, error, message in (
        (lambda: 3.0, TypeError, "upper_constraint's Inequality returned float"),
        (lambda: torch.ones(2, dtype=torch.int64), TypeError, "returned torch.int64"),
        (lambda: torch.ones(next(sizes)), ValueError, "its multiplier belongs to entries"),
    ):
        task = Task(upper_constraint=Inequality(h))
        with pytest.raises(error, match=message):
            task.run(2)


@pytest.mark.parametrize(
    "constraint", [Ball(100.0), Box(-100, 100), BoxAndBall(-100, 100, 100.0), Simplex()]
)
def test_sparse_gradients_under_a_constraint_are_refused(constraint):
    table = torch.nn.Embedding(5, 2, sparse=True)
    with torch.no_grad():
        table.weight.copy_(constraint.project(table.weight))
    v = leaf(torch.zeros(2))
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SparseAdam(table.parameters()), [v], upper_constraint=constraint
    )
    with pytest.raises(TypeError, match="needs dense gradients"):
        optimizer.step(
            lambda: (v - 1).square().sum(),
            lambda: (v - table(torch.tensor([1])).sum(0)).square().sum(),
        )
