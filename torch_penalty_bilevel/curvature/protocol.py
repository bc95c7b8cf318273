"""What every curvature engine offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from ..tensors import OptionalPair, Pair, Tensors

Loss: TypeAlias = Callable[[Tensors, Tensors], Tensor]
"""(upper, lower) -> 0-d loss. Losses made from closures read the live tensors instead."""


class Linearised(NamedTuple):
    """The lower loss g at one point (u, v), with its second derivatives as a linear map."""

    loss: Tensor
    """g(u, v), 0-d, detached."""
    residual: Tensors
    """r = grad_v g(u, v), shaped like the lower parameters, detached."""
    product: Callable[[Tensors], OptionalPair]
    """q -> (J q, H q), with J = d2g/du dv (n_u x n_v) and H = d2g/dv2; q shaped like v."""


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
