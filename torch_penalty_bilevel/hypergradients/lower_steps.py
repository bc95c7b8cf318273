"""Lower steps by the lower level's own torch optimizer, for loops over live closures."""

from __future__ import annotations

from functools import partial

import torch
from torch.optim import Optimizer

from ..levels import give, parameters
from ..levels.rules import step_without_decay
from ..tensors import Tensors, clones
from ..undo.random_state import RandomState
from .problem import LocalProblem
from .unrolled import Visit


def take_lower_steps(problem: LocalProblem, rule: Optimizer, steps: int, kept: int) -> list[Visit]:
    """Let ``rule`` step ``steps`` times on grad_v g, or v - Phi.

    Args:
        problem: its lower point are the parameters of ``rule`` that move.
        rule: the lower level's.
        steps: how many.
        kept: of how many of the last ones to return what repeating them takes; 0 for any rule.

    Raises:
        NonFiniteError: a loss or residual is not finite.
        ValueError: a kept step was not v <- v - lr r.
    """
    lower, visits = problem.at.lower, list[Visit]()
    devices = [p.device for level in problem.at for p in level]
    for left in range(steps, 0, -1):
        random = RandomState(devices) if left <= kept else None
        loss, residual = problem.residual()
        if left <= kept:
            visits.append(Visit(clones(lower), learning_rates(rule), loss, random))
        # Copies where they are needed afterwards: hooks change gradients in place.
        gradients = clones(residual) if left <= kept else residual
        silent = zip(gradients, problem.silent, strict=True)
        give(rule, [None if is_silent else gradient for gradient, is_silent in silent])
        problem.engine.attempt(partial(step_without_decay, rule), between=lower[0])
        if left <= kept:  # a rank whose rule failed or has a hook of its own may raise alone
            problem.engine.attempt(partial(visits[-1].check_step, lower, residual))
    return visits


def learning_rates(rule: Optimizer) -> tuple[float, ...]:
    """One per parameter that moves; raise ``ValueError`` where the rule has none."""
    groups = rule.param_groups
    if any("lr" not in group for group in groups):
        raise ValueError(
            f"lower is {type(rule).__name__}, whose groups have no learning rate; this method goes "
            'by that of the lower steps: give the groups an "lr", pass step_size where the method '
            'has one, or take method="cg"'
        )
    return tuple(float(g["lr"]) for g in groups for p in g["params"] if p.requires_grad)


@torch.no_grad()
def restart(rule: Optimizer, first: Tensors) -> None:
    """Parameters that move back to ``first``, with a rule that remembers nothing of them."""
    for parameter, value in zip(parameters(rule), first, strict=True):
        if parameter.requires_grad:
            parameter.copy_(value)
            rule.state.pop(parameter, None)
