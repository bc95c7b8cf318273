"""The two levels as ordinary torch optimizers: building, naming, giving gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import checked_number
from .aliasing import overlapping
from .joined import Together, parts

Level: TypeAlias = Literal["upper", "lower"]
Parameters: TypeAlias = (
    Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[dict[str, Any]]
    | Optimizer
    | Sequence[Optimizer]
)


def build(
    argument: Parameters,
    level: Level,
    lr: Any,
    default_lr: float,
    make: Callable[..., Optimizer] = torch.optim.Adam,
) -> Optimizer:
    """The level's rule: the optimizer given, or one that ``make`` makes over what was given.

    Raises:
        ValueError: nothing to optimise, or an ``lr`` that would have no effect.
        TypeError: not parameters.
    """
    given = argument if isinstance(argument, Optimizer) else _as_list(argument, level)
    ready = _ready(given, level)
    if ready is not None:
        if lr is not None:
            raise ValueError(
                f"{level}_lr={lr} has no effect: {level} is a ready {type(ready).__name__}; "
                "set its learning rate where you build it"
            )
        optimizer = ready
    else:
        optimizer = make(given, lr=_checked_lr(lr, level, default_lr))
    for group in optimizer.param_groups:
        mark(group, level)
    _check_rule(optimizer, level)
    return optimizer


def mark(group: dict[str, Any], level: Level) -> None:
    """Write the level into a parameter group."""
    if group.setdefault("level", level) != level:
        raise ValueError(
            f"a parameter group given as {level} says level={group['level']!r}; "
            "one group belongs to one level"
        )


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of a rule, in group order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def names(optimizer: Optimizer, level: Level) -> list[str]:
    """One name per parameter, as in ``named``."""
    return [name for name, _ in named(optimizer, level)]


def give(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """Hand each parameter that moves its gradient, and none to the others.

    A frozen parameter would otherwise go on moving with the last gradient it had.

    Args:
        optimizer: the rule.
        gradients: one for each parameter that moves; more are not looked at. None: the rule leaves
            the parameter and its moments alone.
    """
    fresh = iter(gradients)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = next(fresh) if parameter.requires_grad else None
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)


def release(optimizer: Optimizer) -> None:
    """Let the gradients of the last step go, which no evaluation needs, as ``zero_grad`` does."""
    for parameter in parameters(optimizer):
        parameter.grad = None


def are_named(optimizer: Optimizer) -> bool:
    """Were the parameters given as (name, tensor) pairs?"""
    return all("param_names" in group for group in optimizer.param_groups)


def check_disjoint(upper: Optimizer, lower: Optimizer) -> None:
    """Raise if one tensor, or its memory, sits in both levels, or memory twice in one."""
    below = {id(p) for p in parameters(lower)}
    for name, parameter in zip(names(upper, "upper"), parameters(upper), strict=True):
        if id(parameter) in below:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(parameter.shape)} is in both levels; "
                "give it to the level that should move it"
            )
    check_memory(named(upper, "upper") + named(lower, "lower"))


def named(optimizer: Optimizer, level: Level) -> list[tuple[str, Tensor]]:
    """All parameters of a rule with their names: the user's, or ``upper[0]`` by position."""
    found: list[tuple[str, Tensor]] = []
    for group in optimizer.param_groups:
        given = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            name = given[index] if given else f"{level}[{len(found)}]"
            found.append((name, parameter))
    return found


def check_memory(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ``ValueError`` if two of these are one or share memory, naming both."""
    pair = overlapping([parameter for _, parameter in named])
    if pair is not None:
        (one, first), (other, parameter) = (named[i] for i in pair)
        if first is parameter:
            raise ValueError(
                f"one parameter of shape {tuple(parameter.shape)} is listed twice, as {one!r} and "
                f"as {other!r}; list it once (dict.fromkeys(parameters) keeps the first of each)"
            )
        raise ValueError(
            f"parameters {one!r} and {other!r} (of shape {tuple(parameter.shape)}) share memory, "
            "so that moving one moves the other; detach(), .data and state_dict() do not copy: "
            "make one of them with p.detach().clone().requires_grad_()"
        )


def _ready(argument: Any, level: Level) -> Optimizer | None:
    """The rule that was given, of a list all of it as one; None where parameters were."""
    if isinstance(argument, Optimizer):
        return argument
    rules = [one for one in argument if isinstance(one, Optimizer)]
    if not rules:
        return None
    if len(rules) < len(argument):
        raise TypeError(f"{level} mixes optimizers and parameters; give the rest a rule of its own")
    return Together(rules)


def _as_list(argument: Any, level: Level) -> list[Any]:
    if isinstance(argument, Tensor):
        raise TypeError(f"{level} is a single tensor; write [{level}] to optimise one tensor")
    if isinstance(argument, dict):
        raise TypeError(f"{level} is a dict; pass a list of parameter-group dicts or .items()")
    try:
        listed = list(argument)
    except TypeError:
        raise TypeError(
            f"{level} must be tensors, (name, tensor) pairs, parameter-group dicts or a "
            f"torch.optim.Optimizer, got {type(argument).__name__}"
        ) from None
    if not listed:
        raise ValueError(
            f"{level} is empty (an exhausted generator? model.parameters() can be read only once)"
        )
    return listed


def _checked_lr(lr: Any, level: Level, default: float) -> float:
    if lr is None:
        return default
    remedy = "at 0 the level stands still"
    return checked_number(f"{level}_lr", lr, "be a finite number >= 0", remedy)


def _check_rule(optimizer: Optimizer, level: Level) -> None:
    if any(isinstance(rule, torch.optim.LBFGS) for rule in parts(optimizer)):
        raise ValueError(
            f"{level} cannot be LBFGS: its step evaluates a closure of its own and does not see "
            "the penalty; use a rule whose step() takes no closure, such as Adam or SGD"
        )
    tensors = parameters(optimizer)
    if not any(p.requires_grad for p in tensors):
        raise ValueError(
            f"no parameter of {level} requires grad; call requires_grad_() on those to optimise"
        )
    for name, parameter in zip(names(optimizer, level), tensors, strict=True):
        if not parameter.is_floating_point():
            raise TypeError(
                f"parameter {name!r} of {level} has dtype {parameter.dtype}; "
                "bilevel optimisation needs real floating-point parameters"
            )
