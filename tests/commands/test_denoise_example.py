"""``python -m examples.denoise``: its problem, its losses, its rows."""

import json
import sys

import pytest
import torch
from denoising import problem, shapes
from torch.nn.functional import cross_entropy

from examples.denoise import __main__ as denoise
from examples.denoise.formulation import Cleaning, decay, penalty_optimizer
from examples.denoise.learned import METHODS, learn, score
from examples.denoise.problem import Problem, load, make_model, make_problem
from examples.denoise.report import section, with_gap
from examples.denoise.rows import accuracy, fit
from examples.denoise.settings import DIGITS, MNIST, SETTINGS
from examples.shared import solvers
from examples.shared.run import Run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class TestProblem:
    @pytest.mark.parametrize("flip", ["uniform", "pair"])
    def test_the_share_of_wrong_labels_is_exact(self, flip):
        found = problem(flip=flip, noise=0.4)
        assert (~found.is_right).sum() == 160
        shift = (found.labels - found.truth)[~found.is_right] % 10
        assert set(shift.tolist()) == ({1} if flip == "pair" else set(range(1, 10)))

    def test_clean_images_hold_each_class_equally_often_and_nothing_is_there_twice(self):
        found = problem()
        assert torch.bincount(found.clean_labels).tolist() == [10] * 10
        images = torch.cat([found.images, found.clean_images, found.test_images])
        assert len(images.flatten(1).unique(dim=0)) == len(images) == 400 + 100 + 300

    def test_a_seed_draws_everything_again(self):
        first, second, other = problem(3), problem(3), problem(4)
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.images, second.images)
        assert not torch.equal(first.images, other.images)

    def test_too_many_are_asked_for(self):
        with pytest.raises(SystemExit, match="more than the 700 images"):
            problem(train=650)

    @pytest.mark.parametrize(
        ("channels", "side", "count"),
        [(1, 28, 1_389_578), (3, 32, 1_172_410), (1, 32, 1_340_650)],
        ids=["MNIST", "CIFAR-10", "SVHN"],
    )
    def test_the_published_networks_have_the_published_number_of_parameters(
        self, channels, side, count
    ):
        images = torch.zeros(2, channels, side, side)
        model = make_model(Problem(images, *[torch.zeros(2)] * 6, "cnn", 0), 0)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model(images).shape == (2, 10)

    def test_grey_is_a_weighted_sum_of_the_colours(self):
        data = (shapes(700, 0, channels=3),) * 2
        how = {"model": "linear", "train": 9, "clean": 10, "noise": 0.0, "flip": "pair"}
        colour, grey = (make_problem(data, 0, grey=g, **how).images for g in (False, True))
        red, green, blue = colour.unbind(1)
        expected = 0.2989 * red + 0.5870 * green + 0.1140 * blue
        torch.testing.assert_close(grey[:, 0], expected, rtol=1e-5, atol=1e-6)

    def test_digits_are_pixels_of_0_to_16_and_what_is_left_is_for_tests(self):
        sklearn = pytest.importorskip("sklearn.datasets")
        rows, labels = sklearn.load_digits(return_X_y=True)
        data = load("digits", None)
        found = make_problem(data, 0, model="tanh", train=1000, clean=30, noise=0.5, flip="uniform")
        assert len(found.test_labels) == len(labels) - 1030
        images = torch.cat([found.clean_images, found.images, found.test_images])
        truth = torch.cat([found.clean_labels, found.truth, found.test_labels])
        seen = torch.cat([(16 * images.flatten(1)).round(), truth[:, None]], 1)
        given = torch.cat([torch.tensor(rows), torch.tensor(labels)[:, None]], 1)
        assert sorted(seen.tolist()) == sorted(given.tolist())
        assert [p.numel() for p in make_model(found, 0).parameters()] == [4096, 64, 640, 10]
        with pytest.raises(SystemExit, match="more than the 1797 images"):
            make_problem(data, 0, model="tanh", train=1767, clean=30, noise=0.5, flip="uniform")


