"""Second-order products of pure functions: the vector-Jacobian product of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import OptionalPair, Pair, Tensors
from .protocol import Linearised, Loss


class VectorJacobian:
    """``torch.func.vjp`` of (u, v) -> grad_v g(u, v): its pullback of q is (J q, H q).

    For losses that are functions of their arguments; composes with ``torch.func.vmap`` and
    ``torch.compile``. The pullback may be called any number of times.
    """

    name = "functional"
    cost = 3

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        (upper, lower), value = torch.func.grad_and_value(loss, argnums=(0, 1))(*at)
        return value, OptionalPair(upper, lower)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        del reusable  # the pullback keeps its graph

        def residual_of(upper: Tensors, lower: Tensors) -> tuple[Tensors, Tensor]:
            return torch.func.grad_and_value(loss, argnums=1)(upper, lower)

        residual, pullback, value = torch.func.vjp(residual_of, *at, has_aux=True)
        return Linearised(value, residual, lambda q: OptionalPair(*pullback(q)))
