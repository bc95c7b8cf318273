"""The README's first example runs as it stands and prints what it says."""

import pathlib
import re

import torch

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_first_example_prints_what_it_says(capsys):
    torch.set_default_dtype(torch.float32)  # as a reader would have it
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    exec(compile(code, str(README), "exec"), {})
    printed = int(re.match(r"(\d+)% of the labels", capsys.readouterr().out).group(1))
    promised = int(re.search(r"# (\d+)%", code).group(1))
    assert abs(printed - promised) <= 2  # three seeds gave 87.4 to 87.6
