"""Examples run for a few steps, and what they must leave."""

import argparse
import json
import sys

import torch

from examples.shared import command
from examples.shared.run import Run


def parsed(*words):
    """The flags that all examples share, of a command with three methods."""
    parser = argparse.ArgumentParser(prog="python -m examples.sample")
    command.add_common(parser, ("one", "two", "three"), ("one", "two"), 50, "steps", 4)
    return parser.parse_args(words)


def run_of(method, folder):
    """What a method's loop is given."""
    return Run({"method": method, "seed": 0}, folder, torch.device("cpu"))


def ran(program, words, folder, monkeypatch, capsys):
    """What a small command writes; a second time it only reads."""
    for more in ([], ["--resume"]):
        monkeypatch.setattr(sys, "argv", [*words, "--smoke", "--out", str(folder), *more])
        program.main()
        content = json.loads((folder / "results.json").read_text())
        assert program.section(content) in capsys.readouterr().out
    assert len((folder / "runs.jsonl").read_text().splitlines()) == len(content["runs"])
    assert next(folder.glob("*.png")).stat().st_size > 10_000
    assert list((folder / "events").iterdir())
    return {entry["run"]["method"]: entry["result"] for entry in content["runs"]}
