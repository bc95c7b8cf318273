"""The README's first example runs as it stands and does what it says."""

import pathlib
import re

import torch

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_first_example_runs():
    torch.set_default_dtype(torch.float32)  # as a reader would have it
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 18
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["optimizer"].metrics.gradient_evaluations > 300
    # Labels are noise here: what can be checked is that every weight was touched and is finite.
    weights = names["weights"].detach()
    assert torch.isfinite(weights).all()
    assert float((weights != 0).float().mean()) > 0.99
