"""The picture of the tutorial: what its own blocks draw."""

import contextlib
import os
import re
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "tutorial.md"


def draw(folder: Path) -> None:
    """Run the blocks of the page, which end in ``run.png``."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        os.chdir(scratch)
        try:
            exec(compile(code, str(PAGE), "exec"), {"__name__": "tutorial"})
            picture = Path("run.png").read_bytes()
        finally:
            os.chdir(here)
    (folder / "tutorial.png").write_bytes(picture)
