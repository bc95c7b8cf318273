"""From what users write to losses of (upper, lower): live closures or pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buffers import BufferGuard
from .curvature import Curvature, Loss, VectorJacobian
from .levels import Level, are_named, names, parameters
from .penalties import Losses
from .tensors import Tensors


def check_callables(upper_closure: Any, lower_closure: Any) -> None:
    """Raise if ``step`` was called the way a one-level optimizer's is."""
    for level, closure in (("upper", upper_closure), ("lower", lower_closure)):
        if not callable(closure):
            raise TypeError(
                f"step needs two closures, step(upper_closure, lower_closure); {level}_closure is "
                f"{type(closure).__name__}. Trainers that call step() or step(closure) by "
                "themselves cannot drive a bilevel optimizer: use their manual mode"
            )


def adapted(
    curvature: Curvature,
    upper_closure: Callable[..., Tensor],
    lower_closure: Callable[..., Tensor],
    upper_rule: Optimizer,
    lower_rule: Optimizer,
    guard: BufferGuard,
) -> Losses:
    """Pure functions where the engine needs them, else live closures."""
    check_callables(upper_closure, lower_closure)
    if isinstance(curvature, VectorJacobian):
        return pure(upper_closure, lower_closure, upper_rule, lower_rule, guard)
    return live(upper_closure, lower_closure, guard)


def live(
    upper_closure: Callable[[], Tensor], lower_closure: Callable[[], Tensor], guard: BufferGuard
) -> Losses:
    """Closures that read live tensors: each call is one evaluation under the buffer guard."""

    def adapted(closure: Callable[[], Tensor], level: Level) -> Loss:
        def loss(upper: Tensors, lower: Tensors) -> Tensor:
            del upper, lower  # the closure reads the very tensors
            # Inside an autocast block of the caller, copies of parameters that have moved.
            torch.clear_autocast_cache()
            with guard.evaluation(level), torch.enable_grad():
                return _checked(closure(), level, differentiable=True)

        return loss

    return Losses(adapted(upper_closure, "upper"), adapted(lower_closure, "lower"))


def pure(
    upper_function: Callable[..., Tensor],
    lower_function: Callable[..., Tensor],
    upper_rule: Optimizer,
    lower_rule: Optimizer,
    guard: BufferGuard,
) -> Losses:
    """Functions of (upper, lower), each a tuple of tensors or a dict by name."""
    structured_upper = _structure(upper_rule, "upper")
    structured_lower = _structure(lower_rule, "lower")

    def adapted(function: Callable[..., Tensor], level: Level) -> Loss:
        def loss(upper: Tensors, lower: Tensors) -> Tensor:
            with guard.evaluation(level):  # of modules behind torch.func.functional_call
                value = function(structured_upper(upper), structured_lower(lower))
            return _checked(value, level, differentiable=False)

        return loss

    return Losses(adapted(upper_function, "upper"), adapted(lower_function, "lower"))


def _structure(rule: Optimizer, level: Level) -> Callable[[Sequence[Tensor]], Any]:
    """Put the tensors that move back between those that do not, under their names if they have."""
    everything = parameters(rule)
    labels = names(rule, level) if are_named(rule) else None

    def build(moving: Sequence[Tensor]) -> tuple[Tensor, ...] | dict[str, Tensor]:
        rest = iter(moving)
        full = tuple(next(rest) if p.requires_grad else p.detach() for p in everything)
        return full if labels is None else dict(zip(labels, full, strict=True))

    return build


def _checked(value: Any, level: Level, *, differentiable: bool) -> Tensor:
    who = f"{level}_closure"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{who} returned {type(value).__name__}, not a tensor; return the loss itself "
            "(no .item(), and a return statement)"
        )
    if value.dim() != 0:
        raise ValueError(
            f"{who} returned a tensor of shape {tuple(value.shape)}; return a 0-d loss, "
            "e.g. its .mean()"
        )
    if not value.is_floating_point():
        raise TypeError(f"{who} returned dtype {value.dtype}; a loss is a real floating number")
    if differentiable and not value.requires_grad:
        raise ValueError(
            f"{who} returned a loss that does not depend on any parameter that requires grad "
            "(computed under no_grad or inference_mode, detached, or from copies?)"
        )
    return value
