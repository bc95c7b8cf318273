"""Mutations of the package: one wrong piece of text each, read from ``catalogue/*.toml``.

An entry has a ``name``, the ``file`` inside the package, ``old`` (a text that occurs there exactly
once), ``new`` in its place, ``why`` that is wrong, and if the map of covered lines cannot know who
sees it (tests in other processes, code that runs on import) ``tests``: files to run as well. The
table ``first`` of a catalogue file names, for each module, test files to begin with.
"""

from __future__ import annotations

import ast
import pathlib
import sys
from collections import Counter
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it too

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "torch_penalty_bilevel"
CATALOGUE = pathlib.Path(__file__).parent / "catalogue"
_ENTRIES = {"name", "file", "old", "new", "why", "tests"}


class Mutation(NamedTuple):
    """One change that makes the package wrong."""

    name: str
    file: str
    """Relative to the package."""
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()
    """Files that see it, beside the tests that cover its lines."""
    first: tuple[str, ...] = ()
    """Files to begin with."""

    @property
    def path(self) -> str:
        """Relative to the repository."""
        return f"{PACKAGE}/{self.file}"

    def applied(self, source: str) -> str:
        """``source`` with the mutation; ValueError where the code has moved on."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(
                f"{self.name}: its old text occurs {found} times in {self.file}, not once; "
                f"the code has moved on, bring the entry up to date:\n{self.old}"
            )
        return source.replace(self.old, self.new)

    def lines(self, source: str) -> set[int]:
        """Lines of ``source`` whose tests could see it: the statements that it changes."""
        before, after = self.old.split("\n"), self.new.split("\n")
        first = source[: source.index(self.old)].count("\n") + 1
        last = first + len(before) - 1
        while len(before) > 1 and after and before[0] == after[0]:
            before, after, first = before[1:], after[1:], first + 1
        while len(before) > 1 and after and before[-1] == after[-1]:
            before, after, last = before[:-1], after[:-1], last - 1
        statements = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt)]
        found: set[int] = set()
        for line in range(first, last + 1):
            around = [s for s in statements if s.lineno <= line <= (s.end_lineno or s.lineno)]
            inner = max(around, key=lambda s: s.lineno, default=None)
            found |= {line} if inner is None else _head(inner, line)
        return found


def _head(statement: ast.stmt, line: int) -> set[int]:
    """The lines of a simple statement, or those of a compound one before its body."""
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return {line, *range(statement.lineno, max(end, statement.lineno) + 1)}


def read(folder: pathlib.Path = CATALOGUE) -> list[Mutation]:
    """All entries; ValueError for one that is not complete, or a name given twice."""
    found: list[Mutation] = []
    for path in sorted(folder.glob("*.toml")):
        content: dict[str, Any] = tomllib.loads(path.read_text())
        for entry in content["mutation"]:
            if entry.keys() | {"tests"} != _ENTRIES:
                raise ValueError(f"{path.name}: {entry.get('name')} has {sorted(entry)}")
            tests = tuple(entry.get("tests", ()))
            first = tests or tuple(content.get("first", {}).get(entry["file"], ()))
            found.append(Mutation(**entry | {"tests": tests, "first": first}))
    if twice := [n for n, k in Counter(m.name for m in found).items() if k > 1]:
        raise ValueError(f"names given twice: {twice}")
    return found


def bare_modules(package: pathlib.Path) -> set[str]:
    """Modules with nothing to get wrong: they hold imports, names and docstrings alone."""
    plain = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr, ast.ClassDef)
    found: set[str] = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
        real = [n for n in functions if isinstance(n, ast.Lambda) or not _is_declared_only(n)]
        if not real and all(isinstance(n, plain) for n in tree.body):
            found.add(str(path.relative_to(package)))
    return found


def _is_declared_only(function: ast.FunctionDef) -> bool:
    """A method of a protocol: a docstring and dots."""
    return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in function.body)
