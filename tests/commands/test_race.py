"""The race of ``benchmarks/race``: clock, record, targets and verdict."""

import math
import time

import pytest

for library in ("PIL", "pooch", "requests", "sklearn", "higher", "tqdm", "matplotlib", "torchopt"):
    pytest.importorskip(library)

from racing import mnist_task  # noqa: E402

from benchmarks.race import __main__ as race  # noqa: E402
from benchmarks.race import report  # noqa: E402
from benchmarks.race.problem import Method, Picture, Problem  # noqa: E402
from examples.shared.solvers import Solver  # noqa: E402
from examples.shared.task import Rates  # noqa: E402


def of_clocks(methods, look=None):
    """A race with one score and no data."""
    return Problem(
        conditions={"noise 0.5": {"noise": 0.5}},
        tuning={"noise": 0.5, "seed": 100},
        upper=(1.0,),
        methods=methods,
        make=lambda condition: condition,
        start=lambda data: mnist_task(),
        look=look,
        baselines=lambda data: {},
        scores={"accuracy": "accuracy", "told_right": "told right", "auc": "AUC"},
        targets=tuple((name, s) for name in ("accuracy", "told_right") for s in (0.95, 0.995)),
        ended={"accuracy": "retrained"},
        picture=Picture("accuracy", 0.0, {"filter": "s"}),
        growth=1.25,
    )


def test_clock_stands_still_while_looking(monkeypatch):
    now = {"training": 0.0, "looking": 0.0}
    monkeypatch.setattr(race.time, "process_time", lambda: now["training"] + now["looking"])

    def start(task, rates):
        def step():
            now["training"] += 0.5

        return Solver(step, ())

    def look(task):
        now["looking"] += 100.0
        return {"accuracy": 0.1, "told_right": 0.5, "auc": 0.5}

    problem = of_clocks({"clock": Method(start, "ours", (1,), (1.0,))}, look)
    result = race.run_for("clock", Rates(1, 1, 1), problem, None, seconds=3.0)
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
    assert report.time_to(run, "accuracy", 0.75) == 2.0
    assert report.time_to(run, "accuracy", 0.9) == math.inf
    assert report.value_at(run, 2.5, "accuracy") == 0.8
    assert report.value_at(run | {"failed": "step 4"}, 9.0, "accuracy") == -math.inf


def test_verdict_divides_by_the_best_peer_and_the_oracle_sets_no_target(capsys, tmp_path):
    rows = {"retrained": 0.7, "told_right": 0.7, "auc": 0.7, "seconds": 1.0}
    simple = [{"filter": rows, "oracle": dict.fromkeys(rows, 1.0)}]
    runs = {
        "mine": [{"path": path(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)}],
        "slow": [{"path": path(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9)}],
        "failed": [{"path": path(0.5, 0.5), "failed": "step 3"}],
        "reference": [{"path": path(0.9)}],
    }
    groups = {"mine": "ours", "slow": "peer", "failed": "peer", "reference": "ours (reference)"}
    methods = {name: Method(None, group, (1,), (1.0,)) for name, group in groups.items()}
    rates = {name: Rates(1e-3, 0.1, 1) for name in runs}
    races, problem = {"noise 0.5": (runs, simple)}, of_clocks(methods)
    report.print_tables(races, rates, problem, 2.0, 8.0)
    report.draw(races, problem, tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("| noise 0.5, mine")
    assert verdict.count("| 0.12 met") == 6  # 1 / 8: all four targets, and both of the peers'
    assert verdict.count("| +0.000 ") == 3


def test_runs_are_found_again_by_what_defines_them(tmp_path):
    """The keys of the published record of the MNIST race."""
    calls = []

    def start(task, rates):
        def step():
            calls.append(rates)
            time.sleep(0.002)
            sum(range(20_000))

        return Solver(step, ())

    problem = of_clocks({"m": Method(start, "ours", (1, 5), (0.1,))}, lambda task: path(0.5)[0])
    for _ in range(2):
        record = race.Record(tmp_path / "record.jsonl")
        rates = race.race(record, problem, [0], 0.01, 0.01, ["m"])
        before = len(calls)
    assert rates == {"m": Rates(0.1, 1.0, 1)}
    assert calls
    assert len(calls) == before
    known = {"method": "m", "lower": 0.1, "upper": 1.0, "lower_steps": 1, "noise": 0.5}
    assert {**known, "seed": 0, "seconds": 0.01} in record
    assert {**known, "seed": 100, "seconds": 0.01, "lower_steps": 5} in record
    assert {"method": "baselines", "seed": 0, "noise": 0.5} in record
    assert len(record.lines) == 4
