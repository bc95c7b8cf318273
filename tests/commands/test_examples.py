"""The examples' problems against dense algebra, and the programs themselves, small."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from examples.equilibrium_mnist import __main__ as equilibrium_mnist
from examples.equilibrium_mnist import problem as equilibrium
from examples.equilibrium_mnist import rows as equilibrium_rows
from examples.tune_l2 import __main__ as tune_l2
from examples.tune_l2 import problem as l2
from examples.tune_l2 import report as l2_report
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
        v, row = l2.one_weight(problem, np.array([2.0]))
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
        v, _ = l2.one_weight(problem, np.array([2.0]))
        u = torch.full((problem.features,), math.log(2.0), dtype=torch.float64)
        solved = problem.solved(u, torch.zeros_like(v))
        torch.testing.assert_close(v, solved, rtol=0, atol=2e-2 * float(solved.abs().max()))

    @pytest.mark.parametrize("method", tune_l2.METHODS)
    def test_every_method_runs_and_improves_on_the_start(self, method):
        problem, ticks = l2_problem(), []
        setting = {"method": method, "upper_lr": 0.1, "lower_lr": 0.1, "lower_steps": 10}
        result = tune_l2.tune(problem, setting, 600, 3, ticks.append)
        first, last = result["path"][0], result["path"][-1]
        assert sum(ticks) == last["evaluations"] >= 600
        assert first["evaluations"] == 0
        if method == "alternating":  # nothing to follow: u stays, v only is fitted
            assert last["resolved"] == pytest.approx(first["resolved"], abs=1e-4)
        else:
            assert last["resolved"] < first["resolved"] - 0.01

    def test_when_a_target_is_reached(self):
        path = [{"resolved": r, "seconds": s} for r, s in ((3.0, 0.0), (2.0, 1.0), (1.0, 3.0))]
        assert l2_report.reached(path, 1.5, "seconds") == 2.0
        assert l2_report.reached(path, 0.5, "seconds") == math.inf


def equilibrium_problem():
    source = torch.Generator().manual_seed(0)
    images = torch.rand(12, 9, generator=source, dtype=torch.float64)
    labels = torch.arange(12) % 10
    p = equilibrium.make_parameters(0, 6, torch.float64, inputs=9)
    return p, equilibrium.Problem(images, labels, images, labels)


class TestEquilibrium:
    @pytest.mark.long
    def test_the_three_hypergradients_are_that_of_implicit_differentiation_written_out(self):
        p, problem = equilibrium_problem()
        z = equilibrium.equilibrium(p, problem.images, 1e-14)
        # Sample by sample: q = (I - D W)^{-T} grad_z f, D = diag(1 - z^2), and dPhi/dW = D z'.
        q = torch.zeros_like(z)
        scores = (z @ p["C"].T + p["c"]).softmax(1)
        slope = (scores - torch.eye(10, dtype=torch.float64)[problem.labels]) @ p["C"] / len(z)
        for i, state in enumerate(z):
            D = torch.diag(1 - state**2)
            identity = torch.eye(len(state), dtype=torch.float64)
            q[i] = D @ torch.linalg.solve((identity - D @ p["W"]).T, slope[i])
        expected = {"W": q.T @ z, "U": q.T @ problem.images, "b": q.sum(0)}
        expected = torch.cat([value.detach().ravel() for value in expected.values()])
        for method, vector in equilibrium_rows.hypergradients(p, problem).items():
            # Each is solved to 1e-12; the contraction factor here is at most one half.
            error = (vector[: len(expected)] - expected).norm() / expected.norm()
            assert error < 1e-9, method

    def test_the_projection_is_the_nearest_matrix_of_the_ball(self):
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        before = W.clone()
        equilibrium.project(W, 0.9)
        assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(0.9, rel=1e-12)
        # Nearest point of a convex set: <before - W, other - W> <= 0 for every other point; the
        # worst one has the singular vectors of before - W, and the sum of its values as product.
        away = before - W
        worst = 0.9 * float(torch.linalg.svdvals(away).sum())
        assert worst - float((away * W).sum()) == pytest.approx(0.0, abs=1e-12)
        inside = 0.5 * W
        kept = inside.clone()
        equilibrium.project(inside, 0.9)
        assert torch.equal(inside, kept)

    @pytest.mark.parametrize("method", equilibrium_mnist.METHODS)
    def test_training_lowers_the_loss_at_the_equilibrium(self, method):
        problem = equilibrium_problem()[1]
        small = problem._replace(images=problem.images.float(), test_images=problem.images.float())
        pad = torch.zeros(12, 784 - 9)
        images = torch.cat([small.images, pad], dim=1)
        small = small._replace(images=images, test_images=images)
        setting = {"method": method, "upper_lr": 0.03, "lower_steps": 3}
        result = equilibrium_mnist.train(small, setting, 0, 6, 600, 3, lambda count: None)
        # Chance is log 10 = 2.30; twelve samples with nine inputs can be learned by heart.
        assert result["path"][0]["loss"] > 1.5
        assert result["loss"] < 1.0
        assert result["norm"] <= equilibrium.RADIUS + 1e-5


def test_no_equilibrium_is_an_error():
    p, problem = equilibrium_problem()
    with torch.no_grad():
        p["W"].mul_(-20)
    with pytest.raises(RuntimeError, match="no equilibrium"):
        equilibrium.equilibrium(p, problem.images)


@pytest.mark.parametrize("program", [tune_l2, equilibrium_mnist])
def test_help_names_the_command_and_the_grid(program, capsys, monkeypatch):
    name = program.__name__.removesuffix(".__main__")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        program.parse()
    text = capsys.readouterr().out
    assert f"python -m {name}" in text
    assert str(program.GRID) in text
