"""Double backward where it is right, finite differences where it is not or costs twice as much."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import Tensor

from .. import graph
from ..errors import BilevelWarning, DoubleBackwardError, NondeterministicClosureError
from ..randomness import RandomState
from ..tensors import OptionalPair, Pair, Tensors, norm
from . import evidence
from .double_backward import DoubleBackward
from .finite_difference import FiniteDifference
from .protocol import Curvature, Linearised, Loss, Map

_log = logging.getLogger(__name__)


class Automatic:
    """Start with double backward; go over to finite differences on evidence.

    It must, with one warning, when torch says that an operation has no second derivative, when the
    graph holds one whose second derivative is known to be silently wrong, or a custom
    ``autograd.Function``, for which nothing vouches.

    It may, with ``weighs_costs``: every 500 evaluations, from the 10th on, one product is taken
    both ways (for about seven more gradients). Differences are used until the next look where
    double backward moves more than twice the bytes (CNNs and MLPs with normalisation, LSTMs,
    attention) and both products agree to one per cent at the best of three relative steps. Once
    they do not, double backward stays, without further looks: on ReLU networks, near zero loss,
    and where it is as cheap. Only in float32, without autocast, on one worker.

    ``current`` is the engine in use and ``reason`` says why; changes are logged (INFO).

    Args:
        weighs_costs: use differences also where torch could do without. For a step of the
            penalty method; a linear system solved to a tolerance wants exact products.
    """

    name = "auto"
    _PERIOD, _FIRST = 500, 10

    def __init__(self, weighs_costs: bool = False) -> None:
        self._exact = DoubleBackward()
        self.current: Curvature = self._exact
        self.reason = "no product has been taken yet"
        self._weighs_costs = weighs_costs
        self._works = False  # has double backward been through once?
        self._evaluations = 0
        self._next_look = self._FIRST

    @property
    def switched(self) -> bool:
        """Are finite differences in use?"""
        return isinstance(self.current, FiniteDifference)

    @property
    def product_cost(self) -> int:
        return self.current.product_cost

    def exact(self) -> Automatic:
        """A copy that uses finite differences only where it must."""
        copy = Automatic()
        if self.switched and not self._works:
            copy.switch()
        return copy

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        return self.current.gradient(loss, at)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        self._evaluations += 1
        if self._weighs_costs and self._works and self._is_time(at):
            self._next_look = self._evaluations + self._PERIOD
            return self._compared(loss, at, reusable)
        if self._works or self.switched:
            return self.current.linearise(loss, at, reusable=reusable)
        return self._tried(loss, at, reusable)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        # First derivatives only: nothing to switch away from.
        return self._exact.linearise_map(phi, at, reusable=reusable)

    def switch(self, reason: str | None = None) -> None:
        """Use finite differences from now on."""
        self.current = FiniteDifference()
        self._works = self._weighs_costs = False
        self.reason = reason or "switched by hand or by a checkpoint"
        if reason is not None:
            warnings.warn(f"switched to finite differences: {reason}", BilevelWarning, stacklevel=6)

    def packed(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        current = self.current
        return {
            "switched": self.switched,
            "relative_step": getattr(current, "relative_step", None),
            "works": self._works,
            "weighs_costs": self._weighs_costs,
            "evaluations": self._evaluations,
            "next_look": self._next_look,
        }

    def unpack(self, saved: dict[str, Any]) -> None:
        """Go on where ``packed`` was called."""
        self.current = self._exact
        if saved["switched"]:
            self.switch()
            self.current = FiniteDifference(saved["relative_step"])
        self._works, self._weighs_costs = saved["works"], saved["weighs_costs"]
        self._evaluations, self._next_look = saved["evaluations"], saved["next_look"]

    # Must it?

    def _tried(self, loss: Loss, at: Pair, reusable: bool) -> Linearised:
        """By double backward, or after its first refusal by differences."""
        random = RandomState(t.device for t in (*at.upper, *at.lower))

        def again(reason: DoubleBackwardError) -> Linearised:
            self.switch(reason.reason)
            with random.replayed():
                return self.current.linearise(loss, at, reusable=reusable)

        try:
            tried = self._exact.linearise(_without_custom_functions(loss), at, reusable=reusable)
        except DoubleBackwardError as error:
            return again(error)

        current = tried

        def product(direction: Tensors) -> OptionalPair:
            nonlocal current
            try:
                result = current.product(direction)
            except DoubleBackwardError as error:
                # For later products too: a difference has since moved v under the first graph.
                current = again(error)
                return current.product(direction)
            if current is tried and not self._works:
                self._works, self.reason = True, "torch has all second derivatives"
            return result

        return Linearised(tried.loss, tried.residual, product)

    # May it?

    def _is_time(self, at: Pair) -> bool:
        # Both J q and H q are compared, so not where only v is about to move.
        due = self._evaluations >= self._next_look and len(at.upper) > 0
        return due and evidence.is_comparable(at)

    def _compared(self, loss: Loss, at: Pair, reusable: bool) -> Linearised:
        """By double backward; the first product that is not zero is also taken by a difference."""
        random = RandomState(t.device for t in (*at.upper, *at.lower))
        with evidence.Traffic() as traffic:
            exact = self._tried(loss, at, reusable)
        is_open = True

        def product(direction: Tensors) -> OptionalPair:
            nonlocal is_open
            with traffic:
                result = exact.product(direction)
            if is_open and self._works and float(norm(direction)) > 0:
                is_open = False
                self._decide(loss, at, direction, result, traffic.bytes, random)
            return result

        return exact._replace(product=product)

    def _decide(
        self,
        loss: Loss,
        at: Pair,
        direction: Tensors,
        exact: OptionalPair,
        moved: int,
        random: RandomState,
    ) -> None:
        before = self.current
        differences = before if isinstance(before, FiniteDifference) else FiniteDifference()
        self._weighs_costs = False
        try:
            found = evidence.weigh(differences, loss, at, direction, exact, moved, random)
            self._weighs_costs = found.favours_differences
            self.reason = str(found)
        except NondeterministicClosureError:
            self.reason = "the lower closure draws other data when called again"
        self.current = differences if self._weighs_costs else self._exact
        if type(self.current) is not type(before):
            _log.info(
                "%s from evaluation %d: %s", self.current.name, self._evaluations, self.reason
            )


def _without_custom_functions(loss: Loss) -> Loss:
    def checked(upper: Tensors, lower: Tensors) -> Tensor:
        value = loss(upper, lower)
        if culprit := graph.custom_function(value):
            raise DoubleBackwardError(
                f"nothing vouches for the second derivative of {culprit}; pass "
                'curvature="double_backward" if you know that it is right'
            )
        return value

    return checked
