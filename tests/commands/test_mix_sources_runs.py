"""Whole runs of ``mix_sources``: what they may read, their clock, their rates; what is reported."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mixing import SIZE, mixing
from small_runs import run_of
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from examples.mix_sources import __main__ as command
from examples.mix_sources import training
from examples.mix_sources.formulation import Mixing
from examples.mix_sources.methods import METHODS, Rates
from examples.mix_sources.problem import WANTED, make_mixture
from examples.mix_sources.report import against_uniform, draw, table
from examples.mix_sources.text import decode
from examples.mix_sources.transformer import make_transformer

LEARNING = ("penalty", "t1_t2")


def unlike_posts(seed):
    """Random letters: no two places of these texts are alike."""
    random = np.random.default_rng(seed)
    groups = [f"{WANTED}{name}" for name in "abcd"] + [f"rec.{name}" for name in "efghij"]
    return {group: [decode(random.integers(96, size=60)) for _ in range(9)] for group in groups}


def test_no_held_out_window_is_in_what_is_trained_on():
    mixture = make_mixture((unlike_posts(0), unlike_posts(1)), 0)
    sources, clean, test = (
        {tuple(window) for text in texts for window in text.unfold(0, 8, 1).tolist()}
        for texts in (mixture.sources, [mixture.clean], [mixture.test])
    )
    assert len(test) == len(mixture.test) - 7 > 1000
    assert not test & clean
    assert not (test | clean) & sources


def test_the_held_out_loss_by_hand():
    task = mixing()
    text = task.mixture.test
    for count, firsts in ((5, (0, 10, 21, 32, 43)), (200, range(44))):
        windows = torch.stack([text[first : first + 7] for first in firsts])
        expected = cross_entropy(
            task.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        )
        assert training.held_out_loss(task, count) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_held_out_text_is_looked_at_only(name, tmp_path):
    """Other text there changes the loss on it, and not one bit of the weights and of v."""
    ends = []
    for shift in (0, 1):
        task = mixing()
        task.mixture = task.mixture._replace(test=(task.mixture.test + shift) % 96)
        run = run_of(name, tmp_path / str(shift))
        ends.append((training.train(name, task, 6, 2, run, Rates(0.1, 0.1)), task.model))
    (first, v), (second, w) = ends
    assert first["test"] != second["test"]
    for one, other in zip(first["path"], second["path"], strict=True):
        assert one["weights"] == other["weights"]
    assert all(map(torch.equal, v.parameters(), w.parameters()))


STEPS = {"longer": 12, "doremi": 24}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"target"}))
def test_the_clock_counts_all_steps_and_no_look(name, tmp_path, monkeypatch):
    """A step takes one second, one of u five, a look at the held-out text a hundred."""
    clock, drawing = [0.0], Mixing.draw

    def draw_slowly(self, equally=False):
        clock[0] += 5 if equally else 1
        drawing(self, equally)

    def look(task, count):
        clock[0] += 100
        return 2.0

    monkeypatch.setattr("examples.shared.run.time.process_time", lambda: clock[0])
    monkeypatch.setattr(Mixing, "draw", draw_slowly)
    monkeypatch.setattr(training, "held_out_loss", look)
    found = training.train(name, mixing(), 8, 4, run_of(name, tmp_path))
    steps = STEPS.get(name, 8)
    expected = 6 * 1 + 2 * 5 if name in LEARNING else steps
    assert found["seconds"] == found["path"][-1]["seconds"] == expected
    assert found["path"][-1]["step"] == steps
    looked = ["test" in point for point in found["path"]]
    assert looked == [point["step"] > steps - 8 or name != "doremi" for point in found["path"]]


@pytest.mark.parametrize("name", METHODS)
def test_rates_fall_along_a_cosine(name, tmp_path):
    """Of every rule, in each training: rate (1 + cos(pi n / N)) / 2 in step n of N."""
    task, found = mixing(), {"u": [], "v": []}

    def see(rule, args, kwargs):
        if isinstance(rule, torch.optim.Adam):
            (group,) = rule.param_groups
            level = "u" if group["params"][0] is task.weights.logits else "v"
            found[level].append(group["lr"])

    hook = register_optimizer_step_pre_hook(see)
    try:
        training.train(name, task, 4, 2, run_of(name, tmp_path), Rates(0.1, 0.2))
    finally:
        hook.remove()
    count = 6 if name == "longer" else 4
    shape = [0.5 + 0.5 * math.cos(math.pi * n / count) for n in range(count)]
    trainings = 3 if name == "doremi" else 1
    assert found["v"] == pytest.approx([0.1 * s for s in shape] * trainings)
    assert found["u"] == pytest.approx([0.2 * s for s in shape[1::2]] if name in LEARNING else [])


def test_v_has_one_rate_in_all_rows():
    assert {rates.lower for _, rates in METHODS.values()} == {METHODS["uniform"][1].lower}


def test_equal_weights_are_equal():
    for name in ("uniform", "longer"):
        task = mixing()
        method = METHODS[name][0](task, Rates(1e-2))
        for number in range(2):
            method.step(number, 0)
            assert task.held.tolist() == method.weights().tolist() == pytest.approx([1 / 3] * 3)
            assert task.counts.tolist() == [3, 3, 3]


def test_a_row_is_what_its_line_says(monkeypatch):
    posts, found = (unlike_posts(0), unlike_posts(1)), []
    monkeypatch.setattr(command, "load", lambda folder: posts)
    monkeypatch.setattr(command, "train", lambda *given: found.append(given) or {})
    rows = command.Rows(SimpleNamespace(data_dir=None), SimpleNamespace(device=torch.device("cpu")))
    line = {"width": 8, "layers": 1, "context": 6, "windows": 11, "floor": 0.7, "compile": False}
    rows({**line, "method": "t1_t2", "budget": 5, "every": 3, "seed": 4}, "run")
    ((name, task, *rest),) = found
    assert (name, *rest) == ("t1_t2", 5, 3, "run")
    assert (task.size, task.windows, task.weights.entropy_floor) == (SIZE, 11, 0.7)
    assert torch.equal(task.mixture.sources, make_mixture(posts, 4).sources)
    for seed, same in ((4, True), (0, False)):
        v = make_transformer(SIZE, seed).letters.weight
        assert torch.equal(task.model.letters.weight, v) == same


def results():
    """Two rows of one seed with four sources."""
    sources = {"names": ["a", "b", "c", "d"], "kinds": ["wanted", "wanted", "other", "corrupted"]}
    learned, equal = ([0.3, 0.2, 0.3, 0.2], [0.4, 0.2, 0.39, 0.01]), ([0.25] * 4,) * 2
    found = {}
    for name, seconds, tests, weights in (
        ("penalty", (3.0, 6.0), (3.0, 2.0), learned),
        ("uniform", (2.0, 4.0), (3.2, 2.5), equal),
    ):
        points = zip((10, 20), seconds, tests, weights, strict=True)
        path = [dict(zip(("step", "seconds", "test", "weights"), p, strict=True)) for p in points]
        w = path[-1]["weights"]
        sums = {"wanted": w[0] + w[1], "other": w[2], "corrupted": w[3], "worst": 4 * w[3]}
        end = {"test": tests[1], "seconds": seconds[1]}
        found[name] = [{**sources, **sums, **end, "path": path}]
    return found


def test_the_picture_has_the_numbers(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    draw(results(), tmp_path / "picture.png")
    weights, losses = kept[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in weights.lines}
    expected = {"a": [1, 1.2, 1.6], "b": [1, 0.8, 0.8], "c": [1, 1.2, 1.56], "d": [1, 0.8, 0.04]}
    for name, values in expected.items():
        points = [[step, y] for step, y in zip((0, 10, 20), values, strict=True)]
        assert np.array(lines[name]) == pytest.approx(np.array(points))
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines == {"penalty": [[3, 3], [6, 2]], "uniform": [[2, 3.2], [4, 2.5]]}


def test_the_table_by_hand():
    assert table(against_uniform(results())).splitlines()[2:] == [
        "| penalty | 2.000 | 0.500 | 0.040 | 0.600 | 0.390 | 0.010 | 6 | 1.50 |",
        "| uniform | 2.500 | 0.000 | 1.000 | 0.500 | 0.250 | 0.250 | 4 | 1.00 |",
    ]
