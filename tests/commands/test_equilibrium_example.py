"""``python -m examples.equilibrium_mnist``: its hypergradients by hand, and the program, small."""

import pytest
import torch
from small_runs import ran, run_of

from examples.equilibrium_mnist import __main__ as equilibrium_mnist
from examples.equilibrium_mnist import problem as equilibrium
from examples.equilibrium_mnist import rows as equilibrium_rows


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
    def test_training_lowers_the_loss_at_the_equilibrium(self, method, tmp_path):
        problem = equilibrium_problem()[1]
        small = problem._replace(images=problem.images.float(), test_images=problem.images.float())
        pad = torch.zeros(12, 784 - 9)
        images = torch.cat([small.images, pad], dim=1)
        small = small._replace(images=images, test_images=images)
        setting = {"method": method, "seed": 0, "upper_lr": 0.03, "lower_steps": 3}
        result = equilibrium_mnist.train(small, setting, 6, 600, 3, run_of(method, tmp_path))
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


def test_equilibrium_mnist_leaves_all_that_it_promises(tmp_path, monkeypatch, capsys):
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    images = torch.rand(10, 784, generator=source)[labels]
    images = images + 0.3 * torch.rand(500, 784, generator=source)
    monkeypatch.setattr(equilibrium_mnist, "mnist", lambda folder: (images, labels))
    words = ["equilibrium_mnist", "--method", "fixed_point", "penalty", "--upper-lr", "0.01"]
    found = ran(equilibrium_mnist, words, tmp_path / "out", monkeypatch, capsys)
    assert list(found) == ["agreement", "penalty", "fixed_point", "softmax", "network"]
    # Both are solved to 1e-12.
    assert all(errors["relative error"] < 1e-9 for errors in found["agreement"].values())
    assert found["network"]["steps"] == found["penalty"]["steps"]
    assert found["network"]["norm"] == 0
    assert found["fixed_point"]["test"] > 0.3  # chance is a tenth
