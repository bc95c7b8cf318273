"""Second-order products by reverse over reverse: exact, for every operation torch can do twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DoubleBackwardError
from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors, is_sharded, norm
from .micro_batches import MeanLoss, TwoPasses, mean_gradient
from .protocol import Curvature, Linearised, Loss, Map
from .refusals import explain, explain_first, refuse_reentrant_checkpoint, refuse_silently_wrong


def _first(*of: Any, **options: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad`` of a loss."""
    try:
        return torch.autograd.grad(*of, **options)
    except RuntimeError as error:
        explain_first(error)
        raise


def _second(*of: Any, **options: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad`` of a gradient, or with a graph of its own."""
    try:
        return torch.autograd.grad(*of, **options)
    except RuntimeError as error:
        explain(error)
        raise


def residual_graph(value: Tensor, lower: Tensors) -> OptionalTensors:
    """grad_v of the 0-d ``value`` with its own graph.

    Raises:
        DoubleBackwardError: torch makes a gradient, but no graph of it.
    """
    try:
        return _second(value, lower, create_graph=True, allow_unused=True)
    except DoubleBackwardError:
        _first(value, lower, allow_unused=True)  # raises what has nothing to do with second ones
        raise


def first_order(loss: Loss, at: Pair, *, inspect: bool) -> tuple[Tensor, OptionalPair]:
    """Value and gradient of ``loss`` for both levels by one ordinary backward pass (per part)."""
    if isinstance(loss, MeanLoss):
        return mean_gradient(lambda part: first_order(part, at, inspect=inspect), loss)
    value = loss(at.upper, at.lower)
    if inspect:
        refuse_reentrant_checkpoint(value)
    leaves = *at.upper, *at.lower
    if any(map(is_sharded, leaves)):
        gradients = _by_backward(value, leaves)
    else:
        gradients = _first(value, leaves, allow_unused=True)
    n = len(at.upper)
    return value.detach(), OptionalPair(gradients[:n], gradients[n:])


def _by_backward(value: Tensor, leaves: Tensors) -> OptionalTensors:
    """Sharded parameters are not in the graph, which holds what they were gathered to.

    The hooks that gather and scatter work under ``backward()`` alone: into ``.grad``, averaged
    over the shards' processes.
    """
    held = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        value.backward()
        return tuple(leaf.grad for leaf in leaves)
    finally:
        for leaf, gradient in zip(leaves, held, strict=True):
            leaf.grad = gradient


class DoubleBackward(Curvature):
    """Differentiate the residual graph: one backward pass against q gives J q and H q together.

    r = grad_v g is computed with its graph; the product is
    ``autograd.grad(r, (u, v), grad_outputs=q)``. About three plain gradients of g with r included
    and twice the saved activations. Exact to rounding.

    The first linearisation looks through the graph for operations whose second derivative is
    silently wrong and refuses them.

    Raises:
        DoubleBackwardError: an operation cannot be differentiated twice.
    """

    name = "double_backward"

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        # Walking a large graph takes milliseconds, so each loss is looked through once.
        self._inspected_upper = self._inspected = False
        self._passes = TwoPasses()

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        result = first_order(loss, at, inspect=not self._inspected_upper)
        self._inspected_upper = True
        return result

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        if isinstance(loss, MeanLoss):
            return self._linearise_mean(loss, at)
        value = loss(at.upper, at.lower)
        self.inspect(value)
        return self._made(value, at, reusable)

    def _linearise_mean(self, loss: MeanLoss, at: Pair) -> Linearised:
        def first(part: Loss) -> tuple[Tensor, OptionalTensors]:
            value = part(at.upper, at.lower)
            self._refuse(value)
            return value.detach(), _first(value, at.lower, allow_unused=True)

        def again(part: Loss) -> Linearised:
            return self._made(part(at.upper, at.lower), at, False)

        made = self._passes.linearised(first, again, loss, at)
        self._inspected = True
        return made

    def _made(self, value: Tensor, at: Pair, reusable: bool) -> Linearised:
        slopes = residual_graph(value, at.lower)
        residual = tuple(
            torch.zeros_like(v, requires_grad=False) if r is None else r
            for r, v in zip(slopes, at.lower, strict=True)
        )
        return _with_pullback(value, residual, at, reusable)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        if isinstance(phi, MeanLoss):
            return self._linearise_mean_map(phi, at)
        image = phi(*at)
        for part in image:
            refuse_reentrant_checkpoint(part)
        with torch.enable_grad():
            residual = tuple(v - p for v, p in zip(at.lower, image, strict=True))
        linearised = _with_pullback(half_square(residual), residual, at, reusable)
        return linearised._replace(transposed=_pushforward(residual, at))

    def _linearise_mean_map(self, phi: MeanLoss, at: Pair) -> Linearised:
        def first(part: Map) -> tuple[Tensor, Tensors]:
            made = self.linearise_map(part, at)
            return made.loss, made.residual

        def again(part: Map) -> Linearised:
            return self.linearise_map(part, at)

        return self._passes.linearised(first, again, phi, at, half_square)

    def inspect(self, value: Tensor) -> None:
        """Refuse, once, a graph whose second derivative is known to be wrong."""
        self._refuse(value)
        self._inspected = True

    def _refuse(self, value: Tensor) -> None:
        if not self._inspected:
            refuse_reentrant_checkpoint(value)
            refuse_silently_wrong(value)


def half_square(residual: Tensors) -> Tensor:
    """||r||_2^2 / 2, 0-d, detached."""
    return norm([r.detach() for r in residual]).square() / 2


def _with_pullback(value: Tensor, residual: Tensors, at: Pair, reusable: bool) -> Linearised:
    """``residual`` with one backward pass through its graph as the product."""

    def product(direction: Tensors) -> OptionalPair:
        # Entries of r that are constant have no graph and no derivative.
        pairs = [(r, q) for r, q in zip(residual, direction, strict=True) if r.requires_grad]
        n = len(at.upper)
        if not pairs:
            return OptionalPair((None,) * n, (None,) * len(at.lower))
        parts = _second(
            [r for r, _ in pairs],
            (*at.upper, *at.lower),
            grad_outputs=[q for _, q in pairs],
            retain_graph=reusable,
            allow_unused=True,
        )
        return OptionalPair(parts[:n], parts[n:])

    return Linearised(value.detach(), tuple(r.detach() for r in residual), product)


def _pushforward(residual: Tensors, at: Pair) -> Callable[[Tensors], Tensors]:
    """The map w -> (dr/dv) w: q -> (dr/dv)'q is linear in q, so its own pullback is that."""

    def transposed(direction: Tensors) -> Tensors:
        with torch.enable_grad():
            cotangents = tuple(torch.zeros_like(r, requires_grad=True) for r in residual)
        pulled = _second(residual, at.lower, grad_outputs=cotangents, create_graph=True)
        return _second(
            pulled,
            cotangents,
            grad_outputs=direction,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return transposed
