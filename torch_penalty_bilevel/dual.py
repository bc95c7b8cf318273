"""The dual half of the method: what a multiplier rule remembers, and what it must be able to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from . import checkpoint
from .evaluation import Evaluation, Norms
from .moments import Moments, relocated
from .tensors import Tensors, clones, placed, zeros_for

_RETIRED = {"first_weight"}


class DualState(NamedTuple):
    """What a rule remembers; scalars are Python numbers."""

    multiplier: Tensors
    """nu, shaped like the lower parameters, in at least float32."""
    probe: Tensors
    """A power-iteration vector, shaped like the lower parameters; empty where none is kept."""
    scalars: dict[str, float]
    """Always ``weight`` (gamma, multiplies the penalty) and ``damping`` (lambda, multiplies g)."""
    steps: int
    """Lower steps so far."""
    tracker: Tensors = ()
    """z, a second lower point that follows argmin g(u, .); empty where none is kept."""
    moments: tuple[Moments, ...] = ()
    """What the lower rule remembers about each tensor of z."""

    def only(self, moving: Sequence[bool]) -> DualState:
        """Restricted to the lower parameters that move."""
        if all(moving):
            return self
        return self._replace(
            multiplier=tuple(itertools.compress(self.multiplier, moving)),
            probe=tuple(itertools.compress(self.probe, moving)),
            tracker=tuple(itertools.compress(self.tracker, moving)),
            moments=tuple(itertools.compress(self.moments, moving)),
        )

    def merged(self, part: DualState, moving: Sequence[bool], lower: Sequence[Tensor]) -> DualState:
        """``part`` where the parameters ``lower`` move, this state where they do not.

        There z is v itself, not a copy of what it was: whenever v thaws, z starts from it.
        """
        if all(moving):
            return part

        def fill(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
            fresh = iter(new)
            return tuple(next(fresh) if m else t for t, m in zip(old, moving, strict=False))

        return part._replace(
            multiplier=fill(self.multiplier, part.multiplier),
            probe=fill(self.probe, part.probe),
            tracker=fill(tuple(v.detach() for v in lower) if self.tracker else (), part.tracker),
            moments=fill(self.moments, part.moments),
        )

    def extended(self, new: Sequence[Tensor], at: int | None = None) -> DualState:
        """With zeros, and copies in z, for lower tensors inserted at ``at``; None: at the end."""
        at = len(self.multiplier) if at is None else at

        def fill(old: tuple[Any, ...], added: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*old[:at], *added, *old[at:])

        return self._replace(
            multiplier=fill(self.multiplier, zeros_for(new)),
            probe=fill(self.probe, zeros_for(new)) if self.probe else (),
            tracker=fill(self.tracker, clones(new)) if self.tracker else (),
            moments=fill(self.moments, ({},) * len(new)) if self.tracker else (),
        )

    def restarted(self, lower: Sequence[Tensor]) -> DualState:
        """Nu = 0 and z = v, where ``lower`` starts; scales, curvature and moments are kept."""
        return self._replace(
            multiplier=zeros_for(self.multiplier),
            tracker=clones(lower) if self.tracker else (),
        )

    def packed(self) -> dict[str, Any]:
        """For a state dict; tensors are not copied."""
        return {
            "multiplier": list(self.multiplier),
            "probe": list(self.probe),
            "scalars": dict(self.scalars),
            "lower_steps": self.steps,
            "tracker": list(self.tracker),
            "moments": [dict(memory) for memory in self.moments],
        }

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ValueError if ``saved`` cannot replace this state."""
        checkpoint.check_like("multiplier", saved["multiplier"], self.multiplier)
        # Of an earlier version: what it lacks starts anew, what is no longer kept is dropped.
        if saved["scalars"].keys() - self.scalars.keys() - _RETIRED:
            raise ValueError(
                f"the checkpoint holds {sorted(saved['scalars'])}, this rule needs "
                f"{sorted(self.scalars)}; construct with the rule that made it"
            )

    def unpacked(self, saved: dict[str, Any]) -> DualState:
        """``saved`` by ``packed``, copied to where this state's tensors are."""
        pairs = zip(saved["moments"], self.tracker, strict=True)
        return DualState(
            placed(saved["multiplier"], self.multiplier),
            placed(saved["probe"], self.probe),
            {name: saved["scalars"].get(name, value) for name, value in self.scalars.items()},
            saved["lower_steps"],
            placed(saved["tracker"], self.tracker),
            tuple(relocated(memory, like) for memory, like in pairs),
        )


class MultiplierRule(Protocol):
    """The dual half of the method; subclass it, or offer the same."""

    shares_evaluation: bool
    """May the last lower evaluation serve the upper update too?"""

    def start(self, lower: Tensors) -> DualState:
        """The state before the first step."""
        ...

    def adjoint(self, state: DualState, residual: Tensors) -> Tensors:
        """The adjoint estimate q = nu + gamma r."""
        ...

    def probes(self, state: DualState) -> bool:
        """Does the next evaluation need a product with ``probe``? By default never."""
        return False

    def probe(self, state: DualState, residual: Tensors, slope: Tensors) -> Tensors:
        """A direction of unit length; ``slope`` is grad_v f."""
        raise NotImplementedError(f"{type(self).__name__} asks for no probe")

    def lower_update(
        self, state: DualState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, DualState]:
        """The gradient d for the lower rule, and the state after this lower step."""
        ...

    def upper_update(self, state: DualState, evaluation: Evaluation, norms: Norms) -> DualState:
        """The state after an upper step that used ``evaluation``; by default unchanged."""
        return state