class TestFormulation:
    def test_losses_by_hand(self):
        task = Cleaning(problem(), 0.2)
        torch.manual_seed(0)
        with torch.no_grad():
            task.weights.logits.normal_()
        clean, noisy = task.draw()
        w = torch.sigmoid(task.weights.logits)[noisy]
        losses = cross_entropy(
            task.module(task.problem.images[noisy]), task.problem.labels[noisy], reduction="none"
        )
        f = cross_entropy(
            task.module(task.problem.clean_images[clean]), task.problem.clean_labels[clean]
        )
        torch.testing.assert_close(task.upper_loss(), f)
        torch.testing.assert_close(task.lower_loss(), (w * losses).sum() / w.sum() + 0.2 * f)
        task.clean_share = 0.0
        torch.testing.assert_close(task.lower_loss(), (w * losses).sum() / w.sum())
        task.decay = 0.7
        length = sum(p.square().sum() for p in task.module.parameters())
        expected = (w * losses).sum() / w.sum() + 0.35 * length
        torch.testing.assert_close(task.lower_loss(), expected)
        doubled = tuple(2 * p.detach() for p in task.lower)
        torch.testing.assert_close(decay(doubled, 0.7), 1.4 * length)

    def test_at_other_values_without_touching_its_own(self):
        task, other = (Cleaning(problem(seed=seed), 0.2) for seed in (0, 0))
        torch.manual_seed(0)
        with torch.no_grad():
            other.weights.logits.normal_()
            for p in other.lower:
                p.normal_()
        other.clean, other.noisy = task.clean, task.noisy
        v, u = tuple(other.lower), tuple(other.upper)
        torch.testing.assert_close(task.upper_loss(v), other.upper_loss())
        torch.testing.assert_close(task.lower_loss(v, u), other.lower_loss())
        assert not torch.equal(task.upper_loss(), other.upper_loss())

    def test_weights_of_wrong_labels_fall(self):
        task = Cleaning(problem(), 0.2)
        optimizer = penalty_optimizer(task, upper_lr=0.3, lower_lr=3e-3)
        torch.manual_seed(0)
        for _ in range(150):
            task.draw()
            optimizer.step(task.upper_loss, task.lower_loss)
        assert score(task.weights().detach(), task.problem)["auc"] > 0.9


def test_every_data_set_says_the_rates_of_every_method():
    assert all(setting.methods.keys() == METHODS.keys() for setting in SETTINGS.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_what_its_steps_cost(name, tmp_path):
    """Ours count; the others' steps are as many as the budget pays for."""
    if name in ("torchopt", "higher"):
        pytest.importorskip(name)
    method, chosen = METHODS[name], MNIST.methods[name]
    rates = chosen.rates
    torch.manual_seed(0)
    task = Cleaning(problem(), 0.2)
    before = [p.detach().clone() for p in (*task.upper, *task.lower)]
    run = Run({"method": name, "seed": 0}, tmp_path, torch.device("cpu"))
    budget = 3 * method.cost(rates.lower_steps) + 1
    learned = learn(name, task, chosen, budget, run)
    assert learned.line["steps"] == 3
    assert learned.line["path"][-1]["step"] == 3
    pairs = zip(before, (*task.upper, *task.lower), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs)
    solver = method.start(task, rates, **chosen.options)
    metrics = getattr(solver.rules[0], "metrics", None)
    if metrics is not None:
        solver.step()
        first = solver.rules[0].metrics.gradient_evaluations
        solver.step()
        cost = solver.rules[0].metrics.gradient_evaluations - first
        # The default adds a product where it looks at the curvature of H.
        assert method.cost(rates.lower_steps) <= cost <= 4 / 3 * method.cost(rates.lower_steps)


def test_rates_fall_along_a_cosine():
    rule = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.4)
    seen = []
    for share in (0.0, 0.5, 1.0, 0.5):
        solvers.anneal([rule], share)
        seen.append(rule.param_groups[0]["lr"])
    assert seen == pytest.approx([0.4, 0.2, 0.0, 0.2])


