"""Second-order products by reverse over reverse: exact, for every operation torch can do twice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from ..errors import BilevelError, DoubleBackwardError
from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors, norm
from . import autograd_graph as graph
from .micro_batches import MeanLoss, TwoPasses, mean_gradient
from .protocol import Curvature, Linearised, Loss, Map

_REMEDY = (
    'Use curvature="finite_difference" (no second derivative needed), or "auto" to switch by '
    "itself; for attention, torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the forward "
    "pass has a second derivative."
)
# How torch 2.x names the operation that has no double backward; other refusals name none.
_NAMES = (
    r"derivative for '?(?P<op>[\w:]+)'? is not implemented",
    r"[Dd]ouble backwards? (?:is|are) not supported for (?P<op>[\w ]+)",
    r"(?P<op>torch\.compile) with aot_autograd does not currently support double backward",
    r"This backward function was (?P<op>compiled) with non-empty donated buffers",
    r"differentiate twice a function that was marked with @(?P<op>once_differentiable)",
    r"trying to backward through (?P<op>\w+) .*does not support double backward",
)
# Failures of the machine, not of the graph.
_FAILURES: tuple[type[BaseException], ...] = tuple(
    getattr(torch, name)
    for name in ("OutOfMemoryError", "AcceleratorError")
    if hasattr(torch, name)
)


def explain_first(error: RuntimeError) -> None:
    """Raise from ``error`` of a gradient what it means, if it says that the graph is gone."""
    if "backward through the graph a second time" in str(error):
        raise DoubleBackwardError(
            "the graph of a loss was already freed: the closure called backward() itself, or "
            "uses tensors computed outside it. Compute everything that depends on the "
            "parameters inside the closure, and return the loss without calling backward()."
        ) from error


def explain(error: RuntimeError, is_own: bool = False) -> None:
    """Turn torch's many ways to refuse a second derivative into one error that names the remedy.

    What failed differentiates a gradient, so whatever it raises is a refusal, whoever words it:
    torch, a library, or a kernel without autograd. Excepted are failures of the machine: this
    returns, for the caller to ``raise``.

    Args:
        error: what it raised.
        is_own: did a loss, evaluated on the way, raise it by itself?
    """
    explain_first(error)
    if not (_is_failure(error) or is_own):
        raise _refusal(error) from error


@contextlib.contextmanager
def explained(is_own: Callable[[Exception], bool]) -> Generator[None]:
    """``explain`` for a block that also evaluates losses: did one raise this error by itself?"""
    try:
        yield
    except RuntimeError as error:
        explain(error, is_own(error))
        raise


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


def names_operation(error: Exception) -> bool:
    """Is it one of torch's own refusals, by its text?"""
    return any(re.search(pattern, str(error)) for pattern in _NAMES)


def _is_failure(error: Exception) -> bool:
    return isinstance(error, (BilevelError, *_FAILURES)) or "DefaultCPUAllocator" in str(error)


def _refusal(error: Exception) -> DoubleBackwardError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    for pattern in _NAMES:
        if match := re.search(pattern, str(error)):
            return DoubleBackwardError(
                f"no second derivative for {match['op']!r} in the lower loss", _REMEDY
            )
    return DoubleBackwardError(
        f"no second derivative of the lower loss; torch says: {lines[0]}", _REMEDY
    )


def hidden_dependence(custom: str | None) -> DoubleBackwardError:
    """For a graph of r that stops short of what a difference of gradients sees.

    Args:
        custom: name of a function of the graph whose backward pass nobody vouches for.
    """
    suspect = custom or "an operation whose backward pass is not differentiable"
    return DoubleBackwardError(
        "the gradient of the lower loss depends on more than its graph says, so that second "
        f"derivatives are silently wrong; {suspect} is the likely cause",
        _REMEDY,
    )


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


def refuse_reentrant_checkpoint(value: Tensor) -> None:
    """Raise if parts of the graph can only be reached by ``backward()``."""
    if graph.has_reentrant_checkpoint(value):
        raise DoubleBackwardError(
            "torch.utils.checkpoint with use_reentrant=True hides the parameters used inside it "
            "from autograd.grad, so their gradients would silently be missing; use "
            "checkpoint(..., use_reentrant=False)"
        )


def refuse_silently_wrong(value: Tensor) -> None:
    """Raise if an operation behind ``value`` has a wrong second derivative and no error."""
    if graph.is_compiled(value):
        raise DoubleBackwardError("torch.compile leaves no second derivative", _REMEDY)
    if culprit := graph.silently_wrong(value):
        raise DoubleBackwardError(
            f"autograd's second derivative of {culprit} is silently wrong", _REMEDY
        )


def first_order(loss: Loss, at: Pair, *, inspect: bool) -> tuple[Tensor, OptionalPair]:
    """Value and gradient of ``loss`` for both levels by one ordinary backward pass (per part)."""
    if isinstance(loss, MeanLoss):
        return mean_gradient(lambda part: first_order(part, at, inspect=inspect), loss)
    value = loss(at.upper, at.lower)
    if inspect:
        refuse_reentrant_checkpoint(value)
    gradients = _first(value, (*at.upper, *at.lower), allow_unused=True)
    n = len(at.upper)
    return value.detach(), OptionalPair(gradients[:n], gradients[n:])


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
