"""From what users write to losses of (upper, lower): live closures or pure functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..constraints import Inequality
from ..curvature import Curvature, Loss
from ..curvature.micro_batches import MeanLoss
from ..levels import Level, are_named, names, parameters, rules
from ..penalties import Losses
from ..tensors import Tensors
from ..undo.buffers import WHOLE, BufferGuard, Turn
from .made_outside import MadeOutside

Closure: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]
"""Of one loss, or of each micro-batch, of which the loss is the mean."""
Closures: TypeAlias = Closure | tuple[Closure, Closure] | None
Inequalities: TypeAlias = tuple[Sequence[Inequality], Sequence[Inequality]]
"""Of the upper and of the lower level."""


_Structure: TypeAlias = Callable[[Sequence[Tensor]], Any]


class _Check(Protocol):
    def __call__(self, value: Any, level: Level, *, differentiable: bool) -> Any: ...


def both_of(upper: Any, lower: Any, closure: Any) -> tuple[Any, Any]:
    """The two closures of ``step``, from the ways in which trainers pass them on.

    (f, g), (closure=f, lower_closure=g), ((f, g)) and (closure=(f, g)). Each may be a sequence of
    micro-batches; without a lower closure a sequence of two is always the pair, whatever its
    entries are.

    Raises:
        TypeError: the upper one twice. (Whether they are callables ``losses_of`` asks.)
    """
    if upper is not None and closure is not None:
        raise TypeError("step got upper_closure and closure; they are one, give one of them")
    upper = closure if upper is None else upper
    if lower is None and isinstance(upper, (tuple, list)):
        given: list[Any] = [*upper]
        if len(given) == 2:
            upper, lower = given
    return upper, lower


def _parts(upper_closure: Any, lower_closure: Any) -> tuple[list[Any], list[Any]]:
    """The closures of each level; raises if ``step`` was called as a one-level optimizer's is."""
    both: list[list[Any]] = []
    for level, closure in (("upper", upper_closure), ("lower", lower_closure)):
        both.append(list(closure) if isinstance(closure, (list, tuple)) else [closure])
        if not both[-1]:
            raise ValueError(f"{level}_closure is empty; give one closure per micro-batch")
        for i, part in enumerate(both[-1]):
            if part is not closure and not callable(part):
                raise TypeError(
                    f"{level}_closure is a sequence whose entry {i} is {type(part).__name__}; give "
                    "one closure per micro-batch, step([f1, f2], [g1, g2])"
                )
        if not callable(both[-1][0]):
            raise TypeError(
                f"step needs two closures, step(upper_closure, lower_closure); {level}_closure is "
                f"{type(closure).__name__}. Trainers that call step() or step(closure) by "
                "themselves cannot drive a bilevel optimizer: call it yourself, through Lightning "
                "(manual optimization) with step(closure=f, lower_closure=g), through Accelerate "
                "with step((f, g))"
            )
    return both[0], both[1]


def losses_of(
    curvature: Curvature,
    upper_closure: Closure,
    lower_closure: Closure,
    upper_rule: Optimizer,
    lower_rule: Optimizer,
    guard: BufferGuard,
    made_outside: MadeOutside,
    lower_is_map: bool,
    inequalities: Inequalities = ((), ()),
) -> Losses:
    """Pure functions where the engine needs them, else live closures; the mean of several."""
    uppers, lowers = _parts(upper_closure, lower_closure)
    made_outside.begin(upper_rule, lower_rule, are_new=guard.expect(*uppers, *lowers))
    rules.check(upper_rule, "upper")  # again: schedulers and hands change options in mid run
    rules.check(lower_rule, "lower", lower_is_map)
    adapted = functools.partial(_live, guard, made_outside)
    if not curvature.reads_live:
        structures = _structure(upper_rule, "upper"), _structure(lower_rule, "lower")
        adapted = functools.partial(_pure, guard, *structures)
    check_lower = _image_check(lower_rule) if lower_is_map else _checked
    lower = _mean_of(adapted, lowers, "lower", check_lower)
    above, below = inequalities
    return Losses(
        _mean_of(adapted, uppers, "upper", _checked),
        lower if lower_is_map else rules.with_decay(lower, lower_rule),
        upper_values=tuple(_value(adapted, i, "upper") for i in above),
        lower_values=tuple(_value(adapted, i, "lower") for i in below),
    )


def _mean_of(adapted: Callable[..., Any], closures: list[Any], level: Level, check: _Check) -> Loss:
    if len(closures) == 1:
        return functools.partial(adapted, closures[0], level, check)
    turns = [Turn(i, len(closures)) for i in range(len(closures))]
    pairs = zip(closures, turns, strict=True)
    return MeanLoss([functools.partial(adapted, c, level, check, turn=t) for c, t in pairs])


def _value(adapted: Callable[..., Any], inequality: Inequality, level: Level) -> Loss:
    return functools.partial(adapted, inequality.closure, level, _checked_values)


