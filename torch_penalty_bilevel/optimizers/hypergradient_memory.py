"""What ``HypergradientOptimizer`` remembers between its steps, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import levels
from ..hypergradients import Count
from ..metrics import Metrics
from ..tensors import Tensors, check_like, clones, placed, zeros_for
from . import summary
from .memory import TwoLevelMemory


class _Remembered(NamedTuple):
    adjoint: Tensors
    first_lower: Tensors
    metrics: Metrics
    counts: dict[str, int]


class RemembersAdjoint(TwoLevelMemory):
    """The last adjoint, and where v began if it begins anew in every step."""

    method: str
    lower_steps: Count
    metrics: Metrics
    _first_lower: Tensors

    @property
    def adjoint(self) -> Tensors:
        """The last q, shaped like v; zero before the first step."""
        return self._adjoint

    def restart_lower(self) -> None:
        """Say that v, as it is now, starts on another lower problem: new tasks with new heads.

        The adjoint returns to 0, and steps without a warm start begin from the present v. The
        lower rule keeps its moments.
        """
        self._adjoint, self._first_lower = zeros_for(self._adjoint), ()

    def _described(self) -> dict[str, str]:
        steps = self.lower_steps if isinstance(self.lower_steps, int) else "a schedule"
        return {
            "method": f"{self.method}, lower_steps={steps}",
            "curvature": summary.of_engine(self.curvature),
            "progress": summary.of_progress(self._counts, self.metrics),
        }

    # What TwoLevelMemory asks of its subclasses.

    def _remembered(self) -> _Remembered:
        return _Remembered(self._adjoint, self._first_lower, self.metrics, dict(self._counts))

    def _put_back(self, remembered: _Remembered) -> None:
        self._adjoint, self._first_lower, self.metrics, self._counts = remembered

    def _lists(self) -> tuple[str, ...]:
        return "adjoint", "first_lower"

    def _group_added(self, level: str, parameters: Sequence[Tensor]) -> None:
        if level == "lower":
            self._adjoint += zeros_for(parameters)
            self._first_lower += clones(parameters) if self._first_lower else ()
        self._dependence.due = True

    def _own_state(self) -> dict[str, Any]:
        return {
            "format": 2,
            "method": self.method,
            "adjoint": list(self._adjoint),
            "first_lower": list(self._first_lower),
            **self._counts,
            "engine": self._engine_packed(),
        }

    def _check_own_state(self, own: dict[str, Any]) -> None:
        if own.get("method") != self.method:
            raise ValueError(
                f"the checkpoint was made with method {own.get('method')!r}, this optimizer has "
                f"{self.method!r}"
            )
        check_like("adjoint", own["adjoint"], self._adjoint)

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._adjoint = placed(own["adjoint"], self._adjoint)
        like = levels.parameters(self.lower) if own["first_lower"] else []
        self._first_lower = placed(own["first_lower"], like)
        self._counts = {name: own[name] for name in self._counts}
        self._unpack_engine(own.get("engine", {}))
