"""What every curvature engine offers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ..errors import DoubleBackwardError
from ..tensors import OptionalPair, Pair, Tensors, coarsest_eps

Loss: TypeAlias = Callable[[Tensors, Tensors], Tensor]
"""(upper, lower) -> 0-d loss. Losses made from closures read the live tensors instead."""


Map: TypeAlias = Callable[[Tensors, Tensors], Tensors]
"""(upper, lower) -> Phi, shaped like ``lower``; live ones as with ``Loss``."""


class Linearised(NamedTuple):
    """The lower problem at one point (u, v): its residual r, with r's Jacobian as a linear map."""

    loss: Tensor
    """g(u, v), or ||r||^2 / 2 of a map, 0-d, detached."""
    residual: Tensors
    """r = grad_v g(u, v) or v - Phi(u, v), shaped like the lower parameters, detached."""
    product: Callable[[Tensors], OptionalPair]
    """q -> ((dr/du)'q, (dr/dv)'q) with q shaped like v; of a loss (J q, H q), with
    J = d2g/du dv (n_u x n_v) and H = d2g/dv2."""
    transposed: Callable[[Tensors], Tensors] | None = None
    """w -> (dr/dv) w of a map; None of a loss, where H is symmetric and ``product`` serves."""
    again: int = 0
    """Gradient evaluations that each product takes beyond ``product_cost``."""


class Curvature:
    """One way to get first derivatives of a loss and second-order products of the lower one.

    Subclass it: all but ``gradient`` and ``linearise`` has defaults, for an engine without memory
    that takes exact products of live tensors. (A class and not a ``Protocol``, of which
    ``torch.compile`` can make no instance.)
    """

    name: str
    reads_live: bool = True
    """Do losses read the live tensors, whatever point they are asked for? If not they are pure."""
    falls_back: bool = False
    """Does it go over to another way by itself where torch has no second derivative?"""
    reason: str = "as chosen"
    """Why ``in_use`` takes the products."""

    @property
    def takes_differences(self) -> bool:
        """Are products differences of gradients, with an error of their own?"""
        return False

    @property
    def product_cost(self) -> int:
        """Gradient evaluations per product; ``gradient`` and ``linearise`` cost one each."""
        return 1

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        """The detached value of ``loss`` and its gradient for both levels."""
        raise NotImplementedError

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        """``loss`` linearised at ``at``; ``reusable`` allows several products."""
        raise NotImplementedError

    def attempt(self, act: Callable[[], None], between: Tensor | None = None) -> None:
        """``act()``; of several workers one may raise there alone, which is held back.

        Args:
            act: what may fail.
            between: a lower parameter; if sharded, all hear of a failure before they gather again.
        """
        act()

    def point(self, at: Pair) -> Pair:
        """``at`` as ``loss`` wants it; what is returned moves with it."""
        if self.reads_live:
            return at
        # No outer graph around torch.func's.
        return Pair(tuple(u.detach() for u in at.upper), tuple(v.detach() for v in at.lower))

    def attainable(self, lower: Tensors) -> float:
        """The relative residual that a linear system with these products can come down to."""
        eps = coarsest_eps(lower)
        return 30 * eps**0.5 if self.takes_differences else max(1e-10, 100 * eps)

    @property
    def in_use(self) -> Curvature:
        """The engine that takes the products, of one that chooses."""
        return self

    def exact(self) -> Curvature:
        """A copy that takes differences only where it must, for systems that are solved."""
        return copy.deepcopy(self)

    def renew(self) -> None:
        """Hear that the losses are others: what was looked at once is to be looked at again."""

    def observe(self, adjoint_residual: float, slope: float) -> None:
        """Hear what came of the products of a step: ||grad_v f + H q|| and ||grad_v f||."""

    def refute(self, refusal: DoubleBackwardError) -> None:
        """Hear that second derivatives are silently wrong: raise, or take another way."""
        raise refusal

    def packed(self) -> dict[str, Any]:
        """What a checkpoint, and a step that fails, need of it, by value."""
        return {}

    def unpack(self, saved: dict[str, Any]) -> None:
        """Go on where ``packed`` was called."""


@runtime_checkable
class MapCurvature(Protocol):
    """An engine that can also serve a lower level given as a map."""

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        """The residual v - Phi(u, v) linearised at ``at``; first derivatives of Phi only."""
        ...
