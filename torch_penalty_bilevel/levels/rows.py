"""One step of the upper rule in which what was not in the batch does not take part."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..undo.rule_memory import copied
from .around import around
from .joined import Together, parts

_COUNTERS = ("step", "mu_product", "mu", "eta")
"""What rules of torch.optim keep once per tensor, whatever its gradient is."""


@torch.no_grad()
def step_touched_rows(rule: Optimizer) -> None:
    """``rule.step()`` on the rows that have a gradient: the others and their moments stay.

    A row is an entry along the first dimension: one sample's weight, one poison image, one
    embedding. A row whose gradient is exactly zero was not in the batch; dense Adam would
    still move it by its momentum and let its moments fade, and weight decay would start moments
    for it. So the rule sees a shorter tensor, of the rows in the batch, with their part of its
    state. For a tensor without such a row the rule only counts the step.

    Bit-equal to a rule over these rows alone, with what torch keeps once per tensor: the number
    of steps (Adam's bias correction, whether SGD's dampening has begun, ASGD's rate) and, of
    rules that mix rows, what they mix: Adafactor's mean over the rows and its column factor, Muon's
    orthogonalisation. These mix the rows in the batch. Needs state by rows, as all of torch.optim
    have it.
    """
    # Before any hook: one that centres or adds noise changes rows that were not there.
    found = _rows_in_batch(parts(rule))

    def take(part: Optimizer) -> None:
        @contextlib.contextmanager
        def shortened() -> Generator[None]:
            with contextlib.ExitStack() as stack:
                for group, parameter, rows in found[id(part)]:
                    if parameter.grad is not None:  # a hook may have dropped it
                        takes_part = _only if len(rows) else _counting
                        stack.enter_context(takes_part(part, group, parameter, rows))
                yield

        with around(part, shortened) if found[id(part)] else contextlib.nullcontext():
            part.step()

    if isinstance(rule, Together):
        rule.step_by(take)
    else:
        take(rule)


def _rows_in_batch(
    rules: Sequence[Optimizer],
) -> dict[int, list[tuple[dict[str, Any], Tensor, Tensor]]]:
    """(group, parameter, rows) of each rule's tensors that have rows outside of the batch.

    Waits for the device once, and once more for each of these tensors.
    """
    looked_at = [
        (rule, group, parameter, present)
        for rule in rules
        for group in rule.param_groups
        for parameter in group["params"]
        if (present := _present(rule, group, parameter)) is not None
    ]
    complete = [present.all() for *_, present in looked_at]
    on_host = torch.stack([c.to(complete[0].device) for c in complete]).tolist() if complete else []
    found: dict[int, list[tuple[dict[str, Any], Tensor, Tensor]]] = {id(rule): [] for rule in rules}
    for (rule, group, parameter, present), is_complete in zip(looked_at, on_host, strict=True):
        if not is_complete:
            found[id(rule)].append((group, parameter, present.nonzero().squeeze(1)))
    return found


def _present(rule: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor | None:
    """For each row: has it a gradient? None where nothing need be done about those without."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        # Rules for sparse gradients see the rows in them; SGD's momentum moves all the others.
        if not (isinstance(rule, SGD) and group["momentum"]):
            return None
        gradient = gradient.to_dense()
    present = gradient != 0
    return present.flatten(1).any(1) if present.dim() > 1 else present.reshape(-1)


@contextlib.contextmanager
def _only(
    rule: Optimizer, group: dict[str, Any], parameter: Tensor, rows: Tensor
) -> Generator[None]:
    """``parameter``, its gradient and its state are ``rows`` of themselves inside the block."""
    whole, gradient = parameter.data, parameter.grad
    assert gradient is not None
    before = set(rule.state.get(parameter, {}))
    held = {k: t for k, t in rule.state.get(parameter, {}).items() if _is_by_row(k, t, whole)}
    parameter.grad = None
    parameter.data = whole[rows]
    parameter.grad = (gradient if gradient.layout == torch.strided else gradient.to_dense())[rows]
    for key, full in held.items():
        rule.state[parameter][key] = full[rows]
    try:
        yield
        whole[rows] = parameter.data
        for key, part in rule.state.get(parameter, {}).items():
            if key not in before and _is_by_row(key, part, parameter):
                held[key] = _forget(key, _room(part, whole), whole, group)
            if key in held:
                held[key][rows] = part
    except BaseException:
        if not before:  # of rows only
            rule.state.pop(parameter, None)
        raise
    finally:
        parameter.grad = None
        parameter.data = whole
        parameter.grad = gradient
        if held:
            rule.state[parameter].update(held)


@contextlib.contextmanager
def _counting(
    rule: Optimizer, group: dict[str, Any], parameter: Tensor, rows: Tensor
) -> Generator[None]:
    """The rule counts the step inside the block; all else about ``parameter`` is put back."""
    del rows  # none
    gradient, value = parameter.grad, parameter.detach().clone()
    memory = copied(rule.state.get(parameter, {}))
    parameter.grad = torch.zeros_like(value)
    try:
        yield
    finally:
        parameter.grad = gradient
        parameter.copy_(value)
        for key, after in rule.state.get(parameter, {}).items():
            if key in memory and key not in _COUNTERS:
                rule.state[parameter][key] = memory[key]
            elif isinstance(after, Tensor) and key not in _COUNTERS:
                _forget(key, after, value, group)


def _is_by_row(key: str, value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return False
    # Of one row in the batch Adafactor's factor of the columns has the shape of the row itself.
    if key == "col_var" and parameter.dim() == 2:
        return False
    pairs = zip(value.shape[1:], parameter.shape[1:], strict=True)
    return value.shape[0] == parameter.shape[0] and all(n in (m, 1) for n, m in pairs)


def _room(part: Tensor, whole: Tensor) -> Tensor:
    """As ``part``, the state of some rows, for all rows of ``whole``."""
    if part.shape[1:] == whole.shape[1:]:
        return torch.empty_like(whole, dtype=part.dtype)
    return part.new_empty((len(whole), *part.shape[1:]))


def _forget(key: str, state: Tensor, whole: Tensor, group: dict[str, Any]) -> Tensor:
    """Write into ``state`` what a rule knows of ``whole`` before its first step."""
    if key == "ax":  # the average of ASGD over what has not moved
        return state.copy_(whole)
    return state.fill_(float(group["lr"]) if key == "step_size" else 0.0)  # of Rprop
