"""What ``PenaltyBilevelOptimizer`` remembers between its steps, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .. import levels
from ..adapters.constraints import ConstrainedLevels
from ..constraints import LowerPoint
from ..evaluation import Norms
from ..metrics import Metrics
from ..multipliers import DualState
from ..penalties import Penalty
from ..tensors import Tensors, clones, placed, zeros_for
from .memory import TwoLevelMemory
from .two_level import Here

Reported: TypeAlias = tuple[Tensor, Tensor, Norms, tuple[float, float, float], int]
"""Of the last evaluation, for ``Metrics.of``."""


class _Remembered(NamedTuple):
    dual: DualState
    adjoint: Tensors
    seen: Reported | None
    counts: dict[str, Any]
    multipliers: tuple[Tensors, Tensors]


class RemembersDual(TwoLevelMemory):
    """The multiplier with all that is dual, for each lower parameter and lower inequality."""

    penalty: Penalty
    _sets: ConstrainedLevels
    _dual: DualState
    _counts: dict[str, Any]
    _seen: Reported | None

    def restart_lower(self) -> None:
        """Say that v, as it is now, starts on another lower problem: new tasks with new heads.

        The multiplier, those of lower inequalities and the tracker of the value gap belong to the
        problem before: they return to 0 and to v. The lower rule keeps its moments, and those of
        the tracker.
        """
        sets = self._sets.lower
        sets.multipliers = zeros_for(sets.multipliers)
        here = LowerPoint(tuple(levels.parameters(self.lower)), sets.multipliers)
        self._dual = self._dual.restarted(here.row)
        self._adjoint = self._dual.multiplier

    @property
    def metrics(self) -> Metrics:
        """What the last evaluation saw; made when asked for, as most steps are not."""
        return Metrics.unknown() if self._seen is None else Metrics.of(*self._seen)

    @property
    def adjoint(self) -> Tensors:
        """The estimate q = nu + gamma r, shaped like v; at a solution -H^{-1} grad_v f."""
        return LowerPoint.of(self._adjoint, len(self._sets.lower.multipliers)).parameters

    @property
    def inequality_multipliers(self) -> dict[str, Tensors]:
        """Mu >= 0 of each upper, z >= 0 of each lower ``Inequality``; empty before a step."""
        return {k: clones(held) for k, held in self._sets.saved().items()}

    def _moving(self, here: Here) -> list[bool]:
        """Which lower parameters and multipliers of inequalities move: of these, all."""
        return here.moves + [True] * len(self._sets.lower.multipliers)

    def _merged(self, adjoint: Tensors, here: Here) -> Tensors:
        """``adjoint`` of the moving lower parameters, with the multiplier for the others."""
        if all(here.moves):
            return adjoint
        fresh = iter(adjoint)
        pairs = zip(self._dual.multiplier, self._moving(here), strict=True)
        return tuple(next(fresh) if moves else held for held, moves in pairs)

    # What TwoLevelMemory asks of its subclasses.

    def _remembered(self) -> _Remembered:
        counts, multipliers = dict(self._counts), self._sets.multipliers
        return _Remembered(self._dual, self._adjoint, self._seen, counts, multipliers)

    def _put_back(self, remembered: _Remembered) -> None:
        self._dual, self._adjoint, self._seen, self._counts, multipliers = remembered
        self._sets.multipliers = multipliers

    def _lists(self) -> tuple[str, ...]:
        return ("adjoint", *self._dual.lists())

    def _group_added(self, level: str, parameters: Sequence[Tensor]) -> None:
        if level == "lower":
            end = len(self._adjoint) - len(self._sets.lower.multipliers)
            self._dual = self._dual.extended(parameters, end)
            self._adjoint = (*self._adjoint[:end], *zeros_for(parameters), *self._adjoint[end:])
        self._dependence.due = True

    def _completes_state(self) -> bool:
        done = super()._completes_state()
        if done:
            lower = levels.parameters(self.lower)
            self._dual = self._dual.remembering([self.lower.state.get(p, {}) for p in lower])
        return done

    def _own_state(self) -> dict[str, Any]:
        return {
            "format": 2,
            "penalty": self.penalty.name,
            "adjoint": list(self._adjoint),
            **self._dual.packed(),
            "inequalities": self._sets.saved(),
            **self._counts,
            "engine": self._engine_packed(),
        }

    def _check_own_state(self, own: dict[str, Any]) -> None:
        if own["penalty"] != self.penalty.name:
            raise ValueError(
                f"the checkpoint was made with penalty {own['penalty']!r}, this optimizer has "
                f"{self.penalty.name!r}"
            )
        self._sets.check(_inequalities(own), self._dual).check(own)

    def _load_own_state(self, own: dict[str, Any]) -> None:
        held = _inequalities(own)
        self._dual = self._sets.check(held, self._dual).unpacked(own)
        self._sets.load(held, levels.parameters(self.upper)[0].device)
        self._adjoint = placed(own["adjoint"], self._dual.multiplier)
        self._counts = {name: own.get(name, 0) for name in self._counts}
        self._unpack_engine(own.get("engine", {}))


def _inequalities(own: dict[str, Any]) -> dict[str, Any]:
    """Their multipliers by level; torch's tools leave out what is empty."""
    return {"upper": [], "lower": []} | own.get("inequalities", {})
