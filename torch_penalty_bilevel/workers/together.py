"""Workers that raise together: none may raise alone, or the others wait for it forever.

What a closure, a backward pass or a check raises on one worker is held, and that worker goes on
through the same averages as the others, with NaN in all that it contributes. So all of them come
to the same end, where the one raises what it held and the others ``WorkerError``. No message is
sent for this: each average carries two numbers more, which are read when the step is over. What
comes after the last average, the rules' own steps and their hooks, has a message of one number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..curvature import Curvature, Linearised, Loss, Map
from ..errors import DoubleBackwardError, WorkerError
from ..tensors import OptionalPair, Pair, Tensors, dense, is_sharded, norms
from .mean import Mean, Reduce, one_worker, warn_of_strangers

T = TypeVar("T")
_ROUNDING = 1e-4


class Workers:
    """Those that share one problem, as one of them sees them.

    Args:
        mean: averages a tuple of tensors over them.
    """

    def __init__(self, mean: Reduce) -> None:
        self.mean = mean
        self._failure: Exception | None = None
        self._early: Exception | None = None
        """What a hook before the step raised."""
        self._ballot: Tensor | None = None
        """Shares of workers that hold a failure, and that take differences, at the last average."""
        self._engine: Curvature | None = None
        self._is_warned = False

    def __reduce__(self) -> tuple[type[Workers], tuple[Reduce]]:
        return Workers, (self.mean,)

    @property
    def is_shared(self) -> bool:
        """Is there anyone to talk to?"""
        return self.mean is not one_worker

    @property
    def reduce(self) -> Reduce:
        """The average."""
        return self._reduced if self.is_shared else one_worker

    def _reduced(self, tensors: Tensors) -> Tensors:
        if not tensors:
            return tensors
        if self._failure is not None:
            tensors = tuple(torch.full_like(dense(t), torch.nan) for t in tensors)
        like = tensors[0]
        says = [self._failure is not None, self._engine is not None and _differs(self._engine)]
        dtype = torch.promote_types(like.dtype, torch.float32)
        ballot = torch.tensor(says, device=like.device, dtype=dtype)
        *found, self._ballot = self.mean((*tensors, ballot))
        return tuple(found)

    def attempt(self, what: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """``what()``, which may raise on this worker alone; ``otherwise()`` once it has."""
        if not self.is_shared:
            return what()
        if self._failure is None:
            try:
                return what()
            except Exception as error:
                self._failure = error
        return otherwise()

    def meet(self, like: Tensor) -> None:
        """Let no worker enter a forward pass that gathers what is sharded as ``like`` without all.

        Raises:
            WorkerError: another worker holds a failure; or what this one holds.
        """
        if is_sharded(like):
            self.agreed((), like)

    def before_step(self, hook: Callable[[], T]) -> T | None:
        """``hook()``; what it raises is held until the step, which then ends on all workers."""
        if not self.is_shared:
            return hook()
        try:
            return hook()
        except Exception as error:
            self._early = error
        return None

    def agreed(self, flags: Sequence[bool], like: Tensor) -> list[bool]:
        """Which of them some worker raises, like a hand; waits for all of them.

        Raises:
            WorkerError: another worker holds a failure; or what this one holds.
        """
        if not self.is_shared:
            return list(flags)
        dtype = torch.promote_types(like.dtype, torch.float32)
        (found,) = self._reduced((torch.tensor([*flags, False], device=like.device, dtype=dtype),))
        self._raise_held()
        return [share > 0 for share in found.tolist()[:-1]]

    def alike(self, what: Callable[[], T], like: Tensor) -> T:
        """``what()``, or all raise: what it raised here, or ``WorkerError``; waits for all."""
        found = self.attempt(lambda: [what()], list[T])
        self.agreed((), like)
        return found[0]

    def check_alike(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raise ``ValueError`` on all workers where parameters are not the same on each.

        By their lengths; what is sharded is another on each.
        """
        if not isinstance(self.mean, Mean):  # a function may stand for workers that are not there
            return
        pairs = [(t.detach(), n) for t, n in zip(tensors, names, strict=False) if not is_sharded(t)]
        sizes = norms([t for t, _ in pairs])
        means = self._reduced(sizes)
        gaps = [
            abs(float(a) - float(b)) / (float(b) or 1.0) for a, b in zip(sizes, means, strict=True)
        ]
        found = self.agreed([gap > _ROUNDING for gap in gaps], tensors[0])
        if differ := [name for (_, name), differs in zip(pairs, found, strict=True) if differs]:
            raise ValueError(
                f"the parameters {differ} are not the same on all processes, which share one "
                "problem; seed them alike, or broadcast those of rank 0 (as "
                "DistributedDataParallel does) before the first step"
            )

    def engine(self, curvature: Curvature) -> Curvature:
        """The same engine, whose failures are held."""
        return cast(Curvature, _Held(curvature, self)) if self.is_shared else curvature

    @contextlib.contextmanager
    def agreeing(self, curvature: Curvature) -> Generator[None]:
        """Around what all workers do alike: at its end none has failed, or all raise."""
        if not self.is_shared:
            self._is_warned = self._is_warned or warn_of_strangers()
            yield
            return
        self._failure, self._early, self._ballot = self._early, None, None
        self._engine = curvature
        raised: Exception | None = None
        try:
            try:
                yield
            except Exception as error:
                raised = error
            if self._share(0) == 0:
                self._hear_of_the_end(self._failure or raised)
            self._raise_held()
            if raised is not None:
                raise raised
        finally:
            raised = None  # which would hold this frame
            self._failure, self._ballot, self._engine = None, None, None

    def agree_on(self, engine: Curvature, like: Tensor) -> None:
        """Let an engine that chooses choose differences where it did so on another worker."""
        if self.is_shared:
            before, self._engine = self._engine, engine
            self.agreed((), like)
            self._engine = before
            self.follow(engine)

    def follow(self, engine: Curvature) -> None:
        """Go over to differences if an engine that chooses did so on another worker."""
        if self._share(1) > 0 and engine.falls_back and not _differs(engine):
            engine.refute(DoubleBackwardError("another worker had to"))

    def _hear_of_the_end(self, raised: Exception | None) -> None:
        """After the last average: has anything been raised since, and only elsewhere?"""
        if self._ballot is None:  # all that was raised was raised before the first one
            return
        failed = torch.full_like(self._ballot[:1], float(raised is not None))
        if self.mean((failed,))[0].item() > 0 and raised is None:
            raise WorkerError(
                "another worker failed in the step of one of its rules, or in a hook of it, and "
                "says why in its own output; the parameters may not be the same on all workers "
                "now: load a checkpoint on each, or broadcast those of rank 0"
            )

    def _raise_held(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._share(0) > 0:
            raise WorkerError(
                "another worker failed in this step and says why in its own output; nothing was "
                "changed on any of them"
            )

    def _share(self, entry: int) -> float:
        return 0.0 if self._ballot is None else self._ballot[entry].item()


ALONE = Workers(one_worker)


def _differs(engine: Curvature) -> bool:
    return engine.takes_differences


class _Held:
    """An engine that returns NaN where it would raise, and from then on."""

    def __init__(self, engine: Curvature, workers: Workers) -> None:
        self._engine, self._workers = engine, workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def attempt(self, act: Callable[[], None], between: Tensor | None = None) -> None:
        """As of any engine."""
        self._workers.attempt(act, lambda: None)
        if between is not None:
            self._workers.meet(between)

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        """As of any engine."""
        return self._workers.attempt(
            lambda: self._engine.gradient(loss, at), lambda: (_nan_loss(at), _nans(at))
        )

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        """As of any engine."""
        return self._made(lambda: self._engine.linearise(loss, at, reusable=reusable), at)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        """As of an engine that serves maps."""
        engine: Any = self._engine
        return self._made(lambda: engine.linearise_map(phi, at, reusable=reusable), at, is_map=True)

    def _made(self, make: Callable[[], Linearised], at: Pair, is_map: bool = False) -> Linearised:
        attempt = self._workers.attempt

        def nothing() -> Linearised:
            back = (lambda _: _nan_lower(at)) if is_map else None
            return Linearised(_nan_loss(at), _nan_lower(at), lambda _: _nans(at), back)

        made = attempt(make, nothing)

        def product(direction: Tensors) -> OptionalPair:
            return attempt(lambda: made.product(direction), lambda: _nans(at))

        if (back := made.transposed) is None:
            return made._replace(product=product)

        def transposed(direction: Tensors) -> Tensors:
            return attempt(lambda: back(direction), lambda: _nan_lower(at))

        return made._replace(product=product, transposed=transposed)


def _nans(at: Pair) -> OptionalPair:
    upper = tuple(torch.full_like(u, torch.nan, requires_grad=False) for u in at.upper)
    return OptionalPair(upper, _nan_lower(at))


def _nan_lower(at: Pair) -> Tensors:
    return tuple(torch.full_like(v, torch.nan, requires_grad=False) for v in at.lower)


def _nan_loss(at: Pair) -> Tensor:
    like = at.lower[0]
    return torch.full((), torch.nan, device=like.device, dtype=like.dtype)
