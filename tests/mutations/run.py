"""Break the package on purpose, one mutation at a time, and see whether a test notices.

Works on copies in a temporary directory, never on the working tree. The first run makes a map
of the tests that cover each line (one run of the whole suite); each mutation then meets only those
tests, the fastest first, until one fails.

    python tests/mutations/run.py                    # all: about half an hour on two cores
    python tests/mutations/run.py --only 'rows*'     # by name, or by file: --only 'newton/*'
    python tests/mutations/run.py --resume           # go on, keep verdicts that still hold
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import pathlib
import queue
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed

from covering import Covering, tested
from forking import Nursery
from judging import Verdict, copied, holds, judged, table
from mutants import PACKAGE, ROOT, Mutation, read
from tqdm import tqdm

RESULTS = ROOT / "results" / "mutations"
_OWN = "tests/test_mutations.py"  # sees every mutation: the old text is gone


def run(
    mutations: list[Mutation],
    covering: Covering,
    jobs: int,
    within: float,
    known: dict[str, Verdict],
) -> None:
    """Judge them all, on ``jobs`` copies at a time; verdicts go to ``known`` and to the file."""
    with tempfile.TemporaryDirectory(prefix="mutations") as folder, contextlib.ExitStack() as stack:
        places: queue.Queue[tuple[Nursery, pathlib.Path]] = queue.Queue()
        for number in range(jobs):
            nursery = stack.enter_context(contextlib.closing(Nursery()))
            places.put((nursery, copied(pathlib.Path(folder) / f"copy{number}")))
        first = places.get()
        here = tested(*first, None, ["--collect-only"], 300)["tests"]
        places.put(first)
        here = [test for test in here if not test.startswith(_OWN)]
        new = [test for test in here if test not in covering.seconds]
        if new:
            print(f"{len(new)} tests are not in the map: mutations meet them last", file=sys.stderr)
        existing = set(here)

        def one(mutation: Mutation) -> Verdict:
            place = places.get()
            try:
                _, copy = place
                tests = covering.tests(mutation, (copy / mutation.path).read_text())
                existing_tests = [t for t in tests if t in existing]
                return judged(mutation, *place, existing_tests, new, covering, within)
            finally:
                places.put(place)

        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(one, mutation): mutation for mutation in mutations}
            try:
                for done in tqdm(as_completed(waiting), total=len(waiting), unit="mutation"):
                    known[waiting[done].name] = done.result()
                    (RESULTS / "verdicts.json").write_text(json.dumps(known, indent=1))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        witnesses = {known[m.name]["by"] for m in mutations}
        fast = sorted(witnesses & existing, key=lambda test: covering.seconds.get(test, 1.0))
        if fast:
            _check_that_they_pass(*places.get(), fast)


def _check_that_they_pass(nursery: Nursery, copy: pathlib.Path, witnesses: list[str]) -> None:
    """A test that fails without any mutation, run as here, is no witness."""
    report = tested(nursery, copy, witnesses, [], 1800)
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
        with (
            tempfile.TemporaryDirectory(prefix="mutations") as folder,
            contextlib.closing(Nursery()) as nursery,
        ):
            copy = copied(pathlib.Path(folder) / "copy")
            Covering.made(nursery, copy, RESULTS, chosen.jobs)
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
    waiting = [m for m in mutations if m not in kept]
    waiting.sort(key=lambda m: m.name in known)  # those that never were judged come first
    run(waiting, covering, chosen.jobs, chosen.within, known)
    text = table(mutations, known)
    (RESULTS / "report.md").write_text(text)
    print(text)
    caught = sum(known[m.name]["end"] in ("caught", "timeout") for m in mutations)
    return int(caught < chosen.share * len(mutations))


if __name__ == "__main__":
    sys.exit(main())