def test_the_gap_by_hand():
    results = {
        "validation": [{"retrained": 0.8}, {"retrained": 0.7}],
        "oracle": [{"retrained": 0.9}, {"retrained": 0.9}],
        "penalty": [{"retrained": 0.82, "running": 0.88}, {"retrained": 0.8, "running": 0.75}],
    }
    found = with_gap(results)
    assert [run["closed"] for run in found["penalty"]] == pytest.approx([0.8, 0.5])
    assert [run["closed"] for run in found["oracle"]] == pytest.approx([1.0, 1.0])
    assert "closed" not in results["penalty"][0]
    assert "closed" not in with_gap({"penalty": results["penalty"]})["penalty"][0]


def test_a_small_run_leaves_all_that_it_promises(tmp_path, monkeypatch, capsys):
    data = shapes(400, 0), shapes(200, 1)
    monkeypatch.setattr(denoise, "load", lambda dataset, folder: data)
    words = ["denoise", "--smoke", "--out", str(tmp_path / "out"), "--method", "oracle", "penalty"]
    for more in ([], ["--resume"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        denoise.main()
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        printed = capsys.readouterr().out
        assert section(content) in printed
        oracle, learned = (run["result"] for run in content["runs"])
        assert oracle["told_right"] == 1.0
        assert learned["path"][-1]["accuracy"] == learned["running"] > 0.5
    assert (tmp_path / "out" / "denoise.png").stat().st_size > 10_000
    assert list((tmp_path / "out" / "events").iterdir())


def test_a_share_of_the_epochs_is_recorded_where_it_is_not_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(denoise, "load", lambda dataset, folder: (shapes(400, 0), shapes(200, 1)))
    taken = []

    def watched(problem, kept, row, how):
        taken.append(how.epochs_of(row))
        return fit(problem, kept, row, how)

    monkeypatch.setattr(denoise, "fit", watched)
    words = ["denoise", "--smoke", "--out", str(tmp_path / "out"), "--method", "validation"]
    for more, share in ([], None), (["--epochs-share", "0.3"], 0.3):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        denoise.main()
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        assert content["runs"][0]["run"].get("epochs_share") == share
        assert ("0.3 of their usual epochs" in capsys.readouterr().out) == (share is not None)
    assert taken == [100, 30]
    for bad in ("0", "1.1", "nan"):
        monkeypatch.setattr(sys, "argv", [*words, "--epochs-share", bad])
        with pytest.raises(SystemExit):
            denoise.main()
        assert "--epochs-share must lie in (0, 1]" in capsys.readouterr().err


def test_learned_weights_beat_the_clean_digits(tmp_path):
    """One seed that chose nothing: the demo's promise, with room for another torch."""
    data = load("digits", None)
    found = make_problem(data, 0, model="tanh", train=1000, clean=30, noise=0.5, flip="uniform")
    torch.manual_seed(0)
    task = Cleaning(found, DIGITS.clean_share, DIGITS.decay, DIGITS.batch)
    run = Run({"method": "penalty", "seed": 0}, tmp_path, torch.device("cpu"))
    learned = learn("penalty", task, DIGITS.methods["penalty"], DIGITS.budget, run)
    alone = fit(found, torch.zeros_like(found.is_right), "validation", DIGITS.training)
    lead = learned.line["running"] - accuracy(alone, found.test_images, found.test_labels)
    assert lead > 0.03
    assert score(learned.weights, found)["told_right"] > 0.85


def test_a_network_too_large_for_the_digits_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["denoise", "--dataset", "digits", "--model", "cnn"])
    with pytest.raises(SystemExit):
        denoise.main()
    assert "--model cnn needs images of 28 x 28" in capsys.readouterr().err
