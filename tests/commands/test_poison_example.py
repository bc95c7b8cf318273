"""``python -m examples.poison``: its attacks, victims, intervals and the defence."""

import json
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from examples.poison import __main__ as poison
from examples.poison import perturbation, setting, targeted, untargeted
from examples.poison.clean_label import BETA, DECAY, CleanLabel, Pair, encode, split
from examples.poison.defence import learned_weights
from examples.poison.features import Features
from examples.poison.methods import METHODS, optimise
from examples.poison.victim import Samples, fit, wrong_share
from examples.shared.run import Run
from examples.shared.task import Rates
from torch_penalty_bilevel import functional


def digits(features=6, noise=0.3, dtype=None):
    """As many as MNIST's, with few pixels whose mean depends on the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (70000,), generator=generator)
    centres = torch.rand(10, features, generator=generator, dtype=dtype)
    random = torch.rand(70000, features, generator=generator, dtype=dtype)
    return Samples(torch.lerp(centres[labels], random, noise), labels)


SIZES = {"train": 200, "validation": 100, "poisons": 12}
KINDS = {
    "untargeted": (untargeted.Untargeted, untargeted.make),
    "targeted": (targeted.Targeted, targeted.make),
    "perturbation": (perturbation.Perturbation, perturbation.make),
}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def pictures():
    return digits(features=784, noise=0.9, dtype=torch.float32)


def attack(name, data, seed=0, **sizes):
    kind, make = KINDS[name]
    return kind(make(data, seed, **SIZES | sizes), seed)


def moved(task):
    """U and v where nothing is special."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*task.upper, *task.lower):
            p.add_(0.1 * torch.randn_like(p))
        task.perturbation.project_()
    return task


def by_hand(scores, labels):
    """The cross entropy in other words."""
    return (scores.exp().sum(1).log() - scores[torch.arange(len(labels)), labels]).mean()


class TestData:
    @pytest.mark.parametrize("name", KINDS)
    def test_nothing_of_one_part_is_in_another(self, data, name):
        found = KINDS[name][1](data, 0, **SIZES)
        parts = [found.train, found.validation, found.trusted]
        parts += [found.poisons] if name == "perturbation" else []
        rows = torch.cat([part.inputs for part in parts])
        assert len(rows.unique(dim=0)) == len(rows)
        assert torch.equal(found.test.inputs, data.inputs[60000:])
        wanted = SIZES["train"] - SIZES["poisons"] * (name == "perturbation")
        assert len(found.train.labels) == wanted
        assert len(found.poisons.labels) == SIZES["poisons"]

    def test_every_label_of_a_poison_is_wrong(self, data):
        for name in ("untargeted", "targeted"):
            found = KINDS[name][1](data, 0, **SIZES)
            assert (found.poisons.labels != found.truth).all()
            assert torch.equal(found.poisons.inputs, found.train.inputs[:12])
            assert torch.equal(found.truth, found.train.labels[:12])

    def test_targeted_swaps_eights_and_threes(self, data):
        found = targeted.make(data, 0, **SIZES)
        assert found.truth.tolist() == [3] * 6 + [8] * 6
        assert found.poisons.labels.tolist() == [8] * 6 + [3] * 6
        assert set(found.validation.labels.tolist()) == {3}

    def test_perturbed_images_are_stratified(self, data):
        found = perturbation.make(data, 0, train=1000, validation=100, poisons=200)
        whole = torch.cat([found.train.labels, found.poisons.labels]).bincount()
        assert (found.poisons.labels.bincount() - whole / 5).abs().max() <= 1


