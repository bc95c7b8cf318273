"""The profiles of ``benchmarks/profiles``: their arithmetic, what is counted, what is judged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

for library in ("pooch", "requests", "scipy", "sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(library)

from benchmarks.profiles import __main__ as profiles  # noqa: E402
from benchmarks.profiles import problems, report, trial  # noqa: E402
from benchmarks.profiles.arithmetic import (  # noqa: E402
    best_known,
    cost,
    one_setting,
    ratios,
    shares,
)
from benchmarks.profiles.settled import settled  # noqa: E402
from benchmarks.profiles.solvers import POWER_STEPS, SOLVERS, curvature, is_last  # noqa: E402
from examples.shared.record import Record  # noqa: E402

INF = math.inf


def test_profiles_of_a_case_by_hand():
    """F* = 1, F(u_0) = 11: solved to 0.1 is F <= 2, to 0.001 F <= 1.01."""
    path = [(10, 5.0), (15, 2.05), (20, 2.0), (40, 9.0), (60, 1.0105), (80, 1.005)]
    result = {"first": 11.0, "best": 1.0, "path": path}
    assert cost(result, 1.0, 0.1) == 20
    assert cost(result, 1.0, 0.001) == 80
    assert cost(result, 1.0, 0.0001) == INF
    # First solved counts, whatever comes then; a costlier look at the bound itself is in.
    assert shares([20, INF, 40, 300], [19, 20, 40, 1000]) == [0, 0.25, 0.5, 0.75]
    both = ratios({"a": [20, INF, 40, INF], "b": [10, 30, INF, INF]})
    assert both == {"a": [2, INF, 1, INF], "b": [1, 1, INF, INF]}
    # Of four problems, the one that nobody solved included.
    assert shares(both["a"], [1, 1.9, 2, 100]) == [0.25, 0.25, 0.5, 0.5]


def test_the_best_value_is_known_or_the_least_seen_by_anyone():
    runs = [
        {"best": None, "first": 3.0, "path": [(10, 2.5)]},
        {"best": None, "first": 3.0, "path": [(10, 2.75), (20, 2.25), (30, 4.0)]},
        {"best": None, "first": 3.0, "path": []},
    ]
    assert best_known(runs) == 2.25
    assert best_known([{**run, "best": 1.5} for run in runs]) == 1.5


def test_an_infinite_start_is_refused():
    with pytest.raises(ValueError, match="F at the start is inf"):
        cost({"first": INF, "path": [(10, INF)]}, 0.0, 0.1)


def test_the_one_setting_solves_most_and_then_soonest():
    costs = {"few": [10, INF, INF], "late": [900, 900, INF], "soon": [800, 900, INF]}
    assert one_setting(costs, 1000) == "soon"
    assert one_setting({**costs, "all": [1000, 1000, 1000]}, 1000) == "all"


class Counted:
    """Backward passes so far, and what a solver said of them at each of its first steps."""

    def __init__(self, monkeypatch):
        self.passes, self.seen, real = 0, [], torch.autograd.grad

        def counting(*of, **options):
            self.passes += 1
            return real(*of, **options)

        monkeypatch.setattr(torch.autograd, "grad", counting)

    def __call__(self, spent, u, v, last):
        self.seen.append((spent, self.passes))
        return len(self.seen) == 6

    def per_step(self):
        """What each step after the first has cost: as said, and in backward passes."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


# Forward mode pushes forward, and minimize makes whole Hessians in one pass, charged by columns.
IN_PASSES = [name for name in SOLVERS if name not in ("forward", "minimize")]


@pytest.mark.parametrize("name", IN_PASSES)
def test_every_evaluation_is_one_backward_pass(name, monkeypatch, tmp_path):
    """Whoever counts, a gradient or a product is one call of ``torch.autograd.grad``."""
    problem = problems.instance("quadratic", 0, tmp_path)
    counted = Counted(monkeypatch)
    SOLVERS[name].run(problem, SOLVERS[name].rates[0], 10**6, counted)
    said, passes = zip(*counted.per_step(), strict=True)
    assert said == passes
    # The first step looks once for dependences, which is not charged; the products of the power
    # method are, its gradient is not.
    first, passed = counted.seen[0]
    assert first <= passed <= first + 2


