"""What a multiplier rule must be able to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch

from ..evaluation import Evaluation, Norms, Subspace
from ..tensors import Tensors, dense
from ..undo.rule_memory import Moments
from .state import DualState

Memories: TypeAlias = tuple[Moments, ...]
"""What a torch rule remembers of each tensor of a point."""
Move: TypeAlias = Callable[[Tensors, Tensors, Memories], tuple[Tensors, Memories]]
"""(point, gradients, memory) -> one step of the lower rule from there, and its memory after it."""

R = TypeVar("R", bound="MultiplierRule")


class Jump(NamedTuple):
    """A correction of v that needs no further evaluation."""

    move: Tensors
    """To be added to v."""
    residual: Tensors
    """grad_v g where v then is, as far as known; the lower rule goes on from there."""

    def shortened(self, share: float, residual: Tensors, norms: Norms) -> Jump:
        """By ``share``, from ``residual`` on; what no loss hears stays where it is."""
        if share == 1.0 and not any(norms.silent):
            return self
        ways = zip(self.move, norms.silent, strict=True)
        move = tuple(torch.zeros_like(t) if silent else share * t for t, silent in ways)
        pairs = zip(residual, self.residual, strict=True)
        return Jump(move, tuple(torch.lerp(dense(r), there, share) for r, there in pairs))


class MultiplierRule(Protocol):
    """How nu, gamma, lambda and whatever else is dual move; subclass it, or offer the same.

    A rule is a set of constants. What changes is a ``DualState``, or a rule's own extension of it,
    that goes in and comes out.
    """

    shares_evaluation: bool
    """May the last lower evaluation serve the upper update too?"""
    reads_residual: bool = True
    """Does ``adjoint`` depend on the residual? If not, workers average all in one message."""

    def start(self, lower: Tensors) -> Any:
        """The state before the first step."""
        ...

    def adjoint(self, state: Any, residual: Tensors) -> Tensors:
        """The adjoint estimate q = nu + gamma r."""
        ...

    def probes(self, state: Any) -> bool:
        """Does the next evaluation need a product with ``probe``? By default never."""
        return False

    def probe(self, state: Any, residual: Tensors, slope: Tensors) -> Tensors:
        """A direction of unit length; ``slope`` is grad_v f."""
        # In a protocol a body that always raises reads as abstract to type checkers.
        if self.probes(state):
            raise NotImplementedError(f"{type(self).__name__} does not say which probe it needs")
        return ()

    def spans(self, state: Any) -> bool:
        """May ``span`` find something (default)? If not, H q is let go before the probe."""
        return True

    def span(
        self,
        state: Any,
        adjoint: Tensors,
        product: Tensors,
        adjoint_residual: Tensors,
        residual: Tensors,
    ) -> Subspace | None:
        """Directions with known products, along which ``lower_update`` may correct q.

        Their inner products come to the host with the norms, as ``norms.inner_products``: one wait
        for both. By default there are none.

        Args:
            state: of this rule.
            adjoint: q.
            product: H q.
            adjoint_residual: grad_v f + H q.
            residual: r.
        """
        return None

    def jump(self, state: Any, evaluation: Evaluation, norms: Norms) -> Jump | None:
        """How v moves before ``lower_update`` and the lower rule; by default not at all.

        Not made while the rate of a lower group is 0, and shorter by what a schedule has left of
        the rates.
        """
        return None

    def follows_lower(self, state: Any) -> bool:
        """Is ``followed`` to be told how v moves? It costs a copy of v; by default not."""
        return False

    def followed(self, state: Any, move: Tensors) -> Any:
        """The state once v has moved by ``move``, jump, lower rule and constraint together."""
        return state

    def followed_further(self, state: Any, move: Tensors) -> Any:
        """The state once v has moved by ``move`` beyond what ``followed`` was told."""
        return state

    def plain_direction(self, state: Any, residual: Tensors) -> Tensors | None:
        """The gradient for the lower rule in a step that knows r alone, in which q waits.

        None (default) where q lives in r or in where v is, so that such a step would wash it out.
        """
        return None

    def lower_update(self, state: Any, evaluation: Evaluation, norms: Norms) -> tuple[Tensors, Any]:
        """The gradient d for the lower rule, and the state after this lower step."""
        ...

    def follow(self, state: Any, evaluation: Evaluation, move: Move) -> Any:
        """The state once points of its own have moved by the lower rule; by default it has none."""
        return state

    def upper_update(self, state: Any, evaluation: Evaluation, norms: Norms) -> Any:
        """The state after an upper step that used ``evaluation``; by default unchanged."""
        return state

    def left_for_upper(self, evaluation: Evaluation) -> Evaluation:
        """Without vectors that nothing reads any more once ``lower_update`` has been."""
        if type(self).upper_update is not MultiplierRule.upper_update:
            return evaluation
        residual = evaluation.residual if self.reads_residual else ()
        return evaluation._replace(residual=residual, adjoint_residual=(), probe_product=())

    # What others may ask.

    def curvature_bound(self, state: Any) -> float | None:
        """L >= ||H||_2 as far as seen, 0 before; None (default) where the rule keeps no bound."""
        return None

    def correction_gain(self, state: Any) -> float:
        """What share of a correction in ``span`` is made; NaN (default) where the rule has none."""
        return math.nan

    def shift(self, state: Any) -> float:
        """Mu where nu is to solve (H + mu I) nu = -grad_v f; by default 0, the exact adjoint."""
        return 0.0

    def for_maps(self: R) -> R:
        """The same rule where I - Phi_v stands for H; by default nothing depends on it.

        It need not be symmetric, and the rule's steps must suit every |eigenvalue of Phi_v| < 1.
        """
        return self


__all__ = ["DualState", "Jump", "Memories", "Move", "MultiplierRule"]
