"""Double backward where it is right, finite differences where it is not."""

from __future__ import annotations

import warnings

from torch import Tensor

from .. import graph
from ..errors import BilevelWarning, DoubleBackwardError
from ..randomness import RandomState
from ..tensors import OptionalPair, Pair, Tensors
from .double_backward import DoubleBackward
from .finite_difference import FiniteDifference
from .protocol import Curvature, Linearised, Loss, Map


class Automatic:
    """Start with double backward; switch to finite differences, with one warning, if it fails.

    It switches when torch says that an operation has no second derivative, when the graph holds
    one whose second derivative is known to be silently wrong, or a custom
    ``autograd.Function``, for which nothing vouches. ``current`` is the engine in use.
    """

    name = "auto"

    def __init__(self) -> None:
        self.current: Curvature = DoubleBackward()
        self._settled = False

    @property
    def switched(self) -> bool:
        """Are finite differences in use?"""
        return isinstance(self.current, FiniteDifference)

    @property
    def product_cost(self) -> int:
        return self.current.product_cost

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        return self.current.gradient(loss, at)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        if self._settled:
            return self.current.linearise(loss, at, reusable=reusable)
        random = RandomState(t.device for t in (*at.upper, *at.lower))

        def again(reason: Exception) -> Linearised:
            self.switch(str(reason))
            with random.replayed():
                return self.current.linearise(loss, at, reusable=reusable)

        try:
            tried = self.current.linearise(_without_custom_functions(loss), at, reusable=reusable)
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
            self._settled = True
            return result

        return Linearised(tried.loss, tried.residual, product)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        # First derivatives only: nothing to switch away from.
        return DoubleBackward().linearise_map(phi, at, reusable=reusable)

    def switch(self, reason: str | None = None) -> None:
        """Use finite differences from now on."""
        self.current = FiniteDifference()
        self._settled = True
        if reason is not None:
            warnings.warn(f"switched to finite differences: {reason}", BilevelWarning, stacklevel=6)


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