def test_counts_by_hand(monkeypatch, tmp_path):
    """Five lower steps: of f, g and a product each, or of g alone, and what u takes."""
    problem = problems.instance("quadratic", 0, tmp_path)
    columns = problem.u.numel()
    by_hand = {
        "value": 5 * 3,
        "paper": 6 * 3,  # evaluates anew for u
        "alternating": 5 + 2,
        "one_step": 5 + 2 + 1,
        "reverse": 5 + 1 + 5 * 2 + 2,  # back through five steps, and the certificate
        "neumann": 5 + 2 + 10 + 2,
        "forward": 5 + 2 + (5 + 2) * columns,
    }
    for name, expected in by_hand.items():
        counted = Counted(monkeypatch)
        SOLVERS[name].run(problem, SOLVERS[name].rates[0], 10**6, counted)
        assert {said for said, _ in counted.per_step()} == {expected}, name


def test_minimize_charges_at_least_its_backward_passes(monkeypatch, tmp_path):
    problem = problems.instance("quadratic", 0, tmp_path)
    counted = Counted(monkeypatch)
    SOLVERS["minimize"].run(problem, (0.0, 0.0), 10**6, counted)
    assert len(counted.seen) > 1
    assert all(said >= passes > 0 for said, passes in counted.per_step())


def test_the_power_method_is_charged_and_finds_the_curvature(tmp_path):
    problem = problems.instance("quadratic", 0, tmp_path)
    H = torch.func.hessian(problem.g, argnums=1)(problem.u, problem.v)
    assert curvature(problem) == pytest.approx(float(torch.linalg.matrix_norm(H, 2)), rel=0.05)
    spent = []
    SOLVERS["one_step"].run(problem, (0.1, 0.1), 40, lambda *at: bool(spent.append(at[0]) or at[3]))
    assert spent == [POWER_STEPS + 8, POWER_STEPS + 16]  # one more would be 44
    for name, step in (("reverse", 18), ("forward", 35), ("fixed_point", 17)):
        SOLVERS[name].run(problem, (0.1, 0.1), 1, lambda *at: bool(spent.append(at[0]) or True))
        assert spent[-1] == POWER_STEPS + step, name


def test_the_last_step_is_the_one_before_which_passes_the_budget():
    assert is_last(80, 90, 99)
    assert not is_last(80, 90, 100)


