"""The script of docs/how-to/several-gpus.md, on two processes and on one."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "how-to" / "sharded.py"


def printed(processes):
    """(numbers held by rank 0, numbers of all, per cent told right)."""
    words = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {SCRIPT}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words.split()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [int(n) for n in re.findall(r"\d+", done.stdout.split("rank 0")[1])]


def test_two_processes_hold_half_each_and_learn_what_one_does():
    half, whole, together = printed(2)
    all_of_it, _, alone = printed(1)
    assert whole == all_of_it == 64 * 17 + 4 * 65
    assert half == whole // 2
    assert together > 70
    # Differences of gradients in float32: a label or two of 200 may fall otherwise.
    assert abs(together - alone) <= 2
