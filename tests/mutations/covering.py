"""Which tests run which lines of the package: one run of the whole suite, kept for later ones."""

from __future__ import annotations

import difflib
import functools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from coverage import CoverageData
from forking import Nursery
from listed import Plan, Report
from mutants import PACKAGE, Mutation


def tested(
    nursery: Nursery,
    copy: pathlib.Path,
    tests: Sequence[str] | None,
    options: Sequence[str],
    limit: float | None,
    **environment: str,
) -> Report:
    """Run ``tests`` (None: all) in ``copy``, on the package that lies there.

    Raises:
        Slow: they were stopped after ``limit`` seconds.
        RuntimeError: pytest itself failed.
    """
    plan_file, report_file = copy / "plan.json", copy / "report.json"
    report_file.unlink(missing_ok=True)
    listed = None if tests is None else list(tests)
    plan_file.write_text(json.dumps(Plan(tests=listed, report=str(report_file))))
    places = os.pathsep.join((str(copy), str(copy / "tests" / "mutations")))
    # No bytecode: a mutated file may have the size and, to the second, the time of the true one.
    variables = {"PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"MUTATION_PLAN": str(plan_file), **environment}
    files = [] if tests is None else sorted({test.partition("::")[0] for test in tests})
    words = ["pytest", "-p", "listed", "-p", "no:cacheprovider", "-q", *options, *files]
    ended = nursery.run(words, copy, variables, limit)
    if not report_file.exists() or ended.status not in (0, 1, 2, 5):
        said = (ended.output + ended.errors)[-3000:]
        raise RuntimeError(f"pytest ended with {ended.status}:\n{said}")
    report: Report = json.loads(report_file.read_text())
    home = report["package"]
    if home and not pathlib.Path(home).resolve().is_relative_to(copy.resolve()):
        raise RuntimeError(f"the tests ran on {home}, not on the copy")
    return report


class Covering:
    """The map, from a folder of its own; None: an empty one.

    Where the package has changed since it was made, lines are carried over by comparison.
    """

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self.seconds: dict[str, float] = {}
        """What each test takes."""
        self.breadth: Mapping[str, int] = {}
        """How many lines of the package each test runs."""
        self._sources: dict[str, str] = {}
        self._files: dict[str, str] = {}
        if folder is None:
            return
        saved = json.loads((folder / "map.json").read_text())
        self.seconds, self._sources = saved["seconds"], saved["sources"]
        self._data = CoverageData(str(folder / "covered"))
        self._data.read()
        self._files = {
            path[path.rindex(PACKAGE + "/") :]: path for path in self._data.measured_files()
        }
        every = (tests for path in self._files for tests in self._covered(path).values())
        self.breadth = Counter(test for tests in every for test in tests)

    @staticmethod
    def made(nursery: Nursery, copy: pathlib.Path, folder: pathlib.Path, jobs: int) -> Covering:
        """Run the whole suite once; RuntimeError if it does not pass."""
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--numprocesses", str(jobs), "--cov", "--cov-context=test", "--cov-report="]
        report = tested(nursery, copy, None, options, None, COVERAGE_FILE=str(folder / "covered"))
        if report["failed"]:
            raise RuntimeError(f"the suite fails as it is: {report['failed']}: {report['reason']}")
        paths = (copy / PACKAGE).rglob("*.py")
        sources = {str(p.relative_to(copy)): p.read_text() for p in paths}
        saved = {"seconds": report["seconds"], "sources": sources}
        (folder / "map.json").write_text(json.dumps(saved))
        return Covering(folder)

    def stale(self, package: pathlib.Path) -> list[str]:
        """Files of the package that have changed since."""
        now = {str(p.relative_to(package.parent)): p for p in package.rglob("*.py")}
        return [name for name, p in now.items() if self._sources.get(name) != p.read_text()]

    def tests(self, mutation: Mutation, source: str) -> list[str]:
        """Those that run the lines which ``mutation`` changes in ``source``, fastest first."""
        lines = _carried(mutation.lines(source), source, self._sources.get(mutation.path, source))
        covered = self._covered(mutation.path)
        found = {test for line in lines for test in covered.get(line, ())}
        if "" in found:  # on import: whoever uses the file may see it
            found = {test for tests in covered.values() for test in tests} - {""}
        found |= {t for t in self.seconds if t.partition("::")[0] in mutation.tests}
        return sorted(found, key=lambda test: self.seconds.get(test, 0.0))

    @functools.lru_cache(maxsize=200)  # noqa: B019
    def _covered(self, path: str) -> dict[int, set[str]]:
        if path not in self._files:
            return {}
        contexts = self._data.contexts_by_lineno(self._files[path])
        return {
            line: {name.rpartition("|")[0] for name in names} for line, names in contexts.items()
        }


def _carried(lines: Iterable[int], now: str, then: str) -> set[int]:
    """Lines of ``now`` as lines of ``then``; a new one as its neighbours."""
    if now == then:
        return set(lines)
    a, b = now.splitlines(), then.splitlines()
    found: set[int] = set()
    for kind, i, j, k, m in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        for line in lines:
            if kind == "equal" and i < line <= j:
                found.add(line - i + k)
            elif i < line <= j:
                found |= set(range(k, m + 2))
    return found
