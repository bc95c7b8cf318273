"""What becomes of one mutation: applied in a copy, tested, put back, and written down."""

from __future__ import annotations

import hashlib
import math
import pathlib
import shutil
import time
from typing import TypedDict

from covering import Covering, tested
from forking import Nursery, Slow
from mutants import PACKAGE, ROOT, Mutation

_LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", ".coverage*", "__pycache__"),
    *("results", "shared", "*.egg-info", "build", "dist"),
)
# Seconds of tests in the parts of a selection; what is caught is mostly caught in the first.
_PARTS = (5.0, 30.0, 60.0)
_FILES = 3  # in the first part: to collect tests from many files takes longer than to run them


class Verdict(TypedDict):
    """What became of a mutation."""

    end: str
    """``caught``, ``timeout`` (a test hangs, which is noticed), ``survived``, ``uncovered`` (no
    test runs these lines) or ``unseen`` (by the tests that there was time for)."""
    by: str
    """The test that failed first."""
    reason: str
    tests: int
    """How many could have seen it."""
    seconds: float
    state: str
    """Hash of all that this verdict rests on."""


def copied(to: pathlib.Path) -> pathlib.Path:
    """A copy of the working tree without what git ignores."""
    shutil.copytree(ROOT, to, ignore=_LEFT_OUT, symlinks=True)
    return to


def _state(mutation: Mutation, by: str, root: pathlib.Path) -> str:
    """Of what was caught the change, its file and that of the test; else all of code and tests."""
    test = root / by.partition("::")[0]
    paths = [root / mutation.path, test]
    if not (by and test.is_file()):
        paths = [*sorted((root / PACKAGE).rglob("*.py")), *sorted((root / "tests").rglob("*.py"))]
    digest = hashlib.sha256(repr(mutation[:4]).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def judged(
    mutation: Mutation,
    nursery: Nursery,
    copy: pathlib.Path,
    tests: list[str],
    new: list[str],
    covering: Covering,
    within: float = math.inf,
) -> Verdict:
    """Apply it in ``copy``, run ``tests``, then ``new``, until one fails, and put the file back.

    Args:
        mutation: to be judged.
        nursery: runs pytest.
        copy: of the repository.
        tests: that cover its lines, the fastest first.
        new: tests of which no map knows what they cover.
        covering: says what each takes.
        within: leave out what comes after this many seconds of tests.
    """
    begun, path = time.monotonic(), copy / mutation.path
    source = path.read_text()
    end, by, reason = "survived" if tests or new else "uncovered", "", ""
    path.write_text(mutation.applied(source))
    try:
        spent = 0.0
        for part in _parts([*tests, *new], covering, mutation.first):
            if spent > within:
                end = "unseen"
                break
            expected = sum(covering.seconds.get(test, 1.0) for test in part)
            spent += expected
            report = tested(nursery, copy, part, ["-x"], 120 + 6 * expected)
            if report["failed"]:
                end, by, reason = "caught", report["failed"], report["reason"]
                break
    except Slow:
        end, reason = "timeout", "ran far longer than the tests do"
    finally:
        path.write_text(source)
    seconds = round(time.monotonic() - begun, 1)
    count = len(tests) + len(new)
    state = _state(mutation, by, copy)
    return Verdict(end=end, by=by, reason=reason, tests=count, seconds=seconds, state=state)


def _parts(tests: list[str], covering: Covering, hints: tuple[str, ...]) -> list[list[str]]:
    """In the order to run them: first a few files, those named or with tests of little else."""
    closest = _closest(tests, covering, hints)
    parts: list[list[str]] = [closest, []]
    spent = 0.0
    for test in (t for t in tests if t not in closest):
        taken = covering.seconds.get(test, 1.0)
        if parts[-1] and len(parts) - 1 <= len(_PARTS) and spent + taken > _PARTS[len(parts) - 2]:
            parts.append([])
            spent = 0.0
        parts[-1].append(test)
        spent += taken
    return [part for part in parts if part]


def _closest(tests: list[str], covering: Covering, hints: tuple[str, ...]) -> list[str]:
    """Fast tests of the files named; of others those that run few lines and so are about these."""
    named = [test for test in tests if test.partition("::")[0] in hints]
    narrow = sorted(tests, key=lambda t: covering.breadth.get(t, math.inf))
    limit, most = (_PARTS[1], len(hints)) if named else (_PARTS[0], _FILES)
    found: list[str] = []
    files: set[str] = set()
    spent = 0.0
    for test in named or narrow:
        file, taken = test.partition("::")[0], covering.seconds.get(test, 1.0)
        if spent + taken <= limit and (file in files or len(files) < most):
            found.append(test)
            files.add(file)
            spent += taken
    return sorted(found, key=lambda t: covering.seconds.get(t, 1.0))


def table(mutations: list[Mutation], verdicts: dict[str, Verdict]) -> str:
    """Counts, survivors by name, and a row for each mutation."""
    judged = [(m, verdicts[m.name]) for m in mutations if m.name in verdicts]
    caught = [m for m, v in judged if v["end"] in ("caught", "timeout")]
    lines = [f"{len(caught)} of {len(judged)} mutations caught.", ""]
    for mutation, _ in judged:
        if mutation not in caught:
            lines.append(f"- SURVIVED {mutation.name} ({mutation.file}): {mutation.why}")
    lines += ["", "| mutation | file | verdict | test | s |", "|---|---|---|---|---|"]
    for mutation, verdict in judged:
        by = verdict["by"].replace("|", "\\|") or f"{verdict['tests']} tests"
        row = mutation.name, mutation.file, verdict["end"], by, f"{verdict['seconds']:.0f}"
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def holds(mutation: Mutation, verdict: Verdict) -> bool:
    """Has nothing changed on which this verdict rests, and did all tests have their say?"""
    return verdict["end"] != "unseen" and verdict["state"] == _state(mutation, verdict["by"], ROOT)
