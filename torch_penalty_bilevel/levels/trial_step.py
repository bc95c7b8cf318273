"""A torch optimizer as a pure function: one step of its rule at a point that is not its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..tensors import OptionalTensors, Tensors, clones
from ..undo.in_place import replaced
from ..undo.rule_memory import Moments, copied
from .groups import parameters
from .rules import step_without_decay


@torch.no_grad()
def stepped(
    rule: Optimizer,
    live: Tensors,
    point: Tensors,
    gradients: OptionalTensors,
    moments: tuple[Moments, ...],
) -> tuple[Tensors, tuple[Moments, ...]]:
    """Where ``rule`` would move ``point`` under ``gradients``, and its moments afterwards.

    The learning rates and options of the rule's own groups and its step hooks (clipping) apply.
    The rule's parameters lend their storage and get everything back, also after an exception.

    Args:
        rule: the optimizer.
        live: those of its parameters that take part; no other moves.
        point: values in their place.
        gradients: one per tensor of ``point``; None leaves it and its moments alone.
        moments: the rule's memory that belongs to ``point``; not modified.
    """
    grads = [(p, p.grad) for p in parameters(rule)]
    state = dict(rule.state)
    options = [{k: v for k, v in g.items() if k != "params"} for g in rule.param_groups]
    rule.state.clear()
    try:
        for parameter, _ in grads:
            parameter.grad = None
        groups = {id(p): group for group in rule.param_groups for p in group["params"]}
        with replaced(live, point):
            for parameter, gradient, memory in zip(live, gradients, moments, strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                if memory:
                    rule.state[parameter] = copied(memory)
                    _place_counters(rule.state[parameter], groups[id(parameter)], parameter)
            step_without_decay(rule)
            return clones(live), tuple(dict(rule.state.get(p, {})) for p in live)
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        rule.state.clear()
        rule.state.update(state)
        for group, old in zip(rule.param_groups, options, strict=True):
            for name in group.keys() - old.keys() - {"params"}:
                del group[name]
            group.update(old)


def _place_counters(memory: Moments, group: dict[str, Any], parameter: Tensor) -> None:
    """Move step counters to where kernels on the device want them, as torch does where it loads.

    A checkpoint may come from another device.
    """
    if group.get("fused") or group.get("capturable"):
        for key, value in memory.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                memory[key] = value.to(parameter.device)
