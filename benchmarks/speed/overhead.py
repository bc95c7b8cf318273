"""What the optimizer does around the mathematics of a step, part by part.

    python -m benchmarks.speed.overhead            # the smallest network of ``make bench``
    python -m benchmarks.speed.overhead --kind "MLP 784-1024-1024-10"

Each row is the step with one part left out, in turn with the others and the floor, so that all meet
the same load. What a part costs is the difference from the whole step: medians of CPU time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.speed import methods, problems
from examples.shared import command
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer
from torch_penalty_bilevel.levels import rows
from torch_penalty_bilevel.undo import buffers, transaction

Parts = tuple[tuple[Any, str, Any], ...]


class _NoGenerators:
    def __init__(self, devices: Any) -> None:
        del devices

    def restore(self) -> None: ...


@contextlib.contextmanager
def _unguarded(guard: Any, level: str, function: Any, turn: Any = None) -> Generator[None]:
    del guard, level, function, turn
    yield


def _rests(rule: LeastSquares, state: Any) -> bool:
    del rule, state
    return False


def _all_rows(rule: torch.optim.Optimizer) -> None:
    rule.step()


GENERATORS: Parts = ((transaction, "RandomState", _NoGenerators),)
GUARD: Parts = ((buffers.BufferGuard, "evaluation", _unguarded),)
# torch wraps step for profiler and hooks when the first optimizer is made; here it is still bare.
# The two rules inside have wrappers of their own.
WRAPPER: Parts = ((PenaltyBilevelOptimizer, "step", PenaltyBilevelOptimizer.step),)
CORRECTION: Parts = ((LeastSquares, "spans", _rests),)
ROWS: Parts = ((rows, "step_touched_rows", _all_rows),)
WITHOUT: dict[str, Parts] = {
    "nothing left out": (),
    "state of the random generators": GENERATORS,
    "guard of module buffers": GUARD,
    "torch's wrapper of step": WRAPPER,
    "correction of the multiplier": CORRECTION,
    "all four": GENERATORS + GUARD + WRAPPER + CORRECTION,
    "rows of absent samples kept (the floor has that, too)": ROWS,
}


@contextlib.contextmanager
def left_out(parts: Parts) -> Generator[None]:
    """The package without ``parts``."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, value in parts:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--kind", choices=problems.BY_KIND, default=next(iter(problems.BY_KIND)))
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {
        name: methods.METHODS[name](problems.by_kind(options.kind))
        for name in (methods.OURS, methods.FLOOR)
    }
    for step in steps.values():
        for _ in range(30):  # the first ten take one more product
            step()
    taken: dict[str, list[float]] = {name: [] for name in (methods.FLOOR, *WITHOUT)}
    for _ in tqdm(range(options.rounds)):
        taken[methods.FLOOR].append(seconds(steps[methods.FLOOR]))
        for name, parts in WITHOUT.items():
            with left_out(parts):
                taken[name].append(seconds(steps[methods.OURS]))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    floor, whole = medians.pop(methods.FLOOR), medians["nothing left out"]
    print(f"\n{options.kind}: floor {floor * 1e3:.2f} ms\n")
    print("| step without | ms | over the floor | saves, of the floor |\n|---|---|---|---|")
    for name, median in medians.items():
        saved = (whole - median) / floor
        print(f"| {name} | {median * 1e3:.2f} | {median / floor:.2f} | {saved:.2f} |")


if __name__ == "__main__":
    main()