class TestLosses:
    @pytest.mark.parametrize(
        ("name", "sign"), [("untargeted", -1), ("targeted", 1), ("perturbation", -1)]
    )
    def test_formulas_by_hand(self, data, name, sign):
        task = moved(attack(name, data))
        (W,), (u,), found = task.lower, task.upper, task.data
        f = sign * by_hand(found.validation.inputs @ W.T, found.validation.labels)
        torch.testing.assert_close(task.upper_loss(), f)
        rows = torch.cat([found.train.inputs, found.poisons.inputs + u])
        labels = torch.cat([found.train.labels, found.poisons.labels])
        decay = 0.1 / 7840 if name == "perturbation" else 0.0025
        torch.testing.assert_close(
            task.lower_loss(), by_hand(rows @ W.T, labels) + decay * W.square().sum()
        )

    def test_hypergradient_is_the_slope_over_retrained_victims(self, data):
        task = moved(attack("untargeted", data.__class__(data.inputs.double(), data.labels)))
        u = task.upper[0].detach().clone()

        def value(delta):
            def loss(flat):
                return task.lower_loss((flat.view(10, -1),), (delta,))

            inputs = torch.cat([task.data.train.inputs, task.data.poisons.inputs + delta])
            labels = torch.cat([task.data.train.labels, task.data.poisons.labels])
            (W,) = fit(Samples(inputs, labels), 10, task.decay, False)
            flat = W.flatten()
            for _ in range(2):  # a victim is right to 1e-5; Newton steps take it to rounding
                flat = flat - torch.linalg.solve(
                    torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat)
                )
            v = (flat.view(10, -1),)
            return task.upper_loss(v), v

        direction = torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(3))
        h = 1e-3
        slope = (value(u + h * direction)[0] - value(u - h * direction)[0]) / (2 * h)
        gradient, _ = functional.hypergradient(
            lambda upper, lower: task.upper_loss(lower, upper),
            lambda upper, lower: task.lower_loss(lower, upper),
            (u,),
            value(u)[1],
            method="cg",
            tolerance=1e-10,
            max_iterations=500,
        )
        # The difference is right to h^2 times a third derivative: 1.4e-4 of it.
        torch.testing.assert_close((gradient[0] * direction).sum(), slope, rtol=1e-3, atol=1e-9)


class TestVictim:
    def test_gradient_is_zero_and_weights_count_like_copies(self, data):
        some = Samples(data.inputs[:80].double(), data.labels[:80])
        weights = torch.ones(80, dtype=torch.float64)
        weights[:10] = 3.0
        found = fit(some, 10, 0.01, True, weights)
        twice = [torch.cat([part, part[:10], part[:10]]) for part in some]
        copies = fit(Samples(*twice), 10, 0.01, True)
        W, b = (p.clone().requires_grad_() for p in copies)
        loss = cross_entropy(twice[0] @ W.T + b, twice[1]) + 0.01 * W.square().sum()
        assert max(g.abs().max() for g in torch.autograd.grad(loss, (W, b))) <= 1e-5
        for ours, theirs in zip(found, copies, strict=True):
            ours, theirs = (p - p.mean(0) for p in (ours, theirs))  # b is unique up to a constant
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # 1e-5 / (2 * 0.01), and b

    def test_wrong_share(self):
        W = torch.eye(2)
        samples = Samples(
            torch.tensor([[1.0, 0], [0, 1], [2, 1], [0, 3]]), torch.tensor([0, 0, 0, 1])
        )
        assert wrong_share((W,), samples) == 0.25


class TestRows:
    def test_added_and_changed(self, data):
        task = attack("untargeted", data)
        for name, size, poisons in (
            ("clean", 200, 0),
            ("trusted", 50, 0),
            ("random", 212, 12),
            ("flip", 212, 12),
            ("flip_in_place", 200, 12),
        ):
            made = task.row(name)
            assert (len(made.samples.labels), int(made.is_poison.sum())) == (size, poisons), name
        flipped = task.row("flip_in_place")
        assert torch.equal(flipped.samples.labels != task.data.train.labels, flipped.is_poison)

    def test_perturbed_stay_within_the_ball_and_the_pixels(self, data):
        task = attack("perturbation", data, poisons=40)
        before = task.data.poisons.inputs
        task.upper_constraint = type(task.upper_constraint)(
            -before, 1 - before, radius=0.2, rows=True
        )
        task.radius = 0.2
        after = task.row("random").samples.inputs[-40:]
        assert after.min() >= -1e-6
        assert after.max() <= 1 + 1e-6
        lengths = (after - before).norm(dim=1)
        assert 0.1 < lengths.max() <= 0.2 + 1e-6
        clean, changed = task.row("clean"), task.row("flip_in_place")
        assert torch.equal(clean.samples.labels != changed.samples.labels, changed.is_poison)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    phi = Features().eval().requires_grad_(False)
    with torch.no_grad():
        phi.scale.fill_(0.1)
    labels = torch.arange(2).repeat_interleave(30)
    images = torch.rand(60, 3, 42, 42) * (0.6 + 0.4 * labels[:, None, None, None])
    parts = split(images, labels, 0, (0.6, 0.3, 0.1))
    return Pair(*parts[:2], phi, *(encode(phi, part) for part in parts))


