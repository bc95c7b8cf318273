"""Every benchmark and example starts as a command of its own."""

import pathlib
import subprocess
import sys

import pytest

for library in ("higher", "matplotlib", "pooch", "sklearn", "torchopt", "tqdm"):
    pytest.importorskip(library)

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "benchmarks/speed", "examples")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)


def test_all_commands_are_found():
    assert {"benchmarks/multipliers.py", "benchmarks/race.py", "examples/tune_l2.py"} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_how_to_call_it(command):
    ended = subprocess.run(
        [sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert pathlib.Path(command).name in ended.stdout
