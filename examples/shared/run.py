"""One method on one seed, while it goes on: its clock, bar, event file and checkpoint."""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from .record import Line, place_of

SAVE_EVERY = 30.0  # seconds between checkpoints


class Run:
    """A loop that shows how it goes and can be taken up again where it was stopped.

    Args:
        line: what defines the run: "method", "seed" and all that changes its result. A checkpoint
            of another line is never taken up.
        folder: event files go to ``folder/events`` (TensorBoard reads them), the checkpoint to
            ``folder/checkpoints``; it is deleted when the loop has ended.
        device: where the work is done. The clock is this process's CPU time on a CPU, which other
            jobs on the machine disturb less than wall time, and wall time elsewhere.
        resume: take up a checkpoint that is there.

    Example:
        >>> import tempfile
        >>> line = {"method": "penalty", "seed": 0}
        >>> run = Run(line, Path(tempfile.mkdtemp()), torch.device("cpu"))
        >>> x, generator = torch.zeros(1), torch.Generator().manual_seed(0)
        >>> for step in run.steps(100, x, generator):
        ...     x += torch.rand(1, generator=generator)
        ...     run.show(step, x=x)
        >>> bool(x > 0), run.seconds > 0
        (True, True)
    """

    def __init__(
        self, line: Line, folder: Path, device: torch.device, resume: bool = False
    ) -> None:
        self.name, self.device = f"{line['method']}, seed {line['seed']}", device
        self.seconds = 0.0
        """Spent in the loop so far, without what ``paused`` took."""
        place = place_of(line)
        self._events = folder / "events" / place
        self._checkpoint = folder / "checkpoints" / f"{place}.pt"
        self._resume = resume
        self._bar: Any = None
        self._writer: SummaryWriter | None = None
        self._began: float | None = None

    def steps(self, count: int, *kept: Any) -> Iterator[int]:
        """0, ..., count - 1; or from where the checkpoint was made.

        Args:
            count: number of steps.
            kept: all that the loop changes: modules, optimizers and schedulers (anything with a
                ``state_dict``), tensors, generators, lists. They are saved every half minute, with
                the global random state; between steps only, so that a step cut in two is not kept.
        """
        return self._loop(count, lambda step: step, kept)

    def until(self, budget: float, spent: Callable[[], float], *kept: Any) -> Iterator[int]:
        """0, 1, ... until ``spent()`` reaches ``budget``; or from where the checkpoint was made.

        Args:
            budget: of what steps cost, where that differs from step to step.
            spent: so far, from what is ``kept``, or of the clock.
            kept: as in ``steps``.
        """
        return self._loop(budget, lambda step: spent(), kept)

    @property
    def clock(self) -> float:
        """Seconds in the loop so far, now."""
        return self.seconds + (0.0 if self._began is None else self._now() - self._began)

    def _loop(
        self, goal: float, reached: Callable[[int], float], kept: tuple[Any, ...]
    ) -> Iterator[int]:
        step = self._load(kept)
        self._bar = tqdm(
            total=goal, initial=int(reached(step)), desc=self.name, leave=False, mininterval=0.5
        )
        self._began, saved = self._now(), time.monotonic()
        try:
            while reached(step) < goal:
                yield step
                step += 1
                self._bar.update(int(reached(step)) - self._bar.n)
                if time.monotonic() - saved >= SAVE_EVERY:
                    with self.paused():
                        self._save(step, kept)
                    saved = time.monotonic()
            self._checkpoint.unlink(missing_ok=True)
        finally:
            self.seconds, self._began = self.clock, None
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def show(self, step: int, **values: float | Tensor) -> None:
        """Numbers beside the bar and in the event file. Reads them: not for every step on a GPU."""
        numbers = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        if self._bar is not None:
            texts = {name: f"{value:.3g}" for name, value in numbers.items()}
            self._bar.set_postfix(texts, refresh=False)
        if self._writer is None:
            self._writer = SummaryWriter(str(self._events), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """The clock stands still inside."""
        was_going = self._began is not None
        self.seconds, self._began = self.clock, None
        yield
        self._began = self._now() if was_going else None

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _save(self, step: int, kept: tuple[Any, ...]) -> None:
        state = {
            "step": step,
            "seconds": self.seconds,
            "kept": [_state(item) for item in kept],
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._checkpoint.with_suffix(".new")  # a run that is killed here keeps the old one
        torch.save(state, fresh)
        fresh.replace(self._checkpoint)

    def _load(self, kept: tuple[Any, ...]) -> int:
        if not self._resume or not self._checkpoint.exists():
            return 0
        try:
            state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            print(f"{self._checkpoint} cannot be read: {self.name} begins anew", file=sys.stderr)
            return 0
        for item, value in zip(kept, state["kept"], strict=True):
            _restore(item, value)
        torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        self.seconds = state["seconds"]
        return state["step"]


def _state(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.detach()
    if isinstance(item, torch.Generator):
        return item.get_state()
    return list(item) if isinstance(item, list) else item.state_dict()


def _restore(item: Any, value: Any) -> None:
    if isinstance(item, Tensor):
        with torch.no_grad():
            item.copy_(value)
    elif isinstance(item, torch.Generator):
        item.set_state(value.cpu())
    elif isinstance(item, list):
        item[:] = value
    else:
        item.load_state_dict(value)
