"""The race of ``benchmarks/race.py`` is fair: its methods compute what they are named after."""

import math

import pytest
import torch

from torch_penalty_bilevel.functional import hypergradient

for library in ("pooch", "requests", "sklearn", "higher", "tqdm", "matplotlib"):
    pytest.importorskip(library)
torchopt = pytest.importorskip("torchopt")

import _race_methods  # noqa: E402
import _race_report  # noqa: E402
import race  # noqa: E402
from _mnist_rows import Problem  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def problem():
    """Twelve and ten random images; every batch is all of them, in another order."""
    images, clean, tests = (torch.rand(n, 784) for n in (12, 10, 8))
    labels, clean_labels, test_labels = (torch.randint(10, (n,)) for n in (12, 10, 8))
    truth = torch.where(torch.arange(12) < 6, labels, (labels + 1) % 10)
    return Problem(images, labels, truth, clean, clean_labels, tests, test_labels, seed=3)


def test_all_methods_start_alike_and_move_both_levels(problem):
    start = _race_methods.Task(problem)
    for name, method in _race_methods.METHODS.items():
        task = _race_methods.Task(problem)
        assert all(torch.equal(a, b) for a, b in zip(task.lower, start.lower, strict=True))
        assert torch.equal(task.here, start.here)
        steps = method.lower_steps[-1]
        step = method.start(task, _race_methods.Rates(1e-3, 0.1, steps))
        for _ in range(3):  # the value gap needs a second step before v and its tracker differ
            step()
        assert float(task.logits.detach().abs().sum()) > 0, name
        assert not torch.equal(task.lower[0], start.lower[0]), name


@pytest.mark.parametrize("iterations", [5, 20])
def test_implicit_row_is_the_hypergradient_by_conjugate_gradients(problem, iterations):
    task, ridge = _race_methods.Task(problem), 1e3  # above all negative curvature of this problem
    solve = torchopt.linear_solve.solve_cg(maxiter=iterations, ridge=ridge, rtol=1e-12)
    _race_methods.implicit(task, _race_methods.Rates(1e-3, 0.0, 2), solve)()
    v = {key: p.detach().clone() for key, p in task.model.named_parameters()}  # after both steps

    def f(u, v):
        return task.upper_loss(task.at(tuple(v.values())))

    def g(u, v):
        return task.lower_loss(task.at(tuple(v.values())), u)

    options = {"max_iterations": iterations, "damping": ridge, "tolerance": 1e-12}
    ours = hypergradient(f, g, task.logits.detach(), v, method="cg", **options)[0]
    torch.testing.assert_close(task.logits.grad, ours, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(("name", "steps"), [("higher unrolled 1", 1), ("higher unrolled 5", 5)])
def test_unrolled_row_is_the_derivative_of_its_own_adam_steps(problem, name, steps):
    """Also in the second upper step, that is, moments and v are carried over."""
    direction, h = torch.randn(12), 1e-7

    def loss_after(shift):
        """F after two upper steps of length zero, u moved by ``shift`` in the last one."""
        task = _race_methods.Task(problem)
        rule = torch.optim.Adam(task.lower, lr=1e-3)
        for upper_step in range(2):
            with torch.no_grad():
                task.logits.copy_(upper_step * shift * direction)
            for inner_step in range(steps):
                # higher adds eps before it corrects the bias of the second moment, torch after.
                power = upper_step * steps + inner_step + 1
                rule.param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999**power)
                rule.zero_grad()
                task.lower_loss().backward()
                rule.step()
        return task.upper_loss().item()

    task = _race_methods.Task(problem)
    step = _race_methods.METHODS[name].start(task, _race_methods.Rates(1e-3, 0.0, steps))
    step()
    step()
    expected = (loss_after(h) - loss_after(-h)) / (2 * h)
    # Central differences of a function of size 2 at h = 1e-5 in float64; ReLU kinks apart.
    assert (task.logits.grad @ direction).item() == pytest.approx(expected, rel=1e-4)


def test_clock_stands_still_while_looking(problem, monkeypatch):
    now = {"training": 0.0, "looking": 0.0}
    monkeypatch.setattr(race.time, "process_time", lambda: now["training"] + now["looking"])

    def start(task, rates):
        def step():
            now["training"] += 0.5

        return step

    def look(task):
        now["looking"] += 100.0
        return {"accuracy": 0.1, "told_right": 0.5, "auc": 0.5}

    monkeypatch.setitem(race.METHODS, "clock", _race_methods.Method(start, "ours", (1,)))
    monkeypatch.setattr(race, "_seen", look)
    result = race.run_for("clock", _race_methods.Rates(1, 1, 1), problem, seconds=3.0)
    assert result["steps"] == 6
    assert result["cpu"] == 3.0
    assert [seen["cpu"] for seen in result["path"]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def path(*accuracies):
    return [
        {"cpu": float(t), "step": t, "accuracy": a, "told_right": a, "auc": a}
        for t, a in enumerate(accuracies, start=1)
    ]


def test_times_and_values_from_a_path():
    run = {"path": path(0.5, 0.8, 0.7)}
    assert _race_report.time_to(run, "accuracy", 0.75) == 2.0
    assert _race_report.time_to(run, "accuracy", 0.9) == math.inf
    assert _race_report.value_at(run, 2.5, "accuracy") == 0.8
    assert _race_report.value_at(run | {"failed": "step 4"}, 9.0, "accuracy") == -math.inf


def test_verdict_divides_by_the_best_peer_and_the_oracle_sets_no_target(capsys):
    rows = {"retrained": 0.7, "told_right": 0.7, "auc": 0.7, "seconds": 1.0}
    simple = [{"filter": rows, "oracle": dict.fromkeys(rows, 1.0)}]
    runs = {
        "mine": [{"path": path(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)}],
        "slow": [{"path": path(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9)}],
        "failed": [{"path": path(0.5, 0.5), "failed": "step 3"}],
        "reference": [{"path": path(0.9)}],
    }
    groups = {"mine": "ours", "slow": "peer", "failed": "peer", "reference": "ours (reference)"}
    rates = {name: _race_methods.Rates(1e-3, 0.1, 1) for name in runs}
    _race_report.print_tables({0.5: (runs, simple)}, rates, groups, 2.0, 8.0)
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("| 0.5, mine")
    assert verdict.count("| 0.12 met") == 6  # 1 / 8: all four targets, and both of the peers'
    assert verdict.count("| +0.000 ") == 3
