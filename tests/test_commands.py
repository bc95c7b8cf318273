"""Every benchmark and example is a command: it says how to call it, and runs for a few steps."""

import json
import os
import pathlib
import shlex
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


# One process imports the libraries, and a child of it calls each command.
HELP = """
import contextlib, io, json, os, runpy, sys
import matplotlib.pyplot, scipy.optimize, sklearn.datasets, torch
found = {}
for command in sys.argv[1:]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.argv, out = [command, "--help"], io.StringIO()
        sys.path.insert(0, os.path.dirname(command))
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(command, run_name="__main__")
        os.write(writer, out.getvalue().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found[command] = pipe.read()
    os.wait()
print(json.dumps(found))
"""


def test_help_says_how_to_call_it():
    ended = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for command, text in json.loads(ended.stdout).items():
        assert text.startswith("usage: "), (command, ended.stderr)
        assert pathlib.Path(command).name in text.partition("options:")[0].partition("\n")[2], (
            command
        )


DATA = ROOT.parent / "shared" / "data"
SMALL = {
    "benchmarks/cleaning.py": "--problems digits --steps 3 --output {}/runs.jsonl",
    "benchmarks/compiled.py": "--widths 16 --rounds 1 --backend aot_eager",
    "benchmarks/condition.py": "--kappas 10 --seeds 1 --limit 20 --picture {}/picture.png",
    "benchmarks/digits_l2.py": "--seed 0 --budget 60",
    "benchmarks/engine_choice.py": "--kinds LSTM --seeds 1 --epochs 1 --record {}/runs.jsonl",
    "benchmarks/house.py": "",
    "benchmarks/multipliers.py": "--problems quadratic1 --seeds 1 --share 0.01 --jobs 1",
    "benchmarks/rates.py": "--figure {}/figure.png",
    "benchmarks/smd.py": "--starts 1 --outer 5",
    "benchmarks/suite.py": "d_1978_01 half_space --starts 1 --restarts 0 --budget 200",
    "benchmarks/suite_optimizer.py": "feature_ridge --starts 1 --steps 5 --jobs 1",
    "benchmarks/speed/overhead.py": "--rounds 1",
    "examples/denoise_digits.py": "--seeds 1 --steps 5 --output {}/picture.png",
}
GUIDE = [f"examples/extending/{name}.py" for name in ("engine", "multiplier_rule", "penalty")]
ON_DATA = {
    "benchmarks/race.py": "--quick --methods 'penalty, value gap' "
    "--data {data}/mnist --output {}/runs.jsonl",
    "examples/equilibrium_mnist.py": "--method penalty --seeds 1 --evaluations 20 --train 200 "
    "--test 200 --folder {data}/mnist --record {}/runs.jsonl --output {}/picture.png",
    "examples/tune_l2.py": "--data newsgroups --method penalty --seeds 1 --evaluations 20 "
    "--folder {data}/20newsgroups --record {}/runs.jsonl --output {}/picture.png",
}


# Rewrites a page of benchmarks from a whole measurement.
NOT_HERE = "benchmarks/speed/report.py"


def test_every_command_has_a_small_form():
    assert {*SMALL, *ON_DATA, NOT_HERE} == {*COMMANDS}


def run(command, arguments, folder):
    words = shlex.split(arguments.replace("{data}", str(DATA)).replace("{}", str(folder)))
    ended = subprocess.run(
        [sys.executable, command, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("command", SMALL)
def test_it_runs_for_a_few_steps(command, tmp_path):
    assert run(command, SMALL[command], tmp_path)


@pytest.mark.parametrize("command", ON_DATA)
def test_it_runs_on_its_data(command, tmp_path):
    if not DATA.is_dir():
        pytest.skip("the data sets are not beside the checkout; tests download nothing")
    assert run(command, ON_DATA[command], tmp_path)


@pytest.mark.parametrize("command", GUIDE)
def test_the_guide_comes_to_its_solution(command, tmp_path):
    found, wanted = run(command, "", tmp_path).removeprefix("u = ").split(", should be ")
    pairs = zip(json.loads(found), json.loads(wanted), strict=True)
    assert all(abs(a - b) < 1e-3 for a, b in pairs)


def test_the_speed_benchmarks_run(tmp_path):
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/speed/pytest.ini"]
    command += ["benchmarks/speed/test_micro.py", "-k", "64-16-10 and test_unit"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={tmp_path}/speed.json"]
    # A worker of pytest-xdist measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    how = {"capture_output": True, "text": True, "check": False, "env": alone}
    ended = subprocess.run(command, cwd=ROOT, **how)
    assert "1 passed" in ended.stdout, ended.stdout
    assert json.loads((tmp_path / "speed.json").read_text())["benchmarks"]
