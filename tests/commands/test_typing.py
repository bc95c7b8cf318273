"""User code type-checks in mypy's strict mode; pyright's is part of ``make lint``.

The first run reads torch's types, 17 s of processor time; the next ones, with the cache, 1 s.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WRONG = """
import torch
from torch_penalty_bilevel import PenaltyBilevelOptimizer

u = [torch.zeros(1)]
optimizer = PenaltyBilevelOptimizer(u, u, lower_steps="always")
optimizer.metrics.certificate
reason: int = optimizer.curvature.reason
"""
ERRORS = [(6, "arg-type"), (7, "attr-defined"), (8, "assignment")]


def test_user_code_type_checks_and_wrong_code_does_not(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    words = "-m mypy --config-file tests/typing/mypy.ini --no-error-summary tests/typing"
    command = [sys.executable, *words.split(), str(tmp_path / "wrong.py")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"^(.*?):(\d+): error: .* \[(.*)\]$", ended.stdout, re.MULTILINE)
    files = {pathlib.Path(file).name for file, _, _ in found}
    assert files == {"wrong.py"}, ended.stdout + ended.stderr
    assert [(int(line), code) for _, line, code in found] == ERRORS
