"""What every curvature engine offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ..tensors import OptionalPair, Pair, Tensors

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


class Curvature(Protocol):
    """One way to get first derivatives of a loss and second-order products of the lower one."""

    name: str

    @property
    def product_cost(self) -> int:
        """Gradient evaluations per product; ``gradient`` and ``linearise`` cost one each."""
        ...

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        """The detached value of ``loss`` and its gradient for both levels."""
        ...

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        """``loss`` linearised at ``at``; ``reusable`` allows several products."""
        ...


@runtime_checkable
class MapCurvature(Curvature, Protocol):
    """An engine that can also serve a lower level given as a map."""

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        """The residual v - Phi(u, v) linearised at ``at``; first derivatives of Phi only."""
        ...
