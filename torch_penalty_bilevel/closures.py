"""From what users write to losses of (upper, lower): live closures or pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buffers import BufferGuard
from .constraints import Inequality
from .curvature import Loss
from .levels import Level, are_named, names, parameters
from .penalties import Losses
from .tensors import Tensors

Inequalities: TypeAlias = tuple[Sequence[Inequality], Sequence[Inequality]]
"""Of the upper and of the lower level."""


def check_callables(upper_closure: Any, lower_closure: Any) -> None:
    """Raise if ``step`` was called the way a one-level optimizer's is."""
    for level, closure in (("upper", upper_closure), ("lower", lower_closure)):
        if not callable(closure):
            raise TypeError(
                f"step needs two closures, step(upper_closure, lower_closure); {level}_closure is "
                f"{type(closure).__name__}. Trainers that call step() or step(closure) by "
                "themselves cannot drive a bilevel optimizer: use their manual mode"
            )


def live(
    upper_closure: Callable[[], Tensor],
    lower_closure: Callable[[], Tensor],
    guard: BufferGuard,
    inequalities: Inequalities = ((), ()),
) -> Losses:
    """Closures that read live tensors: each call is one evaluation under the buffer guard."""

    def adapted(closure: Callable[..., Tensor], level: Level, check_values: bool = False) -> Loss:
        def loss(upper: Tensors, lower: Tensors) -> Tensor:
            del upper, lower  # the closure reads the very tensors
            # Inside an autocast block of the caller, copies of parameters that have moved.
            torch.clear_autocast_cache()
            with guard.evaluation(level), torch.enable_grad():
                if check_values:
                    return _checked_values(closure(), level)
                return _checked(closure(), level, differentiable=True)

        return loss

    return Losses(
        adapted(upper_closure, "upper"),
        adapted(lower_closure, "lower"),
        upper_values=tuple(adapted(i.closure, "upper", True) for i in inequalities[0]),
        lower_values=tuple(adapted(i.closure, "lower", True) for i in inequalities[1]),
    )


def pure(
    upper_function: Callable[..., Tensor],
    lower_function: Callable[..., Tensor],
    upper_rule: Optimizer,
    lower_rule: Optimizer,
    inequalities: Inequalities = ((), ()),
) -> Losses:
    """Functions of (upper, lower), each a tuple of tensors or a dict by name."""
    structured_upper = _structure(upper_rule, "upper")
    structured_lower = _structure(lower_rule, "lower")

    def adapted(function: Callable[..., Tensor], level: Level, check_values: bool = False) -> Loss:
        def loss(upper: Tensors, lower: Tensors) -> Tensor:
            value = function(structured_upper(upper), structured_lower(lower))
            if check_values:
                return _checked_values(value, level)
            return _checked(value, level, differentiable=False)

        return loss

    return Losses(
        adapted(upper_function, "upper"),
        adapted(lower_function, "lower"),
        upper_values=tuple(adapted(i.closure, "upper", True) for i in inequalities[0]),
        lower_values=tuple(adapted(i.closure, "lower", True) for i in inequalities[1]),
    )


def _checked_values(value: Any, level: Level) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"the closure of {level}_constraint's Inequality returned {kind}; return a real "
            "floating-point tensor h, of which h <= 0 is wanted"
        )
    return value


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
