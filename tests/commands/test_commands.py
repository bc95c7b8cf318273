"""Every benchmark and example is a command: it says how to call it, and runs for a few steps."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from forking import Nursery

for library in ("higher", "matplotlib", "PIL", "pooch", "sklearn", "torchopt", "tqdm"):
    pytest.importorskip(library)

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
GUIDE = [f"examples.extending.{name}" for name in ("engine", "multiplier_rule", "penalty")]
# Run by test_trainer_examples, where their libraries are installed.
TRAINERS = [name for name in COMMANDS if name.startswith("examples.trainers.")]
IMPORTED = ("matplotlib.pyplot", "scipy.optimize", "sklearn.datasets", "sklearn.linear_model")
IMPORTED += ("torch", "torch._dynamo", "torchopt", "higher", "tqdm", "pytest")


@pytest.fixture(scope="session")
def nursery():
    with contextlib.closing(Nursery(*IMPORTED)) as nursery:
        yield nursery


def test_all_commands_are_found():
    assert {"benchmarks.smd", "benchmarks.race", "examples.extending.engine"} <= {*COMMANDS}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in GUIDE + TRAINERS])
def test_help_says_how_to_call_it(nursery, command, tmp_path):
    said = nursery.run([command, "--help"], ROOT, {}, beside=tmp_path).output
    assert said.startswith(f"usage: python -m {command} [-h]")
    assert f"    python -m {command}" in said  # its text shows calls
    assert "options:" in said


DATA = ROOT.parent / "shared" / "data"
SMALL = {
    "benchmarks.adjoint": "--products 3 --seeds 1",
    "benchmarks.cleaning": "--problems digits --factors 1 --output {}/runs.jsonl",
    "benchmarks.coarse_products": "--kinds mlp --training 1",
    "benchmarks.speed.copies": "--kinds LSTM",
    "benchmarks.compiled": "--widths 16 --rounds 1 --backend aot_eager",
    "benchmarks.condition": "--kappas 10 --seeds 1 --limit 20 --picture {}/picture.png",
    "benchmarks.digits_l2": "--seed 0 --budget 60",
    "benchmarks.digits_waiting": "--seeds 1 --evaluations 10 --rates 0.1",
    "benchmarks.engine_choice": "--kinds LSTM --seeds 1 --epochs 1 --record {}/runs.jsonl",
    "benchmarks.growth": "--smoke --only parameters page --out {}/out",
    "benchmarks.growth.paper_model": "--sizes 1e9 --gpus 8",
    "benchmarks.house": "",
    "benchmarks.multipliers": "--problems quadratic1 --seeds 1 --share 0.01 --jobs 1",
    "benchmarks.plain_steps": "--lower-steps 16 --seeds 1 --width 16",
    "benchmarks.preconditioner": "--problems digits --seeds 1 --steps 4",
    "benchmarks.profiles": "--problems scalar_ridge --tuning scalar_ridge --solvers cg minimize "
    "--seeds 1 --budget 60 --results {}/runs.jsonl --picture {}/picture.png",
    "benchmarks.pull": "--seeds 1 --steps 3",
    "benchmarks.rates": "--only solvers --figure {}/figure.png",
    "benchmarks.smd": "--starts 1 --outer 5",
    "benchmarks.suite.minimizer": "d_1978_01 half_space --starts 1 --restarts 0 --budget 200",
    "benchmarks.suite.optimizer": "feature_ridge --starts 1 --steps 5 --jobs 1",
    "benchmarks.speed.correction": "--sizes 1e3 --batch 8 --rounds 2",
    "benchmarks.speed.overhead": "--rounds 1",
    "examples.data_parallel": "--steps 3",
    "examples.results": "--runs {}/runs --page {}/page.md",
    "examples.synthetic": "--smoke --out {}/out",
}
ON_DATA = {
    "benchmarks.race": "--quick --methods 'penalty, value gap' "
    "--data {data}/mnist --output {}/runs.jsonl",
    "examples.data": "mnist uci --data-dir {data}",
    "examples.denoise": "--smoke --method all --data-dir {data} --out {}/out",
    "examples.equilibrium_mnist": "--smoke --method penalty --data-dir {data} --out {}/out",
    "examples.poison": "--smoke --attack clean_label --method base penalty --data-dir {data} "
    "--out {}/out",
    "examples.few_shot": "--smoke --method penalty anil --data-dir {data} --out {}/out",
    "examples.mix_sources": "--smoke --method penalty doremi --data-dir {data} --out {}/out",
    "examples.tune_l2": "--smoke --data-dir {data} --out {}/out",
}


# Reads a whole measurement: with the benchmarks themselves, below.
REPORT = "benchmarks.speed.report"


def test_every_command_has_a_small_form():
    assert {*SMALL, *ON_DATA, *GUIDE, *TRAINERS, REPORT} == {*COMMANDS}


def run(nursery, command, arguments, folder):
    words = shlex.split(arguments.replace("{data}", str(DATA)).replace("{}", str(folder)))
    ended = nursery.run([command, *words], ROOT, {}, beside=folder)
    assert ended.status == 0, ended.errors
    return ended.output


@pytest.mark.parametrize("command", SMALL)
def test_it_runs_for_a_few_steps(nursery, command, tmp_path):
    assert run(nursery, command, SMALL[command], tmp_path)


@pytest.mark.parametrize("command", ON_DATA)
def test_it_runs_on_its_data(nursery, command, tmp_path):
    if not DATA.is_dir():
        pytest.skip("the data sets are not beside the checkout; tests download nothing")
    assert run(nursery, command, ON_DATA[command], tmp_path)


@pytest.mark.parametrize("command", GUIDE)
def test_the_guide_comes_to_its_solution(nursery, command, tmp_path):
    found, wanted = run(nursery, command, "", tmp_path).removeprefix("u = ").split(", should be ")
    pairs = zip(json.loads(found), json.loads(wanted), strict=True)
    assert all(abs(a - b) < 1e-3 for a, b in pairs)


def test_two_processes_end_where_one_does():
    """``torchrun``, as its text shows."""
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 -m examples.data_parallel"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *words.split(), "--steps", "4"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    gaps = re.findall(r"differ by (\S+), the network by (\S+)\n", ended.stdout)[0]
    assert ended.stdout.startswith("2 processes")
    assert max(map(float, gaps)) < 1e-5


def test_the_speed_benchmarks_run_and_their_page_is_written(nursery, tmp_path):
    words = "-c benchmarks/speed/pytest.ini benchmarks/speed/test_micro.py -p no:cacheprovider"
    words += " -k '64-16-10 and test_unit' --benchmark-json={}/speed.json"
    assert "1 passed" in run(nursery, "pytest", words, tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text())["benchmarks"]
    page = tmp_path / "README.md"
    before = (ROOT / "benchmarks" / "speed" / "README.md").read_text()
    page.write_text(before)
    run(nursery, REPORT, "{}/speed.json --page {}/README.md", tmp_path)
    # Of one measurement the tables are short.
    assert 0 < page.read_text().count("\n|") < before.count("\n|")
