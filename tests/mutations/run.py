"""Break the package on purpose, one mutation at a time, and see whether a test notices.

Works on copies in a temporary directory, never on the working tree. The first run makes a map
of the tests that cover each line (one run of the whole suite); each mutation then meets only those
tests, the fastest first, until one fails.

    python tests/mutations/run.py                    # all: about half an hour on two cores
    python tests/mutations/run.py --only 'rows*'     # by name, or by file: --only 'solve/*'
    python tests/mutations/run.py --resume           # go on, keep verdicts that still hold
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import pathlib
import queue
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed

from covering import Covering, tested
from judging import Verdict, copied, holds, judged, table
from mutants import PACKAGE, ROOT, Mutation, read
from tqdm import tqdm

RESULTS = ROOT / "results" / "mutations"


def run(
    mutations: list[Mutation],
    covering: Covering,
    jobs: int,
    within: float,
    known: dict[str, Verdict],
) -> None:
    """Judge them all, on ``jobs`` copies at a time; verdicts go to ``known`` and to the file."""
    with tempfile.TemporaryDirectory(prefix="mutations") as folder:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(jobs):
            copies.put(copied(pathlib.Path(folder) / f"copy{number}"))
        first = copies.get()
        here = tested(first, None, ["--collect-only"], 300)["tests"]
        copies.put(first)
        new = [test for test in here if test not in covering.seconds]
        if new:
            print(f"{len(new)} tests are not in the map: all mutations meet them", file=sys.stderr)
        existing = set(here)

        def one(mutation: Mutation) -> Verdict:
            copy = copies.get()
            try:
                tests = covering.tests(mutation, (copy / mutation.path).read_text())
                existing_tests = [t for t in tests if t in existing]
                return judged(mutation, copy, existing_tests, new, covering.seconds, within)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(one, mutation): mutation for mutation in mutations}
            for done in tqdm(as_completed(waiting), total=len(waiting), unit="mutation"):
                known[waiting[done].name] = done.result()
                (RESULTS / "verdicts.json").write_text(json.dumps(known, indent=1))
        witnesses = {known[m.name]["by"] for m in mutations}
        fast = sorted(witnesses & existing, key=lambda test: covering.seconds.get(test, 1.0))
        if fast:
            _check_that_they_pass(copies.get(), fast)


def _check_that_they_pass(copy: pathlib.Path, witnesses: list[str]) -> None:
    """A test that fails without any mutation, run as here, is no witness."""
    report = tested(copy, witnesses, [], 1800)
    if report["failed"]:
        raise RuntimeError(f"{report['failed']} fails without a mutation: {report['reason']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names or files, with * ?")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default: 2)")
    parser.add_argument("--resume", action="store_true", help="keep verdicts that still hold")
    parser.add_argument("--map", action="store_true", help="make the map of covered lines anew")
    parser.add_argument(
        "--within",
        type=float,
        default=math.inf,
        help="seconds of tests per mutation (default: all)",
    )
    parser.add_argument("--share", type=float, default=0.95, help="to be caught (default: 0.95)")
    chosen = parser.parse_args()

    def matches(m: Mutation) -> bool:
        return any(fnmatch.fnmatch(text, chosen.only) for text in (m.name, m.file))

    mutations = [m for m in read() if matches(m)]
    if not mutations:
        parser.error(f"no mutation matches {chosen.only!r}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if chosen.map or not (RESULTS / "map.json").exists():
        print("running the whole suite once, to see which tests cover which lines", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="mutations") as folder:
            Covering.made(copied(pathlib.Path(folder) / "copy"), RESULTS, chosen.jobs)
    covering = Covering(RESULTS)
    if stale := covering.stale(ROOT / PACKAGE):
        print(f"the map is of another state of {len(stale)} files: --map?", file=sys.stderr)
    saved, known = RESULTS / "verdicts.json", dict[str, Verdict]()
    if saved.exists():
        known = json.loads(saved.read_text())
    if chosen.resume:
        kept = {m for m in mutations if m.name in known and holds(m, known[m.name])}
    else:
        kept = set[Mutation]()
    others = {m for m in read() if m.name in known and not matches(m)}
    known = {m.name: known[m.name] for m in kept | others}
    run([m for m in mutations if m not in kept], covering, chosen.jobs, chosen.within, known)
    text = table(mutations, known)
    (RESULTS / "report.md").write_text(text)
    print(text)
    caught = sum(known[m.name]["end"] in ("caught", "timeout") for m in mutations)
    return int(caught < chosen.share * len(mutations))


if __name__ == "__main__":
    sys.exit(main())
