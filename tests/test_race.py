"""The race of ``benchmarks/race.py`` is fair: its methods compute what they are named after."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel.functional import hypergradient

for library in ("pooch", "requests", "sklearn", "higher", "tqdm", "matplotlib"):
    pytest.importorskip(library)
torchopt = pytest.importorskip("torchopt")

import _l2_problem  # noqa: E402
import _race_l2  # noqa: E402
import _race_methods  # noqa: E402
import _race_mnist  # noqa: E402
import _race_omniglot  # noqa: E402
import _race_report  # noqa: E402
import race  # noqa: E402
from _mnist_rows import Problem  # noqa: E402
from _race_problem import Method, Picture, Rates  # noqa: E402
from _race_problem import Problem as RaceProblem  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def mnist_task():
    """Twelve and ten random images; every batch is all of them, in another order."""
    generator = torch.Generator().manual_seed(0)
    images, clean, tests = (torch.rand(n, 784, generator=generator) for n in (12, 10, 8))
    labels, clean_labels, test_labels = (
        torch.randint(10, (n,), generator=generator) for n in (12, 10, 8)
    )
    truth = torch.where(torch.arange(12) < 6, labels, (labels + 1) % 10)
    problem = Problem(images, labels, truth, clean, clean_labels, tests, test_labels, seed=3)
    return _race_mnist.Task(problem)


def l2_problem():
    generator = np.random.default_rng(0)
    X = generator.random((60, 12)) * (generator.random((60, 12)) < 0.5)
    y = generator.integers(3, size=60)
    y[:3] = 0, 1, 2
    test = _l2_problem.Rows(csr_matrix(X[40:]), y[40:], torch.float64)
    return _l2_problem.assemble(
        csr_matrix(X), y, np.arange(20), np.arange(20, 40), test, torch.float64
    )


def l2_task():
    return _race_l2.Task(l2_problem())


def omniglot_task():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.rand(40, 8, 1, 14, 14), torch.rand(9, 6, 1, 14, 14)
    tasks = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(7)])
    return _race_omniglot.Task(_race_omniglot.Problem(train, test, tasks, seed=3))


TASKS = {"mnist": mnist_task, "l2": l2_task, "omniglot": omniglot_task}
METHODS = {
    "mnist": _race_methods.methods_of(_race_mnist.GRID, ridge=0.1, damping=1.0),
    "l2": _race_l2._methods(),
    "omniglot": _race_methods.methods_of(_race_omniglot.GRID),
}


@pytest.fixture(params=TASKS)
def start(request):
    """Makes the same task again and again."""

    def make():
        torch.manual_seed(5)
        return TASKS[request.param]()

    make.methods = METHODS[request.param]
    return make


def test_all_methods_start_alike_and_move_both_levels(start):
    first = start()
    for name, method in start.methods.items():
        task = start()
        for level in ("upper", "lower"):
            pairs = zip(getattr(task, level), getattr(first, level), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(task.upper_loss(), first.upper_loss())
        assert torch.equal(task.lower_loss(), first.lower_loss())
        step = method.start(task, Rates(1e-3, 0.1, method.lower_steps[-1]))
        for _ in range(3):  # the value gap needs a second step before v and its tracker differ
            step()
        for level in ("upper", "lower"):
            pairs = zip(getattr(task, level), getattr(first, level), strict=True)
            assert all(not torch.equal(a, b) for a, b in pairs), (name, level)


def test_nothing_leaves_the_box():
    for name, method in METHODS["l2"].items():
        task = l2_task()
        step = method.start(task, Rates(0.1, 100.0, 1))
        for _ in range(2):  # the first multiplier is 0
            step()
        (u,), box = task.upper, task.upper_constraint
        assert u.min() >= box.low, name
        assert u.max() <= box.high, name
        assert (u == box.low).any() or (u == box.high).any(), name


@pytest.mark.parametrize("iterations", [5, 20])
def test_implicit_row_is_the_hypergradient_by_conjugate_gradients(start, iterations):
    task, ridge = start(), 1e3  # above all negative curvature of these problems
    solve = torchopt.linear_solve.solve_cg(maxiter=iterations, ridge=ridge, rtol=1e-12)
    _race_methods.implicit(task, Rates(1e-3, 0.0, 2), lambda task: solve)()
    u, v = (tuple(p.detach().clone() for p in level) for level in (task.upper, task.lower))
    ours = hypergradient(
        lambda u, v: task.upper_loss(v, u),
        lambda u, v: task.lower_loss(v, u),
        u,
        v,
        method="cg",
        max_iterations=iterations,
        damping=ridge,
        tolerance=1e-12,
    )[0]
    for p, expected in zip(task.upper, ours, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("which", [0, -1])
def test_unrolled_row_is_the_derivative_of_its_own_adam_steps(start, which):
    """Also in the second upper step, that is, moments (and v, unless it begins anew) are kept."""
    h, directions = 1e-8, [torch.randn_like(p) for p in start().upper]
    names = [name for name in start.methods if "unrolled" in name]
    name, method = names[which], start.methods[names[which]]
    (steps,) = method.lower_steps
    assert name.endswith(f" {steps}")

    def loss_after(shift):
        """F after two upper steps of length zero, u moved by ``shift`` in the last one."""
        task = start()
        rule = torch.optim.Adam(task.lower, lr=1e-3)
        for upper_step in range(2):
            task.begin()
            with torch.no_grad():
                for p, direction in zip(task.upper, directions, strict=True):
                    p.add_(direction, alpha=upper_step * shift)
            for inner_step in range(steps):
                task.draw()
                # higher adds eps before it corrects the bias of the second moment, torch after.
                power = upper_step * steps + inner_step + 1
                rule.param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999**power)
                rule.zero_grad()
                task.lower_loss().backward()
                rule.step()
        return task.upper_loss().item()

    task = start()
    step = method.start(task, Rates(1e-3, 0.0, steps))
    step()
    step()
    expected = (loss_after(h) - loss_after(-h)) / (2 * h)
    found = sum((p.grad * d).sum() for p, d in zip(task.upper, directions, strict=True)).item()
    # Central differences of a function of size 2 in float64; Adam is curved, so h is small.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_omniglot_losses_task_by_task():
    task = omniglot_task()
    before = task.support
    task.lower[0].data.normal_()
    task.begin()
    assert not torch.equal(task.support, before)
    assert not task.lower[0].any()
    heads = task.lower[0].data.normal_()
    upper, lower = torch.zeros(()), torch.zeros(())
    for number, head in enumerate(heads):
        for character in range(_race_omniglot.WAYS):
            place = number * _race_omniglot.WAYS + character
            for count, image in enumerate([task.support[place], *task.query.split(5)[place]]):
                phi = task.network(image[None])[0]
                phi = _race_omniglot.SCALE * phi / phi.norm()
                loss = -(head @ phi).log_softmax(0)[character] / _race_omniglot.WAYS
                if count:
                    upper = upper + loss / _race_omniglot.QUERIES / _race_omniglot.TASKS
                else:
                    lower = lower + loss / _race_omniglot.TASKS
        lower = lower + _race_omniglot.DECAY / 2 * head.square().sum() / _race_omniglot.TASKS
    # Sums in another order: rounding.
    torch.testing.assert_close(task.upper_loss(), upper, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.lower_loss(), lower, rtol=1e-12, atol=0)


def test_holding_the_upper_level_changes_cost_only():
    task = omniglot_task()
    with torch.no_grad():
        task.lower[0].normal_()
    free = task.upper_loss(), task.lower_loss()
    with task.held_upper(graph=True):
        held = task.upper_loss(), task.lower_loss()
    for loss, other in zip(free, held, strict=True):
        pairs = (torch.autograd.grad(value, [*task.upper, *task.lower]) for value in (loss, other))
        for expected, found in zip(*pairs, strict=True):
            assert torch.equal(expected, found)
    with task.held_upper():
        assert task.upper_loss() == free[0]
        assert task.lower_loss().requires_grad
        grads = torch.autograd.grad(task.lower_loss(), task.upper, allow_unused=True)
        assert grads == (None,) * len(task.upper)
    assert task.held is None


def test_test_accuracy_is_that_of_heads_fitted_to_the_end():
    problem = omniglot_task().problem
    features = torch.randn(9, 6, 20)
    features = _race_omniglot.SCALE * torch.nn.functional.normalize(features, dim=2)
    right = 0
    for task in problem.tasks:
        support, queries = features[task, 0], features[task, 1:]
        head = torch.zeros(5, 20, requires_grad=True)
        rule = torch.optim.LBFGS([head], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def loss(head=head, support=support, rule=rule):
            rule.zero_grad()
            value = cross_entropy(support @ head.T, torch.arange(5))
            value = value + _race_omniglot.DECAY / 2 * head.square().sum()
            value.backward()
            return value

        rule.step(loss)
        kernel = (support @ support.T)[None]
        found = _race_omniglot.solved(kernel)[0].T @ support
        # 200 steps that contract by (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)) = 2/3.
        torch.testing.assert_close(found, head.detach(), rtol=1e-6, atol=1e-8)
        right += ((queries @ head.T).argmax(-1) == torch.arange(5)[:, None]).sum().item()
    assert _race_omniglot.accuracy(features, problem.tasks) == pytest.approx(right / (7 * 25))


def test_no_character_is_both_learnt_and_asked():
    names = torch.arange(1100.0)[:, None, None, None, None].expand(1100, 20, 1, 14, 14)
    data = names, torch.arange(1100) % 8 == 1
    seen = {}
    for tuning in (False, True):
        problem = _race_omniglot.make_problem(data, 0, tuning)
        assert problem.test.shape[1] == 1 + _race_omniglot.QUERIES
        seen[tuning] = [{*images.flatten().tolist()} for images in (problem.train, problem.test)]
        assert all(len({*task.tolist()}) == 5 for task in problem.tasks)
    assert seen[False][0] == seen[True][0]
    assert not seen[False][0] & seen[False][1]
    assert not seen[True][0] & seen[True][1]
    assert not seen[True][1] & seen[False][1]


def test_gain_is_of_u_alone():
    task = l2_task()
    assert _race_l2.look(task)["gain"] == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        task.upper[0].fill_(1.0)
    seen = []
    for scale in (0.0, 3.0):  # v stopped early or anywhere else
        with torch.no_grad():
            task.lower[0].normal_().mul_(scale)
        seen.append(_race_l2.look(task))
    assert seen[0]["running"] != seen[1]["running"]
    # L-BFGS ends when a step gains less than 1e-7 of the loss; there may have been many more.
    assert seen[0]["gain"] == pytest.approx(seen[1]["gain"], abs=1e-4)
    problem = l2_problem()
    u, v = torch.ones(12), torch.zeros(12, 3)
    loss = problem.validation.loss(problem.solved(u, v)).item()
    assert seen[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert seen[0]["gain"] == pytest.approx(task.first - loss, abs=1e-4)


def of_clocks(methods, look=None):
    """A race with one score and no data."""
    return RaceProblem(
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

        return step

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
    assert _race_report.time_to(run, "accuracy", 0.75) == 2.0
    assert _race_report.time_to(run, "accuracy", 0.9) == math.inf
    assert _race_report.value_at(run, 2.5, "accuracy") == 0.8
    assert _race_report.value_at(run | {"failed": "step 4"}, 9.0, "accuracy") == -math.inf


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
    _race_report.print_tables(races, rates, problem, 2.0, 8.0)
    _race_report.draw(races, problem, tmp_path / "race.png")
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

        return step

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
