"""The scripts of docs/how-to/several-gpus.md, on two processes and on one."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "how-to"


def printed(script, processes):
    """The numbers of what rank 0 says."""
    words = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {FOLDER / script}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words.split()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", done.stdout.split("rank 0")[1])]


def test_two_processes_hold_half_each_and_learn_what_one_does():
    half, whole, together = printed("sharded.py", 2)
    all_of_it, _, alone = printed("sharded.py", 1)
    assert whole == all_of_it == 64 * 17 + 4 * 65
    assert half == whole // 2
    assert together > 70
    # Differences of gradients in float32: a label or two of 200 may fall otherwise.
    assert abs(together - alone) <= 2


def test_two_processes_take_the_steps_of_one():
    world, together, certificate = printed("data_parallel.py", 2)
    _, alone, its_certificate = printed("data_parallel.py", 1)
    assert world == 2
    assert together == alone > 70
    # Sums in another order, in float32, over 100 steps of Adam.
    assert abs(certificate - its_certificate) < 1e-3 * its_certificate