def _live(
    guard: BufferGuard,
    made_outside: MadeOutside,
    closure: Callable[[], Any],
    level: Level,
    check: _Check,
    upper: Tensors,
    lower: Tensors,
    turn: Turn = WHOLE,
) -> Any:
    """One evaluation of a closure, under the buffer guard."""
    del upper, lower  # the closure reads the very tensors
    # Inside an autocast block of the caller, copies of parameters that have moved.
    torch.clear_autocast_cache()
    with guard.evaluation(level, closure, turn), torch.enable_grad():
        value = check(_called(closure, level), level, differentiable=True)
    made_outside.look(value, level)
    return value


def _pure(
    guard: BufferGuard,
    upper_structure: _Structure,
    lower_structure: _Structure,
    function: Callable[..., Any],
    level: Level,
    check: _Check,
    upper: Tensors,
    lower: Tensors,
    turn: Turn = WHOLE,
) -> Any:
    """One evaluation of a function of (upper, lower), each a tuple of tensors or a dict by name."""
    with guard.evaluation(level, function, turn):  # of modules behind torch.func.functional_call
        value = _called(function, level, upper_structure(upper), lower_structure(lower))
    return check(value, level, differentiable=False)


def _called(function: Callable[..., Any], level: Level, *arguments: Any) -> Any:
    """Call; raise TypeError with the remedy where ``function`` cannot take ``arguments``."""
    try:
        return function(*arguments)
    except TypeError as error:
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:  # not raised inside of it
            raise TypeError(
                f"a closure of the {level} level: {error}. Closures take no arguments; with "
                'curvature="functional" they take (upper, lower), the parameters as tuples or dicts'
            ) from None
        except ValueError:  # a builtin without a signature
            pass
        raise


def _checked_values(value: Any, level: Level, *, differentiable: bool) -> Tensor:
    del differentiable  # h may be constant where the bound does not apply
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"the closure of {level}_constraint's Inequality returned {kind}; return a real "
            "floating-point tensor h, of which h <= 0 is wanted"
        )
    return value


def _structure(rule: Optimizer, level: Level) -> _Structure:
    """Put the tensors that move back between those that do not, under their names if they have."""
    everything = parameters(rule)
    labels = names(rule, level) if are_named(rule) else None

    def build(moving: Sequence[Tensor]) -> tuple[Tensor, ...] | dict[str, Tensor]:
        rest = iter(moving)
        full = tuple(next(rest) if p.requires_grad else p.detach() for p in everything)
        return full if labels is None else dict(zip(labels, full, strict=True))

    return build


def _image_check(rule: Optimizer) -> _Check:
    """Phi as a tuple with one tensor per lower parameter that moves."""
    everything = parameters(rule)
    labels = names(rule, "lower") if are_named(rule) else None

    def checked(value: Any, level: Level, *, differentiable: bool) -> Tensors:
        image = _as_sequence(value, everything, labels)
        for part, like, index in zip(image, everything, range(len(image)), strict=True):
            who = f"lower_closure returned a map whose entry {labels[index] if labels else index!r}"
            if not isinstance(part, Tensor):
                raise TypeError(f"{who} is {type(part).__name__}, not a tensor")
            if part.shape != like.shape:
                raise ValueError(
                    f"{who} has shape {tuple(part.shape)}, the lower parameter it belongs to "
                    f"{tuple(like.shape)}"
                )
            if not part.is_floating_point():
                raise TypeError(f"{who} has dtype {part.dtype}; a map is real and floating")
        moving = tuple(p for p, like in zip(image, everything, strict=True) if like.requires_grad)
        if differentiable and not any(p.requires_grad for p in moving):
            raise ValueError(
                "lower_closure returned a map that does not depend on any parameter that requires "
                "grad (computed under no_grad or inference_mode, detached, or from copies?)"
            )
        return moving

    return checked


def _as_sequence(value: Any, like: Sequence[Tensor], labels: Sequence[str] | None) -> list[Any]:
    want = (
        f'penalty="fixed_point" wants Phi(u, v), a tuple of {len(like)} tensor(s) shaped like the '
        "lower parameters"
    )
    if isinstance(value, Tensor):
        if value.dim() == 0 and (len(like) > 1 or like[0].dim() > 0):
            raise ValueError(
                f"lower_closure returned a 0-d tensor, a loss?; {want}. A loss belongs to "
                'penalty="stationarity" or "value"'
            )
        value = (value,)
    if isinstance(value, dict):
        found: dict[Any, Any] = value
        if labels is None or found.keys() != set(labels):
            raise ValueError(f"lower_closure returned a dict with keys {sorted(found)}; {want}")
        return [found[label] for label in labels]
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"lower_closure returned {type(value).__name__}; {want}")
    image: list[Any] = list(value)
    if len(image) != len(like):
        raise ValueError(f"lower_closure returned {len(image)} tensors; {want}")
    return image


def _checked(value: Any, level: Level, *, differentiable: bool) -> Tensor:
    who = f"{level}_closure"
    if level == "lower" and isinstance(value, (tuple, list, dict)):
        raise TypeError(
            f"{who} returned {type(value).__name__}, not a 0-d loss; if it is a map Phi(u, v) "
            'whose fixed point is v, pass penalty="fixed_point"'
        )
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
