"""The dual half of the method: what a multiplier rule remembers, and what it must be able to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .evaluation import Evaluation, Norms
from .tensors import Tensors, zeros_for


class DualState(NamedTuple):
    """What a rule remembers; scalars are Python numbers."""

    multiplier: Tensors
    """nu, shaped like the lower parameters, in at least float32."""
    probe: Tensors
    """A power-iteration vector, shaped like the lower parameters; empty where none is kept."""
    scalars: dict[str, float]
    """Always ``weight`` (gamma, multiplies ||r||^2 / 2) and ``damping`` (lambda, multiplies g)."""
    steps: int
    """Lower steps so far."""

    def only(self, moving: Sequence[bool]) -> DualState:
        """Restricted to the lower parameters that move."""
        if all(moving):
            return self
        return self._replace(
            multiplier=tuple(itertools.compress(self.multiplier, moving)),
            probe=tuple(itertools.compress(self.probe, moving)),
        )

    def merged(self, part: DualState, moving: Sequence[bool]) -> DualState:
        """``part`` where parameters move, this state where they do not."""
        if all(moving):
            return part

        def fill(old: Tensors, new: Tensors) -> Tensors:
            fresh = iter(new)
            return tuple(next(fresh) if m else t for t, m in zip(old, moving, strict=False))

        return part._replace(
            multiplier=fill(self.multiplier, part.multiplier), probe=fill(self.probe, part.probe)
        )

    def extended(self, new: Sequence[Tensor], at: int | None = None) -> DualState:
        """With zeros for lower tensors added before position ``at``; default: at the end."""
        at = len(self.multiplier) if at is None else at

        def fill(old: Tensors) -> Tensors:
            return (*old[:at], *zeros_for(new), *old[at:])

        return self._replace(
            multiplier=fill(self.multiplier), probe=fill(self.probe) if self.probe else ()
        )

    # Checkpoints.

    def saved(self) -> dict[str, Any]:
        """Entries of a state dict; tensors are not copied."""
        return {
            "multiplier": list(self.multiplier),
            "probe": list(self.probe),
            "scalars": dict(self.scalars),
            "lower_steps": self.steps,
        }

    def check(self, entries: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``entries`` were saved for other parameters or another rule."""
        saved = [tuple(t.shape) for t in entries["multiplier"]]
        here = [tuple(t.shape) for t in self.multiplier]
        if saved != here:
            raise ValueError(f"the checkpoint's multiplier has shapes {saved}, expected {here}")
        if entries["scalars"].keys() != self.scalars.keys():
            raise ValueError(
                f"the checkpoint holds {sorted(entries['scalars'])}, this rule needs "
                f"{sorted(self.scalars)}; construct with the rule that made it"
            )

    def loaded(self, entries: dict[str, Any]) -> DualState:
        """The state behind ``entries``, placed like this one."""
        return DualState(
            placed(entries["multiplier"], self.multiplier),
            placed(entries["probe"], self.probe),
            dict(entries["scalars"]),
            entries["lower_steps"],
        )


def placed(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensors:
    """Copies of ``tensors`` with the devices and dtypes of ``like``."""
    pairs = zip(tensors, like, strict=True)
    return tuple(t.detach().clone().to(m.device, m.dtype) for t, m in pairs)


class MultiplierRule(Protocol):
    """The dual half of the method."""

    shares_evaluation: bool
    """May the last lower evaluation serve the upper update too?"""

    def start(self, lower: Tensors) -> DualState:
        """The state before the first step."""
        ...

    def adjoint(self, state: DualState, residual: Tensors) -> Tensors:
        """The adjoint estimate q = nu + gamma r."""
        ...

    def probes(self, state: DualState) -> bool:
        """Does the next evaluation need a product with ``probe``?"""
        ...

    def probe(self, state: DualState, residual: Tensors, slope: Tensors) -> Tensors:
        """A direction of unit length; ``slope`` is grad_v f."""
        ...

    def lower_update(
        self, state: DualState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, DualState]:
        """The gradient d for the lower rule, and the state after this lower step."""
        ...

    def upper_update(self, state: DualState, evaluation: Evaluation, norms: Norms) -> DualState:
        """The state after an upper step that used ``evaluation``."""
        ...
