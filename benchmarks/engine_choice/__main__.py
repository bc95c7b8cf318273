"""Does curvature="auto" ever lose a run that double backward wins? Kinds of network x seeds.

    python -m benchmarks.engine_choice                       # twelve kinds, 20 seeds
    python -m benchmarks.engine_choice --kinds LSTM --seeds 3 --epochs 5 --differences

Cleaning scikit-learn's digits: 1,000 samples, half of them with a wrong label, 50 clean ones, one
weight per sample, batches of 100, Adam 1e-2 below and 1e-1 above. The score is the share of labels
told right; 0.5 is guessing. A seed is lost if auto scores lower than double backward by more than
twice the standard deviation of double backward over the seeds. Attention is differentiated twice
in its plain form (sdpa_kernel(MATH)), which "auto" and differences are not given. Where auto never
left double backward the two take the same steps bit by bit, and the run is not repeated.
``--differences`` adds a column of finite differences throughout.

Each run is a line of results/engine_choice.jsonl, so that an interrupted table goes on.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.engine_choice.digits import Cleaning
from benchmarks.engine_choice.kinds import KINDS, twice_differentiable
from examples.shared import command
from examples.shared.table import markdown
from torch_penalty_bilevel import BilevelWarning, NonFiniteError
from torch_penalty_bilevel.curvature import Automatic

ENGINES = ("auto", "double_backward", "finite_difference")


def told_right(kind: str, engine: str, seed: int, epochs: int) -> tuple[float, float]:
    """The score, and the share of steps in which differences were in use."""
    cleaning = Cleaning(kind, engine, seed)
    used, switched = cleaning.optimizer.curvature, []
    cleaning.optimizer.register_step_post_hook(
        lambda *_: switched.append(isinstance(used, Automatic) and used.switched)
    )
    for _ in range(epochs):
        cleaning.epoch()
    return cleaning.told_right, statistics.mean(switched)


def run(kind: str, engine: str, seed: int, epochs: int) -> dict[str, Any]:
    """One line of the record."""
    line: dict[str, Any] = {"kind": kind, "engine": engine, "seed": seed, "epochs": epochs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        try:
            if engine == "double_backward":
                with twice_differentiable(kind):
                    score, share = told_right(kind, engine, seed, epochs)
            else:
                score, share = told_right(kind, engine, seed, epochs)
        except NonFiniteError:
            score, share = 0.0, 0.0
    return line | {"score": score, "differences": share}


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["kind"], line["engine"], line["seed"], line["epochs"]


def table(lines: list[dict[str, Any]], kinds: list[str], engines: Sequence[str]) -> str:
    """Per kind: mean and standard deviation of each engine, and auto's lost seeds."""
    rows: dict[str, list[str]] = {}
    for kind in kinds:
        by_engine = {
            e: {r["seed"]: r for r in lines if r["kind"] == kind and r["engine"] == e}
            for e in engines
        }
        scores = {e: [r["score"] for r in rs.values()] for e, rs in by_engine.items()}
        spread = statistics.pstdev(scores["double_backward"])
        exact, auto = by_engine["double_backward"], by_engine["auto"]
        behind = [exact[s]["score"] - auto[s]["score"] for s in auto]
        lost = sum(gap > 2 * spread for gap in behind)
        share = statistics.mean(r["differences"] for r in auto.values())
        rows[kind] = [
            *(f"{statistics.mean(v):.3f} ± {statistics.pstdev(v):.3f}" for v in scores.values()),
            f"{max(behind):+.3f}",
            f"{lost} of {len(auto)}",
            f"{share:.0%}",
        ]
    header = ["", *engines, "auto's worst gap", "lost seeds", "auto's steps by differences"]
    return markdown(header, rows)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--differences", action="store_true", help="a column of them throughout")
    parser.add_argument("--record", type=Path, default=Path("results/engine_choice.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.touch()
    lines = [json.loads(line) for line in options.record.read_text().splitlines()]
    done = {_key(line) for line in lines}
    engines = ENGINES if options.differences else ENGINES[:2]
    wanted = [
        (kind, engine, seed, options.epochs)
        for seed in range(options.seeds)
        for kind in options.kinds
        for engine in engines
    ]
    with options.record.open("a") as record:
        for job in tqdm([job for job in wanted if job not in done], unit="run"):
            auto = lines[-1] if job[1] == "double_backward" and lines else {}
            same = auto.get("differences") == 0.0 and _key(auto) == (job[0], "auto", *job[2:])
            lines.append(auto | {"engine": job[1]} if same else run(*job))
            record.write(json.dumps(lines[-1]) + "\n")
            record.flush()
    asked = set(wanted)
    print(table([line for line in lines if _key(line) in asked], options.kinds, engines))
    print(f"\n{options.seeds} seeds; {command.machine()}")


if __name__ == "__main__":
    main()
