"""``python -m torch_penalty_bilevel``: the README's first example, and what it says of itself."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from torch_penalty_bilevel import __main__ as first


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def said(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["torch_penalty_bilevel", *words])
    first.main()
    return capsys.readouterr().out


def shares(text):
    return {name: int(share) for share, name in re.findall(r"^ +(\d+)%  (.*)$", text, re.MULTILINE)}


@pytest.fixture
def made_data(monkeypatch):
    """As where scikit-learn is not installed."""
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "sklearn" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)


def test_it_tells_labels_apart_as_the_readme_says(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    text = said(capsys, monkeypatch)
    told = shares(text)
    wrong = int(re.search(r"(\d+)% of their labels are wrong", text).group(1))
    assert abs(told["keep all"] - (100 - wrong)) <= 1
    assert abs(told["this optimizer keeps"] - 87) <= 2  # seeds 0 to 2 gave 86 to 87
    assert "handwritten digits (scikit-learn)" in text


def test_the_shares_are_those_of_the_weights(made_data):
    torch.manual_seed(0)
    data = first.mislabelled()
    right = ~data.wrong
    # A u that knows all, and one that is wrong of a quarter.
    for u, share in ((right.float() - 0.5, 100), (right.float() - 0.5, 75)):
        u[: round(len(u) * (1 - share / 100))] *= -1
        run = first.Run(u, first.learned(data, 1).history, "", 0.0)
        assert shares(first.report(data, run, 1))["this optimizer keeps"] == share


def test_a_plain_model_agrees_with_what_is_right():
    """Where each class is one point, far from the others, no other answer is possible."""
    torch.manual_seed(0)
    y = torch.arange(400) % 10
    x, wrong = torch.nn.functional.one_hot(y, 64).float() * 3, torch.rand(300) < 0.5
    given = torch.cat([torch.where(wrong, (y[:300] + 1) % 10, y[:300]), y[300:]])
    data = first.Data("", x, given, wrong)
    assert torch.equal(first.agreeing(x[300:], y[300:], data, 100), ~wrong)


def test_without_scikit_learn_it_says_what_it_takes_instead(made_data, capsys, monkeypatch):
    text = said(capsys, monkeypatch, "--steps", "3", "--seed", "1")
    assert "points in ten clouds (with scikit-learn: handwritten digits)" in text
    assert "3 steps in " in text
    assert "progress: 3 steps, " in text
    assert f"  {first.__file__}\n" in text.split("Where to go next:")[1]


def test_a_seed_gives_the_same_run(made_data):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(first.learned(first.mislabelled(), 5).u)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_plot_is_written(made_data, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    path = tmp_path / "run.png"
    text = said(capsys, monkeypatch, "--steps", "2", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"drawn in {path}" in text


def test_wrong_numbers_and_help(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        said(capsys, monkeypatch, "--steps", "0")
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
    command = [sys.executable, "-m", "torch_penalty_bilevel", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert help_text.startswith("usage: python -m torch_penalty_bilevel")
    assert all(option in help_text for option in ("--seed", "--steps", "--plot"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--seed", "-1"], "--seed must lie in"),
        (["--seed", str(2**64)], "--seed must lie in"),
        (["--plot", "none/run.png"], "none is no folder"),
        (["--plot", "run.foo"], "its name has to end with the kind of picture, one of .*png"),
        (["--plot", "run"], "its name has to end with the kind of picture"),
    ],
)
def test_flags_are_looked_at_before_the_run(capsys, monkeypatch, words, why):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(first, "learned", None)
    monkeypatch.setattr(sys, "argv", ["torch_penalty_bilevel", *words])
    with pytest.raises(SystemExit):
        first.main()
    assert re.search(why, capsys.readouterr().err)


def test_a_picture_without_matplotlib_is_refused_before_the_run(monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert "[plot]" in first.no_picture("run.png")


def test_a_reader_that_has_read_enough_is_no_error():
    """As ``| head -1`` is."""
    words = [sys.executable, "-m", "torch_penalty_bilevel", "--steps", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 0
