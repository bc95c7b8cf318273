"""The code of a Markdown page, run as a reader would run it: all blocks in order, in one namespace.

    ```python        runs; a line of an error's traceback is the line of the page
    ```pycon         a doctest session, in the same namespace
    ```output        right after a ```python block: what that block printed ("..." for any text)
    <!-- within 0.05 -->    right before it: its numbers agree to this share of the larger one
    <!-- run         code that the reader does not see (a setup, or asserts on what was shown)
    -->
    <!-- needs: higher torchopt -->    the page is skipped where one of these does not import

Other fences (bash, text, toml, "{literalinclude}", ...) are not run.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import math
import pathlib
import re
from typing import NamedTuple

import pytest

_BLOCK = re.compile(
    r"^(?:<!-- within (?P<within>[\d.]+) -->\n)?"
    r"```(?P<kind>python|pycon|output)\n(?P<shown>.*?)^```$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
_NEEDS = re.compile(r"<!-- needs: (.+?) -->")


class Block(NamedTuple):
    """Code or output of a page."""

    kind: str
    text: str
    line: int  # of the first line of text, from 0
    within: float = 0.0  # how far the numbers of an output may be off


def blocks(page: pathlib.Path) -> list[Block]:
    """The blocks that count, in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        kind = match["kind"] or "python"
        group = "shown" if match["kind"] else "hidden"
        line = text.count("\n", 0, match.start(group))
        found.append(Block(kind, match[group], line, float(match["within"] or 0)))
    return found


def run_page(page: pathlib.Path) -> dict:
    """Run the page's blocks; returns their namespace."""
    for names in _NEEDS.findall(page.read_text()):
        for name in names.split():
            pytest.importorskip(name, reason=f"{page.name} needs {name}")
    names: dict = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.kind == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = out.getvalue()
        elif block.kind == "output":
            _check_output(page, block, printed)
        else:
            _check_session(page, block, names)
    return names


def _check_output(page: pathlib.Path, block: Block, printed: str) -> None:
    shown, got = block.text, printed
    if block.within:
        both = [[float(n) for n in _NUMBER.findall(text)] for text in (shown, got)]
        near = [math.isclose(a, b, rel_tol=block.within) for a, b in zip(*both, strict=False)]
        assert all(near), f"{page}:{block.line + 1} shows\n{shown}\nbut the block printed\n{got}"
        shown, got = (_NUMBER.sub("#", text) for text in (shown, got))
    same = doctest.OutputChecker().check_output(
        shown, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert same, f"{page}:{block.line + 1} shows\n{block.text}\nbut the block printed\n{printed}"


def _check_session(page: pathlib.Path, block: Block, names: dict) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    names.update(test.globs)
