"""Pytest plugin: run the tests of a list in its order, and write down what happened.

The environment variable ``MUTATION_PLAN`` names a file with the JSON of a ``Plan``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
from typing import Any, TypedDict


class Plan(TypedDict):
    """What to run, and where to write what happened."""

    tests: list[str] | None
    """Node ids; None for all, in pytest's order."""
    report: str


class Report(TypedDict):
    """What happened."""

    tests: list[str]
    """All that were collected."""
    seconds: dict[str, float]
    """Of each test that ran, with its fixtures."""
    failed: str
    """The first test that failed; empty if none did."""
    reason: str
    package: str
    """Where the package that was tested lies; empty if it cannot be imported."""


def pytest_configure(config: Any) -> None:
    if "MUTATION_PLAN" in os.environ and not hasattr(config, "workerinput"):
        plan: Plan = json.loads(pathlib.Path(os.environ["MUTATION_PLAN"]).read_text())
        config.pluginmanager.register(_Listed(plan))


class _Listed:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._report = Report(tests=[], seconds={}, failed="", reason="", package="")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        self._report["tests"] = [item.nodeid for item in items]
        if self._plan["tests"] is None:
            return
        place = {test: i for i, test in enumerate(self._plan["tests"])}
        kept = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in place])
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self._report["seconds"]
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self._report["failed"]:
            self._report["failed"], self._report["reason"] = report.nodeid, _last_line(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self._report["failed"]:
            self._report["failed"] = f"collection of {report.nodeid}"
            self._report["reason"] = str(report.longrepr).strip().splitlines()[-1]

    def pytest_sessionfinish(self) -> None:
        with contextlib.suppress(Exception):
            package = importlib.import_module("torch_penalty_bilevel")
            self._report["package"] = str(package.__file__)
        pathlib.Path(self._plan["report"]).write_text(json.dumps(self._report))


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return (text.strip().splitlines() or [""])[0]
