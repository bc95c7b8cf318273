"""What cannot be differentiated twice, said in one error that names the remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from ..errors import BilevelError, DoubleBackwardError
from . import autograd_graph as graph

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