def test_settled_is_the_nearest_lower_solution():
    """A v = B u leaves a null space free: v - A^+ (A v - B u)."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(3, n, generator=generator).double() for n in (6, 2))
    u, v = (torch.randn(n, generator=generator).double() for n in (2, 6))
    found = settled(lambda u, v: (A @ v - B @ u).square().sum() / 2, u, v)
    assert_close(found, v - torch.linalg.pinv(A) @ (A @ v - B @ u), rtol=0, atol=1e-7)


def test_settled_in_other_units_is_the_ridge_solution():
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(20, *n, generator=generator).double() for n in ((5,), ()))
    u = torch.tensor([-8.0, -3.0, 0.0, 3.0, 8.0]).double()

    def g(u, v):
        return ((X @ v - y).square().sum() + (u.exp() * v.square()).sum()) / 2

    found = settled(g, u, torch.ones(5).double(), (20 + u.exp()).rsqrt())
    expected = torch.linalg.solve(X.T @ X + torch.diag(u.exp()), X.T @ y)
    assert_close(found, expected, rtol=0, atol=1e-8)


def test_u_is_judged_at_a_lower_solution(tmp_path):
    """A v that f likes and g does not is worth nothing."""
    problem = problems.instance("quadratic", 0, tmp_path)
    analytic = problems.testing.get("quadratic", seed=0)
    u, v = analytic.solution()
    liked = v - 0.1 * torch.func.grad(problem.f, argnums=1)(u, v)
    assert float(problem.f(u, liked)) < problem.best - 1e-3
    assert float(problem.worth(u, liked)) == pytest.approx(problem.best, abs=1e-12)


def test_where_g_leaves_v_free_the_choice_is_the_solvers(tmp_path):
    """v_1 is free, and f = ((u - v_1)^2 + (v_0 - 1)^2) / 2 wants v_1 = u = 1."""
    problem = problems.instance("free_coordinate", 0, tmp_path)
    u, v = torch.tensor([1.0]).double(), torch.tensor([5.0, 1.0]).double()
    assert float(problem.worth(u, v)) == pytest.approx(0.0, abs=1e-12)
    v = torch.tensor([1.0, 4.0]).double()
    assert float(problem.worth(u, v)) == pytest.approx(4.5, rel=1e-6)


def test_what_does_not_settle_is_worth_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(problems, "settled", lambda g, u, v: v)
    problem = problems.instance("free_coordinate", 0, tmp_path)
    off = torch.tensor([1.0]).double(), torch.tensor([1.1, 1.0]).double()
    assert float(problem.worth(*off)) == INF


def one(solver, tmp_path, budget=60):
    return trial.run(trial.Trial(solver, (0.1, 0.1), "quadratic", 0, budget), tmp_path)


def test_failures_are_kept_with_their_reason(monkeypatch, tmp_path):
    def explodes(problem, rates, budget, watch):
        watch(20, problem.u, problem.v, False)
        raise ArithmeticError("of no use")

    def runs_off(problem, rates, budget, watch):
        watch(20, problem.u * math.nan, problem.v, False)

    monkeypatch.setitem(SOLVERS, "explodes", SOLVERS["cg"]._replace(run=explodes))
    monkeypatch.setitem(SOLVERS, "runs off", SOLVERS["cg"]._replace(run=runs_off))
    ended = one("explodes", tmp_path)
    assert ended["path"] == [(20, ended["first"])]
    assert report.reason(ended) == "raised ArithmeticError"
    assert report.reason(one("runs off", tmp_path)) == "ran off"
    assert report.reason({"ended": "over", "warned": "v has run off"}) == "warned"
    assert report.reason({"ended": "over", "warned": ""}) == "budget"


def test_nothing_is_seen_beyond_the_budget(tmp_path):
    spent = [look[0] for look in one("default", tmp_path)["path"]]
    assert spent == sorted(spent)
    assert 45 < spent[-1] <= 60
    problem = problems.instance("quadratic", 0, tmp_path)
    looks = trial.Looks(problem, 60)
    assert looks(61, problem.u, problem.v, True)  # a step that went further than it seemed
    assert looks.path == []


def arguments(folder, *more):
    return [
        "profiles", "--problems", "scalar_ridge", "digits", "--tuning", "scalar_ridge",
        "--solvers", "cg", "minimize", "--seeds", "1", "--budget", "60", "--data", str(folder),
        "--results", str(folder / "runs.jsonl"), *more,
    ]  # fmt: skip


def test_a_run_that_was_cut_off_goes_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profiles.sys, "argv", arguments(tmp_path))
    profiles.main()
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    # Tuning: four settings of cg and the long run; then two solvers and the long runs.
    assert len(lines) == 5 + 2 * 3
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("cg", "minimize", "scalar_ridge", "digits"))
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:7]) + "\n")
    profiles.main()
    again = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == [json.loads(line) for line in lines]
    assert capsys.readouterr().out == said


def test_problems_without_data_are_skipped_and_named(capsys, tmp_path):
    assert profiles.available(["sine", "autompg", "newsgroups"], tmp_path) == ["sine"]
    said = capsys.readouterr().err
    assert all(f"{name} is skipped" in said for name in ("autompg", "newsgroups"))


def test_what_is_left_on_data_is_relative_to_the_start():
    """F* = 1 of F(u_0) = 5: F = 2 at the end leaves a quarter; known optima are not listed."""
    runs = [{"first": 5.0, "best": b, "path": [(10, 4.0), (20, 2.0)]} for b in (1.0, None)]
    places, best = [("sine", 0), ("digits", 0)], [1.0, 1.0]
    found = report.Found(places, {"cg": runs}, {}, best, {}, 60)
    assert report.on_data(found).splitlines()[0] == "| left of F - F*, median | digits |"
    assert report.on_data(found).splitlines()[2] == "| cg | 0.250 |"


def test_labels_stand_apart_around_their_heights():
    placed = report.apart({"a": 0.5, "b": 0.5, "c": 0.9, "d": 0.51}, 0.1)
    assert placed == pytest.approx({"a": 0.4033, "b": 0.5033, "d": 0.6033, "c": 0.9}, abs=1e-3)


def test_a_record_lists_its_runs(tmp_path):
    record = Record(tmp_path / "runs.jsonl")
    record.add({"a": 1}, {"b": 2})
    assert Record(record.path).runs() == [({"a": 1}, {"b": 2})]
