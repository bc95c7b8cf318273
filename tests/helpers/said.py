"""What the package says when something goes wrong: the fixed words of its errors and warnings."""

from __future__ import annotations

import ast
import pathlib
from typing import Any

PACKAGE = pathlib.Path(__file__).parents[2] / "torch_penalty_bilevel"
ERRORS = (
    "NonFiniteError",
    "AdjointError",
    "UnusedParameterError",
    "DoubleBackwardError",
    "NondeterministicClosureError",
    "WorkerError",
)


def _fixed(node: ast.AST) -> list[str]:
    """The strings in an expression between which something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [p.value for p in node.values if isinstance(p, ast.Constant)]
    return []


def _calls(tree: ast.AST) -> list[ast.Call]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called: Any = node.func  # a name, or a name of a module
        name = getattr(called, "attr", None) or getattr(called, "id", None)
        if name == "warn" or name in ERRORS:
            found.append(node)
    return found


def messages() -> dict[str, str]:
    """By place, the longest fixed part of each message that is written where it is raised."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in _calls(ast.parse(path.read_text())):
            parts = [part for argument in call.args for part in _fixed(argument)]
            if parts:
                place = f"{path.relative_to(PACKAGE)}:{call.lineno}"
                found[place] = max(parts, key=len).strip()
    return found
