"""Second-order products of pure functions: the vector-Jacobian product of torch.func."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors
from .double_backward import explained, half_square, refuse_silently_wrong
from .micro_batches import MeanLoss, TwoPasses, mean_gradient
from .protocol import Curvature, Linearised, Loss, Map


class VectorJacobian(Curvature):
    """``torch.func.vjp`` of (u, v) -> grad_v g(u, v): its pullback of q is (J q, H q).

    For losses that are functions of their arguments; composes with ``torch.func.vmap`` and
    ``torch.compile``. The pullback may be called any number of times.

    Raises:
        DoubleBackwardError: an operation cannot be differentiated twice. Inside ``torch.compile``
            graphs are not looked through and torch's own error comes instead.
    """

    name = "functional"
    reads_live = False

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._passes = TwoPasses()

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        if isinstance(loss, MeanLoss):
            return mean_gradient(lambda part: self.gradient(part, at), loss)
        (upper, lower), value = torch.func.grad_and_value(loss, argnums=(0, 1))(*at)
        return value, OptionalPair(upper, lower)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        del reusable  # the pullback keeps its graph
        if isinstance(loss, MeanLoss):
            return self._linearise_mean(loss, at)
        inspected = _Inspected(loss)

        def residual_of(upper: Tensors, lower: Tensors) -> tuple[Tensors, Tensor]:
            return torch.func.grad_and_value(inspected, argnums=1)(upper, lower)

        pulled: Any
        with _explained(inspected):
            pulled = torch.func.vjp(residual_of, *at, has_aux=True)
        residual, pullback, value = pulled

        def product(direction: Tensors) -> OptionalPair:
            with _explained(inspected):
                return OptionalPair(*pullback(direction))

        return Linearised(value, residual, product)

    def _linearise_mean(self, loss: MeanLoss, at: Pair) -> Linearised:
        def first(part: Loss) -> tuple[Tensor, OptionalTensors]:
            residual, value = torch.func.grad_and_value(part, argnums=1)(*at)
            return value, residual

        return self._passes.linearised(first, lambda part: self.linearise(part, at), loss, at)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        del reusable
        if isinstance(phi, MeanLoss):
            return self._linearise_mean_map(phi, at)

        def residual_of(upper: Tensors, lower: Tensors) -> Tensors:
            image = phi(upper, lower)
            return tuple(v - p for v, p in zip(lower, image, strict=True))

        pulled: Any = torch.func.vjp(residual_of, *at)
        residual, pullback = pulled

        def product(direction: Tensors) -> OptionalPair:
            return OptionalPair(*pullback(direction))

        def transposed(direction: Tensors) -> Tensors:
            return torch.func.jvp(lambda v: residual_of(at.upper, v), (at.lower,), (direction,))[1]

        return Linearised(half_square(residual), residual, product, transposed)

    def _linearise_mean_map(self, phi: MeanLoss, at: Pair) -> Linearised:
        def first(part: Map) -> tuple[Tensor, Tensors]:
            residual = tuple(v - p for v, p in zip(at.lower, part(*at), strict=True))
            return half_square(residual), residual

        def again(part: Map) -> Linearised:
            return self.linearise_map(part, at)

        return self._passes.linearised(first, again, phi, at, half_square)


class _Inspected:
    """A loss whose graph is looked through, and which remembers what it raised itself."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.error: BaseException | None = None

    def __call__(self, upper: Tensors, lower: Tensors) -> Tensor:
        if torch.compiler.is_compiling():
            return self._loss(upper, lower)
        try:
            value = self._loss(upper, lower)
        except Exception as error:
            self.error = error
            raise
        refuse_silently_wrong(value)
        return value


def _explained(loss: _Inspected) -> contextlib.AbstractContextManager[None]:
    compiling = torch.compiler.is_compiling()
    return contextlib.nullcontext() if compiling else explained(lambda error: error is loss.error)
