"""What ``benchmarks/multipliers`` judges by: exact hypergradients, the rule "exact", the tables."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import digits_l2
from benchmarks.multipliers import __main__ as command
from benchmarks.multipliers import problems, reference, runs, tables
from benchmarks.multipliers.exact import Exact
from benchmarks.multipliers.names import RULES
from benchmarks.multipliers.reference import Hypergradient
from benchmarks.multipliers.runs import End, Job
from examples.shared.record import Record
from torch_penalty_bilevel import testing

ANALYTIC = [name for name in problems.NAMES if name not in ("digits", "digits_batches", "mnist")]
NOWHERE = Path("no data")


@pytest.fixture(autouse=True)
def dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def vectors(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def closed_form(name, seed):
    kind, options = problems._ANALYTIC[name]
    return testing.get(kind, **options, seed=seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ANALYTIC)
def test_exact_hypergradients_are_those_of_the_closed_solution(name, seed):
    task, problem = problems.make(name, seed, NOWHERE), closed_form(name, seed)
    u, v = task.u, task.v
    best = problem.best_lower(u)

    # v* is linear in u, so that v moves by v*(w) - v*(u) when u goes to w, wherever v is.
    def moved(w):
        return task.f(w, v + problem.best_lower(w) - best)

    found = reference.with_adjoint(task.f, task.g, u, v, task.adjoint(u, v)).value
    assert_close(found, torch.func.grad(moved)(u), rtol=1e-10, atol=1e-11)
    assert task.solved is not None
    solved = task.solved(u, v)
    found = reference.with_adjoint(task.f, task.g, u, solved, task.adjoint(u, solved)).value
    assert_close(found, torch.func.grad(problem.hyperobjective)(u), rtol=1e-10, atol=1e-11)
    if problem.exact_hypergradient is not None:
        assert_close(found, problem.exact_hypergradient(u), rtol=1e-10, atol=1e-11)


def test_the_hessian_of_the_digits_is_that_of_their_loss():
    x, y = digits_l2.shuffled(0)
    x = x[:50, 18:24]
    _, g = digits_l2.losses_on(x, y[:50], slice(50), slice(50))
    u, v = vectors((6,), (6, 10))
    found = problems.softmax_hessian(x, u, v)
    assert_close(found, reference.lower_hessian(g, u, v), rtol=1e-12, atol=1e-14)


def test_the_solved_hypergradient_of_the_digits_is_the_slope_of_the_solved_loss():
    x, y = digits_l2.shuffled(0)
    x, y = x[:120, 18:24], y[:120]
    f, g = digits_l2.losses_on(x, y, slice(60), slice(60, 120))
    hessian = partial(problems.softmax_hessian, x[:60])
    u, start, direction = vectors((6,), (6, 10), (6,))
    u = u - 5

    def solved_loss(w):
        best = reference.solve_lower(g, hessian, w, start)
        assert torch.func.grad(g, argnums=1)(w, best).norm() <= 1e-11
        return float(f(w, best))

    # Central differences: an error of h^2 and of rounding / h.
    h = 1e-4
    slope = (solved_loss(u + h * direction) - solved_loss(u - h * direction)) / (2 * h)
    best = reference.solve_lower(g, hessian, u, start)
    q = reference.exact_adjoint(f, hessian, u, best)
    found = reference.with_adjoint(f, g, u, best, q).value
    assert float(found @ direction) == pytest.approx(slope, rel=1e-6)
    damped = reference.damped_adjoint(f, g, u, best, damping=0.1)
    matrix = hessian(u, best) + 0.1 * torch.eye(60)
    slope_f = torch.func.grad(f, argnums=1)(u, best).reshape(-1)
    # 1e-2: its conjugate gradients stop at a residual of 1e-3.
    assert_close(
        damped.reshape(-1),
        -torch.linalg.solve(matrix, slope_f),
        rtol=0,
        atol=1e-2 * float(damped.norm()),
    )


def test_an_unsolved_lower_level_is_an_error():
    flat = partial(reference.solve_lower, lambda u, v: v.exp().sum(), lambda u, v: v.exp().diag())
    with pytest.raises(RuntimeError, match="not solved"):
        flat(torch.zeros(1), torch.full((1,), 90.0))


def test_the_error_is_bounded_sees_the_sign_and_leaves_rounding_out():
    def of(*values, noise=0.0):
        return Hypergradient(torch.tensor(values), noise)

    assert reference.error(of(3.0, 4.0), of(3.0, 4.0)) == 0
    assert reference.error(of(3.0, 4.0), of(-3.0, -4.0)) == 2
    assert reference.error(of(6.0, 8.0), of(3.0, 4.0)) == pytest.approx(0.5)
    assert reference.error(of(3.0, 4.0), of(6.0, 8.0)) == pytest.approx(0.5)
    assert reference.error(of(1e-15), of(-1e-15, noise=1e-13)) == 0
    assert reference.error(of(1e-15), of(1e-3, noise=1e-13)) == pytest.approx(1)
    assert reference.error(of(0.0), of(0.0)) == 0


def steps_of(task, rule, steps, change=None):
    """(the step's look, its hypergradient of all data, u.grad), and how often q was solved for."""
    solves = 0
    optimizer, penalty, u, v = runs.optimizer_of(task, rule)
    if isinstance(penalty.rule, Exact):

        def solve():
            nonlocal solves
            solves += 1
            q = task.adjoint(u, v)
            return q if change is None else change(q)

        penalty.rule.take(solve, task.lower_steps)
    found = []
    for _ in range(steps):
        before = u.detach().clone()
        f, g = (task.f, task.g) if task.batch is None else task.batch()
        optimizer.step(lambda f=f: f(u, v), lambda g=g: g(u, v))
        estimate = reference.with_adjoint(task.f, task.g, before, penalty.v, penalty.q)
        found.append((runs.look(task, before, penalty.v, penalty.q), estimate.value, u.grad))
    return found, solves


@pytest.mark.parametrize("rule", RULES)
def test_without_batches_what_is_judged_is_the_gradient_that_moved_u(rule):
    found, _ = steps_of(problems.make("quadratic1", 0, NOWHERE), rule, 5)
    for _, judged, applied in found:
        assert_close(judged, applied, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["quadratic3", "smd23", "least_squares"])
def test_the_exact_rule_has_no_error_of_its_own(name):
    task = problems.make(name, 0, NOWHERE)
    found, solves = steps_of(task, "exact", 10)
    assert solves == 10
    assert all(look.here < 1e-10 for look, _, _ in found)
    # v lags behind u, which moves by up to 0.1 a step.
    assert all(look.solved > 1e-3 for look, _, _ in found)
    others, _ = steps_of(task, "default", 10)
    assert max(look.here for look, _, _ in others) > 1e-3


def test_the_exact_multiplier_stays_until_the_next_evaluation_that_serves_u():
    task = problems.make("quadratic1", 0, NOWHERE)
    optimizer, penalty, u, v = runs.optimizer_of(task, "exact")
    losses = (lambda: task.f(u, v)), (lambda: task.g(u, v))
    optimizer.step(*losses)
    served = penalty.q
    for _ in range(task.lower_steps - 1):
        optimizer.lower_step(*losses)
        assert_close(penalty.q, served, rtol=0, atol=0)
    optimizer.lower_step(*losses)
    assert (penalty.q - served).norm() > 1e-3 * served.norm()


def test_another_sign_or_length_of_the_exact_multiplier_is_seen():
    task = problems.make("quadratic1", 0, NOWHERE)
    for change, least in ((torch.neg, 0.1), (lambda q: 1.01 * q, 1e-4)):
        found, _ = steps_of(task, "exact", 5, change)
        assert min(look.here for look, _, _ in found) > least


def test_with_batches_the_exact_rule_has_the_multiplier_of_all_data():
    task = problems.make("digits_batches", 0, NOWHERE)
    found, solves = steps_of(task, "exact", 4)
    assert solves == 4
    assert all(look.here < 1e-10 for look, _, _ in found)
    others, _ = steps_of(task, "default", 4)
    assert others[-1][0].here > 1e-3


def test_a_run_that_breaks_off_is_infinite():
    task = problems.make("quadratic1", 0, NOWHERE)
    end = runs.followed(task, "default", share=0.05)
    assert all(math.isfinite(x) for x in end)
    lost = problems.replace(task, g=lambda u, v: task.g(u, v) + math.nan)
    end = runs.followed(lost, "default", share=0.05)
    assert end[:3] == (math.inf,) * 3


def ends_of(scores):
    """Ends whose three values are those given, by rule and problem, one per seed."""
    return {
        Job(rule, problem, seed, NOWHERE, 1.0): End(x, x, x, 3.0, x > 5)
        for (rule, problem), values in scores.items()
        for seed, x in enumerate(values)
    }


def test_tables_say_median_range_and_standing():
    ends = ends_of(
        {
            ("default", "smd22"): [1.0, 3.0, 2.0],
            ("default", "mnist"): [math.nan] * 3,
            ("cg", "smd22"): [0.5, 2.5, 1.5],
            ("cg", "mnist"): [math.nan] * 3,
            ("adam", "smd22"): [2.0, math.inf, 2.5],
            ("adam", "mnist"): [math.nan] * 3,
            ("bb_long", "smd22"): [0.5, 3.5, 2.0],
            ("bb_long", "mnist"): [math.nan] * 3,
        }
    )
    title = "End"
    text = tables.table(title, ["default", "cg", "adam", "bb_long"], ["smd22", "mnist"], ends)
    assert text.splitlines()[2:] == [
        "| rule | cost | below, above | smd22 | mnist |",
        "|---|---|---|---|---|",
        "| default | 3.0 |  | 2 (1 to 3) |  |",
        "| cg | 3.0 | 1, 0 | 1.5 (0.5 to 2.5) |  |",
        "| adam | 3.0 | 0, 1 | 2.5 (2 to inf), warned 1 |  |",
        "| bb_long | 3.0 | 0, 0 | 2 (0.5 to 3.5) |  |",
    ]


def test_recorded_runs_are_not_run_again(tmp_path, monkeypatch):
    record = Record(tmp_path / "runs.jsonl")
    job = Job("default", "quadratic1", 0, NOWHERE, 0.02)
    first = command.ended([job], 1, record)
    monkeypatch.setattr(command, "run", None)  # calling it would fail
    again = command.ended([job], 1, Record(tmp_path / "runs.jsonl"))
    assert again == first
    assert isinstance(again[job], End)
