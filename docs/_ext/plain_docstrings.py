"""Docstrings are plain text with code and formulas: v*, ||r|| and s_ in them are no markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(``.+?``|:\w+:`.+?`|(?<!\S)\*\w+\*(?!\w))")  # and *stressed* words


def _escaped(line: str) -> str:
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"([|*`])|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def plain(lines: list[str]) -> list[str]:
    """The lines with RST's markup escaped outside code, doctests, literal blocks and formulas."""
    result: list[str] = []
    block: int | None = None  # indent of the line that began a formula or a literal block
    doctest = False
    for line in lines:
        if block is not None and line.strip() and _indent(line) <= block:
            block = None
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if block is not None or doctest:
            result.append(line)
        elif line.lstrip().startswith("..") or line.rstrip().endswith("::"):
            block = _indent(line)
            result.append(line)
        else:
            result.append(_escaped(line))
    return result


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = plain(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Before napoleon, whose markup must stay."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"version": "1", "parallel_read_safe": True}
