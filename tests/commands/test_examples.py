"""``python -m examples.tune_l2``: its problem against dense algebra, and the program, small."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small_runs import ran, run_of
from tiny_data import write_tar

from examples.data.newsgroups import ARCHIVE
from examples.equilibrium_mnist import __main__ as equilibrium_mnist
from examples.shared import run as shared_run
from examples.shared.run import Run
from examples.tune_l2 import __main__ as tune_l2
from examples.tune_l2 import problem as l2
from examples.tune_l2 import report as l2_report
from examples.tune_l2 import rows as l2_rows
from torch_penalty_bilevel import HypergradientOptimizer


def words(samples=120, features=30, classes=3, seed=0):
    """Sparse rows whose classes depend on a third of the features."""
    generator = np.random.default_rng(seed)
    X = generator.random((samples, features)) * (generator.random((samples, features)) < 0.3)
    true = generator.normal(size=(features, classes)) * (np.arange(features) % 3 == 0)[:, None]
    return X, np.argmax(X @ true + 0.3 * generator.normal(size=(samples, classes)), axis=1)


def l2_problem(sparse=True, dtype=torch.float64):
    X, y = words()
    rows = csr_matrix(X) if sparse else X
    test = l2.Rows(rows[80:], y[80:], dtype)
    return l2.assemble(rows, y, np.arange(40), np.arange(40, 80), test, dtype)


def some_point(problem):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(problem.features, generator=generator, dtype=torch.float64)
    shape = problem.features, problem.classes
    return u.requires_grad_(), torch.randn(shape, generator=generator, dtype=torch.float64)


class TestLinear:
    def test_derivatives_of_two_orders_are_those_of_the_dense_product(self):
        sparse, dense = (l2_problem(sparse=kind).train for kind in (True, False))
        u, v = some_point(l2_problem())
        found = []
        for rows in (sparse, dense):
            w = v.clone().requires_grad_()
            (first,) = torch.autograd.grad(l2.lower_loss(rows, u, w), w, create_graph=True)
            found.append((first, *torch.autograd.grad((first * v.sin()).sum(), (u, w))))
        for ours, expected in zip(*found, strict=True):
            # The same sums in another order: rounding.
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)

    def test_third_order(self):
        problem = l2_problem()
        v = some_point(problem)[1]
        functions = problem.train.outputs, l2_problem(sparse=False).train.outputs
        # X v is linear, so third derivatives come from the cubic alone and need three backwards.
        found = []
        for outputs in functions:
            w = v.clone().requires_grad_()
            value = outputs(w).pow(3).sum()
            for _ in range(3):
                (value,) = torch.autograd.grad(value.sum(), w, create_graph=True)
            found.append(value.detach())
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def exact_hypergradient(problem, u):
    """Dense: softmax's Hessian written out, not differentiated. Returns (hypergradient, v)."""
    X, Z = (np.asarray(r.values.todense()) for r in (problem.train, problem.validation))
    y, t = problem.train.targets, problem.validation.targets
    d, k, weight = problem.features, problem.classes, np.exp(u.detach().numpy())

    def probabilities(rows, v):
        e = np.exp(rows @ v - (rows @ v).max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def hessian(v):
        p = probabilities(X, v)
        inner = np.einsum("ia,ab->iab", p, np.eye(k)) - np.einsum("ia,ib->iab", p, p)
        H = np.einsum("ij,il,iab->jalb", X, X, inner).reshape(d * k, d * k) / len(X)
        return H + np.diag(np.repeat(weight, k)) / (d * k)

    def slope(rows, labels, v):
        return rows.T @ (probabilities(rows, v) - np.eye(k)[labels]) / len(rows)

    v = np.zeros((d, k))
    for _ in range(50):  # Newton
        residual = slope(X, y, v) + weight[:, None] * v / (d * k)
        v = v - np.linalg.solve(hessian(v), residual.ravel()).reshape(d, k)
    assert np.linalg.norm(residual) < 1e-14
    q = -np.linalg.solve(hessian(v), slope(Z, t, v).ravel()).reshape(d, k)
    return weight / (d * k) * (v * q).sum(axis=1), v


class TestTuneL2:
    def test_the_hypergradient_is_that_of_implicit_differentiation_written_out(self):
        problem = l2_problem()
        u = some_point(problem)[0]
        exact, best = exact_hypergradient(problem, u)
        v = torch.from_numpy(best).requires_grad_()
        held = [torch.optim.SGD([level], lr=0.0) for level in (u, v)]
        optimizer = HypergradientOptimizer(
            *held, tolerance=1e-12, inner_iterations=1000, curvature="double_backward"
        )
        optimizer.step(
            lambda: problem.validation.loss(v), lambda: l2.lower_loss(problem.train, u, v)
        )
        # Residual 1e-12 times a condition number of at most 1e3.
        np.testing.assert_allclose(u.grad.numpy(), exact, rtol=1e-8, atol=1e-12)

    def test_the_lower_level_is_solved(self):
        problem = l2_problem()
        u, v = (level.detach() for level in some_point(problem))
        _, best = exact_hypergradient(problem, u)
        solved = problem.solved(u, v)
        # L-BFGS stops at a relative decrease of 1e-7: losses to 1e-6.
        losses = [problem.validation.loss(w).item() for w in (solved, torch.from_numpy(best))]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        gap = [l2.lower_loss(problem.train, u, w) for w in (solved, torch.from_numpy(best))]
        assert 0 <= float(gap[0] - gap[1]) < 1e-5

    @pytest.mark.parametrize("sparse", [True, False])
    def test_one_weight_is_the_same_problem_in_scikit_learns_units(self, sparse):
        problem = l2_problem(sparse)
        v, row = l2_rows.one_weight(problem, np.array([2.0]))
        u = torch.full((problem.features,), math.log(2.0), dtype=torch.float64)
        solved = problem.solved(u, torch.zeros_like(v))
        assert row["weight"] == 2.0
        # scikit-learn leaves common shifts of a row's coefficients at zero, as L2 does.
        torch.testing.assert_close(v, solved, rtol=0, atol=2e-2 * float(solved.abs().max()))

    def test_two_classes_too(self):
        X, y = words()
        parts = np.arange(40), np.arange(40, 80)
        test = l2.Rows(X[80:], y[80:] % 2, torch.float64)
        problem = l2.assemble(X, y % 2, *parts, test, torch.float64)
        v, _ = l2_rows.one_weight(problem, np.array([2.0]))
        u = torch.full((problem.features,), math.log(2.0), dtype=torch.float64)
        solved = problem.solved(u, torch.zeros_like(v))
        torch.testing.assert_close(v, solved, rtol=0, atol=2e-2 * float(solved.abs().max()))

    @pytest.mark.parametrize("method", tune_l2.METHODS)
    def test_every_method_runs_and_improves_on_the_start(self, method, tmp_path):
        problem = l2_problem()
        setting = {"method": method, "upper_lr": 0.1, "lower_lr": 0.1, "lower_steps": 10}
        result = tune_l2.tune(problem, setting, 600, 3, run_of(method, tmp_path))
        first, last = result["path"][0], result["path"][-1]
        assert result["evaluations"] == last["evaluations"] >= 600
        assert first["evaluations"] == 0
        if method == "alternating":  # nothing to follow: u stays, v only is fitted
            assert last["resolved"] == pytest.approx(first["resolved"], abs=1e-4)
        else:
            assert last["resolved"] < first["resolved"] - 0.01

    def test_when_a_target_is_reached(self):
        path = [{"resolved": r, "seconds": s} for r, s in ((3.0, 0.0), (2.0, 1.0), (1.0, 3.0))]
        assert l2_report.reached(path, 1.5, "seconds") == 2.0
        assert l2_report.reached(path, 0.5, "seconds") == math.inf


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["penalty", "cg"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(method, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_run, "SAVE_EVERY", 0.0)
    problem, calls, loss = l2_problem(), [], l2.lower_loss
    setting = {"method": method, "upper_lr": 0.1, "lower_lr": 0.1, "lower_steps": 3}
    whole = tune_l2.tune(problem, setting, 300, 4, run_of(method, tmp_path / "whole"))

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 60:
            raise Stopped
        return loss(*arguments)

    monkeypatch.setattr(tune_l2, "lower_loss", stopping)
    with pytest.raises(Stopped):
        tune_l2.tune(problem, setting, 300, 4, run_of(method, tmp_path))
    resumed = Run({"method": method, "seed": 0}, tmp_path, torch.device("cpu"), resume=True)
    found = tune_l2.tune(problem, setting, 300, 4, resumed)
    assert len(calls) > 60
    for result in (whole, found):
        for line in (result, *result["path"]):
            line.pop("seconds")
    assert found == whole


@pytest.mark.parametrize("program", [tune_l2, equilibrium_mnist])
def test_help_names_the_command_and_the_grid(program, capsys, monkeypatch):
    name = program.__name__.removesuffix(".__main__")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        program.parse()
    text = capsys.readouterr().out
    assert f"python -m {name}" in text
    assert str(program.GRID) in text


def test_tune_l2_leaves_all_that_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_l2, "make_problem", lambda *sizes, device: l2_problem())
    words = ["tune_l2"]
    found = ran(tune_l2, words, tmp_path / "out", monkeypatch, capsys)
    assert list(found) == ["one_weight", "no_l2", "penalty"]
    assert found["one_weight"]["validation"] < found["no_l2"]["validation"]
    path = found["penalty"]["path"]
    assert path[-1]["resolved"] == found["penalty"]["validation"] < path[0]["resolved"]


@pytest.mark.parametrize(
    ("flag", "most"), [("features", "6, as many"), ("posts", "4, as many there are, got 400")]
)
def test_more_words_or_posts_than_there_are_is_an_error(flag, most, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "20newsgroups"
    folder.mkdir(parents=True)
    words = ["alpha bravo", "charlie delta", "echo foxtrot", "alpha echo"]
    parts = (("train", words), ("test", words[:2]))
    members = {
        f"20news-bydate-{part}/group.{n % 2}/{n}": text.encode()
        for part, texts in parts
        for n, text in enumerate(texts)
    }
    write_tar(folder / ARCHIVE, members)
    sizes = {"features": 6, "posts": 4} | {flag: 400}
    l2.make_problem("newsgroups", 0, folder, 6, 4)
    with pytest.raises(SystemExit, match=f"--{flag} must be at most {most}"):
        l2.make_problem("newsgroups", 0, folder, **sizes)


def test_knobs_are_tuned_on_a_seed_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_l2, "make_problem", lambda *sizes, device: l2_problem())
    words = ["tune_l2", "--tune", "--method", "penalty", "--smoke", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    tune_l2.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {run["run"]["seed"] for run in runs} == {tune_l2.TUNING_SEED}
    assert len(runs) == 2 * 2 * 2
    best = min(runs, key=lambda run: run["result"]["validation"])["run"]
    assert f'"penalty": {tuple(best[name] for name in tune_l2.GRID)}' in capsys.readouterr().out
