"""Write ``examples/RESULTS.md`` from the files that the examples leave.

    python -m examples.results results/denoise   # keep what this folder's results.json holds
    python -m examples.results                   # write the page anew

Every example writes ``results.json`` and a picture into its ``--out``. Named here, they are copied
to ``examples/results/runs``, under the name of the folder, and the page is made from all files
there: nothing in it is filled in by hand.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

from examples.shared import command
from examples.shared.record import Line

RUNS = Path(__file__).with_name("runs")
PAGE = Path(__file__).parents[1] / "RESULTS.md"
HEAD = """# Results of the examples

Written by `python -m examples.results` from the files in `examples/results/runs`. Medians (ranges)
over the seeds; every table names the command that made it. Published numbers carry their source.
"""


def keep(folder: Path, runs: Path) -> Path:
    """Copy a folder's results and pictures to ``runs``; where the results then are.

    Raises:
        SystemExit: there are none.
    """
    found = folder / "results.json"
    if not found.exists():
        raise SystemExit(f"{folder} holds no results.json; name the --out of a finished example")
    runs.mkdir(parents=True, exist_ok=True)
    kept = runs / f"{folder.resolve().name}.json"
    if kept.exists():
        before, now = (json.loads(file.read_text())["command"] for file in (kept, found))
        if before != now:
            print(f"{kept} was of another command: {before}", file=sys.stderr)
    shutil.copyfile(found, kept)
    for picture in folder.glob("*.png"):
        shutil.copyfile(picture, kept.with_suffix(".png"))
    return kept


def page(runs: Path) -> str:
    """All files of ``runs`` as Markdown, in the order of their names."""
    parts = [HEAD]
    for path in sorted(runs.glob("*.json")):
        content: Line = json.loads(path.read_text())
        report = importlib.import_module(f"examples.{content['example']}.report")
        picture = path.with_suffix(".png")
        shown = f"\n![{path.stem}](results/runs/{picture.name})\n" if picture.exists() else ""
        parts.append(
            f"## {path.stem}\n\n`{content['command']}`\n\n{report.section(content)}\n{shown}\n"
            f"{content['machine']}, {content['date']}.\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Copy what is named, write the page."""
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="--out of finished examples")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where they are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="what is written")
    options = parser.parse_args()
    for folder in options.folders:
        print(f"kept: {keep(folder, options.runs)}", file=sys.stderr)
    options.page.write_text(page(options.runs))
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