class TestCleanLabel:
    def test_parts_are_disjoint_with_both_classes_alike(self, pair):
        parts = pair.train_features, pair.test_features, pair.trusted_features
        assert [part.labels.bincount().tolist() for part in parts] == [[18, 18], [9, 9], [3, 3]]
        assert len(torch.cat([part.inputs for part in parts]).unique(dim=0)) == 60
        assert torch.equal(pair.phi(pair.train.inputs), pair.train_features.inputs)

    def test_the_base_is_the_nearest_of_the_other_class(self, pair):
        task = CleanLabel(pair, 0, 0)
        assert task.score(task.clean)["success"] == 0  # the target is told right
        encoded = pair.train_features
        others = encoded.inputs[encoded.labels != task.target.labels]
        nearest = torch.cdist(others, task.target.inputs).min()
        base = pair.phi(task.data.poisons.inputs)
        assert torch.dist(base, task.target.inputs).item() == pytest.approx(
            nearest.item(), rel=1e-4
        )
        assert task.data.poisons.labels == 1 - task.target.labels

    def test_losses_by_hand(self, pair):
        task = moved(CleanLabel(pair, 0, 1))
        (W, b), base = task.lower, task.data.poisons.inputs
        u = base + task.upper[0]
        t, other = task.target.inputs, 1 - task.target.labels
        f = by_hand(t @ W.T + b, other) + (pair.phi(u) - t).square().sum()
        f = f + BETA * (u - base).square().sum()
        torch.testing.assert_close(task.upper_loss(), f)
        encoded = pair.train_features
        rows = torch.cat([encoded.inputs, pair.phi(u)]) @ W.T + b
        g = by_hand(rows, torch.cat([encoded.labels, other])) + DECAY * W.square().sum()
        torch.testing.assert_close(task.lower_loss(), g)

    def test_more_targets_than_there_are(self, pair):
        with pytest.raises(SystemExit, match="--targets asks for more than"):
            CleanLabel(pair, 0, 99)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_what_its_steps_cost(data, pair, name, tmp_path):
    task = CleanLabel(pair, 0, 0) if name == "alternating" else attack("untargeted", data)
    solver = METHODS[name].start(task, Rates(1e-3, 1e-3, 4))
    for _ in range(10):
        solver.step()
    taken = solver.rules[0].metrics.gradient_evaluations / 10
    # The penalty measures now and then how far to trust its correction, mostly in the beginning.
    more = 1.5 if name == "penalty" else 0
    assert -0.15 <= taken - METHODS[name].cost(4) <= more  # the first q needs no start


def test_an_attack_is_stronger_than_its_start_and_the_defence_finds_it(data, tmp_path):
    task = attack("untargeted", data, train=300, poisons=30)
    run = Run({"method": "penalty", "seed": 0}, tmp_path, torch.device("cpu"))
    images, line = optimise("penalty", task, Rates(1e-2, 0.03, 5), 900, run)
    assert images.min() >= 0
    assert images.max() <= 1
    training = task.with_poisons(images)
    start = task.score(task.victim(task.row("flip")))["error"]
    assert task.score(task.victim(training))["error"] > start + 0.03
    assert 900 <= line["path"][-1]["evaluations"] == line["evaluations"] <= 950
    weights = learned_weights(task, training, steps=60)
    assert weights[training.is_poison].mean() < weights[~training.is_poison].mean() - 0.1


@pytest.mark.parametrize("name", KINDS)
def test_a_small_run_leaves_all_that_it_promises(name, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setting, "mnist", lambda folder: pictures)
    words = f"poison --smoke --attack {name} --out {tmp_path}/out --method clean random penalty"
    monkeypatch.setattr(sys, "argv", words.split())
    poison.main()
    assert "| penalty |" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    results = {entry["run"]["method"]: entry["result"] for entry in content["runs"]}
    assert list(results) == ["clean", "random", "penalty"]
    measure = KINDS[name][0].measure
    assert results["penalty"][measure] > results["random"][measure]
    assert (tmp_path / "out" / f"{name}.png").exists()
