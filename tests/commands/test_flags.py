"""The flags that all examples share."""

import argparse

import pytest
import torch
from small_runs import parsed

from examples.shared import command

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--budget", "nan", "whole number, at least 1, got nan"),
        ("--first-seed", "-1", "whole number, at least 0, got -1"),
        ("--first-seed", "99999999999999999999", "whole number"),
        ("--threads", "100000", "the processors here"),
    ],
)
def test_values_that_cannot_be_are_named(capsys, flag, value, told):
    with pytest.raises(SystemExit):
        parsed(flag, value)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_rate_is_finite_and_above_zero(value):
    assert command.rate("1e-3") == 1e-3
    with pytest.raises(argparse.ArgumentTypeError, match=f"above 0, got {value}"):
        command.rate(value)


def test_what_is_asked_for():
    names = ("one", "two", "three")
    assert command.methods_of(parsed(), names) == ["one", "two"]
    assert command.methods_of(parsed("--method", "all"), names) == list(names)
    assert command.methods_of(parsed("--method", "three", "one"), names) == ["one", "three"]
    assert command.seeds_of(parsed("--first-seed", "7")) == range(7, 11)
    assert command.seeds_of(parsed("--smoke")) == range(1)
    assert str(parsed().out) == "results/sample"


@pytest.mark.parametrize("flag", ["--seeds", "--budget", "--threads"])
def test_counts_are_positive(flag, capsys):
    with pytest.raises(SystemExit):
        parsed(flag, "0")
    assert "at least 1, got 0" in capsys.readouterr().err


def test_a_device_that_is_not_there():
    assert command.device_of(parsed("--device", "cpu")) == CPU
    with pytest.raises(SystemExit, match="--device abacus cannot be used here"):
        command.device_of(parsed("--device", "abacus"))


def test_the_machine_in_a_line():
    assert command.machine().startswith(f"torch {torch.__version__}, Python 3.")
    assert command.machine().endswith("thread" + "s" * (torch.get_num_threads() > 1))


def test_a_folder_of_data_is_there_and_is_not_made(tmp_path, capsys):
    """A mistyped one was made, and data were downloaded into it."""
    assert parsed("--data-dir", str(tmp_path)).data_dir == tmp_path
    (tmp_path / "file").touch()
    for name in ("mistyped", "file"):
        with pytest.raises(SystemExit):
            parsed("--data-dir", str(tmp_path / name))
        told = capsys.readouterr().err
        assert f"{tmp_path / name} is no folder; make it first" in told
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("flag", ["--steps", "--batch"])
def test_the_counts_of_data_parallel_are_positive(flag, capsys, monkeypatch):
    from examples import data_parallel

    monkeypatch.setattr("sys.argv", ["data_parallel", flag, "0"])
    with pytest.raises(SystemExit):
        data_parallel.main()
    assert f"{flag}: must be a whole number, at least 1, got 0" in capsys.readouterr().err
