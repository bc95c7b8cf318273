"""``BilevelTrainer`` under torchrun: two processes are one."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*pin_memory.*"),
]

pytest.importorskip("transformers")
trainer_on_ranks = pytest.importorskip("trainer_on_ranks")


def test_two_processes_are_one(tmp_path):
    """Batches are split between the ranks, u is the same; differences leave rounding over h."""
    script = pathlib.Path(trainer_on_ranks.__file__)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(script.parents[2]), str(script.parent), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "learned.pt", weights_only=True)
    expected = trainer_on_ranks.learned(tmp_path / "one", world=1)
    assert float(expected["u"].abs().max()) > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
