"""Two ordinary torch optimizers that behave as one ``torch.optim.Optimizer``."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import levels
from ..adapters.closures import both_of
from ..adapters.left_out import warn_of_left_out
from ..adapters.made_outside import MadeOutside
from ..errors import warn
from ..evaluation import Evaluation, Norms
from ..levels import checkpoint, rules
from ..tensors import Pair, Tensors
from ..undo.scope import Scope
from . import summary


class Here(NamedTuple):
    """The parameters of both levels at one moment."""

    at: Pair
    """Those that move."""
    upper_names: list[str]
    """Of those that move."""
    lower_names: list[str]
    lower: Tensors
    """All of the lower level."""
    moves: list[bool]
    """Which of them."""


class Seen(NamedTuple):
    """One evaluation, and where it was made."""

    evaluation: Evaluation
    norms: Norms
    here: Here
    moving: list[bool]
    """Which lower parameters and multipliers of inequalities: of these, all."""


_Kinds: TypeAlias = dict[int, tuple[torch.dtype, torch.device, torch.Size]]


class TwoLevelOptimizer(levels.Joined):
    """An upper and a lower rule with one list of groups, one state and one checkpoint."""

    upper: Optimizer
    lower: Optimizer
    _scope: Scope
    _adjoint: Tensors
    """One tensor shaped like each lower parameter, and possibly more."""
    _counts: dict[str, int]
    _fields: ClassVar[tuple[str, ...]] = ("defaults", "upper", "lower", "_order", "_scope")
    _is_complete = False
    """Has something other than a step given the state all its entries?"""
    _has_two_rates = False
    """Were the levels given different learning rates, and nothing was said about them since?"""
    _built_as: _Kinds = {}  # noqa: RUF012 - replaced, not written into
    """What kind of tensor each parameter was, by its id; a copy does not know."""
    _is_told_of_left_out = False
    """Was it said that a trainer leaves out steps?"""

    def _build(
        self,
        upper: levels.Parameters,
        lower: levels.Parameters,
        upper_lr: float | None,
        lower_lr: float | None,
        make_lower: Callable[..., Optimizer] = torch.optim.Adam,
    ) -> None:
        """Join the rules given or, where parameters were given, ordinary ones over them."""
        if upper is lower and isinstance(upper, Optimizer):
            raise ValueError("upper and lower are the same optimizer; each level needs its own")
        upper_rule = levels.build(upper, "upper", upper_lr, default_lr=1e-3)
        lower_rule = levels.build(lower, "lower", lower_lr, default_lr=1e-3, make=make_lower)
        levels.check_disjoint(upper_rule, lower_rule)
        rules.check(upper_rule, "upper")
        rules.check(lower_rule, "lower")
        rules.warn_of_coarse(lower_rule)
        rules.warn_of_lost_moves(upper_rule)
        self.upper, self.lower = upper_rule, lower_rule
        self._scope = Scope()
        self._has_two_rates = rules.rates(upper_rule, "lr") != rules.rates(lower_rule, "lr")
        self._join()
        self._built_as = self._kinds()

    @functools.cached_property
    def _made_outside(self) -> MadeOutside:
        return MadeOutside()  # of a copy another

    def _rules(self) -> dict[str, Optimizer]:
        return {"upper": self.upper, "lower": self.lower}

    def _appeared(self, key: levels.Level, group: dict[str, Any]) -> None:
        levels.mark(group, key)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, in the order they were added; each says its ``"level"``."""
        groups = super().param_groups
        # Torch's tools load into what a live group has.
        self.lower.param_groups[0].setdefault(checkpoint.GROUP, {})
        return groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of all parameters: a new mapping onto the rules' own entries.

        Those of lower parameters have the multiplier and whatever else is kept for each beside
        them. Empty where the rules have none yet: torch's checkpoint tools then ask for it.
        """
        held = {**self.upper.state, **self.lower.state}
        begun = self._is_complete or self._counts["gradient_evaluations"] > 0
        if not begun and not (self.upper.state and self.lower.state):
            return defaultdict(dict)
        lower = levels.parameters(self.lower)
        entries, _ = checkpoint.spread(self._own_state(), self._lists(), len(lower))
        held |= {p: {**held.get(p, {}), **e} for p, e in zip(lower, entries, strict=True)}
        for parameter in levels.parameters(self.upper):
            held[parameter] = held.get(parameter) or {checkpoint.STATELESS: 1}
        return defaultdict(dict, held)

    def __repr__(self) -> str:
        head, *groups = super().__repr__().split("\n")
        # What torch's tools load into is empty between checkpoints.
        groups = [line for line in groups if line.strip() != f"{checkpoint.GROUP}: {{}}"]
        own = {"upper": summary.of_level(self.upper), "lower": summary.of_level(self.lower)}
        lines = [f"    {name}: {value}" for name, value in (own | self._described()).items()]
        return "\n".join([head, *lines, *groups])

    def _described(self) -> dict[str, str]:
        """What the user chose and how far the run is, for a person."""
        raise NotImplementedError

    def _begun(self, upper: Any, lower: Any, closure: Any) -> tuple[Any, Any] | None:
        """The closures of ``step``; None if torch's checkpoint tools called it, for the state."""
        if upper is lower is closure is None and self._completes_state():
            return None
        both = both_of(upper, lower, closure)
        if isinstance(upper, (list, tuple)) and lower is None and not self._is_told_of_left_out:
            self._is_told_of_left_out = warn_of_left_out(*both)
        if self._has_two_rates:
            self._warn_of_one_rate()
        return both

    def _warn_of_one_rate(self) -> None:
        # Where ordinary schedulers start they keep; a rate that they are told overwrites it.
        starts = [rules.rates(rule, "initial_lr") for rule in self._rules().values()]
        if None not in starts[0] and len(starts[0]) == 1 and starts[0] == starts[1]:
            self._has_two_rates = False
            warn(
                "a scheduler gave both levels one learning rate, though they were built with two "
                "(OneCycleLR or CyclicLR with one number?); give it a list with one entry per "
                "group of optimizer.param_groups, e.g. OneCycleLR(optimizer, max_lr=[0.1, 0.01])",
            )

    def _completes_state(self) -> bool:
        """Give every parameter its entries, if torch's checkpoint tools ask for it.

        They call ``step`` without closures, with zero gradients and learning rates, on an optimizer
        without state, so that there is something to load into.
        """
        at = self._here().at
        grads = [p.grad for p in (*at.upper, *at.lower)]
        fresh = not self.state and all(g is not None and not bool(g.any()) for g in grads)
        if not fresh or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        for rule in self._rules().values():
            rule.step()
        self._is_complete = True
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the level named by its ``"level"`` entry.

        Raises:
            ValueError: no level, an unknown one, a parameter that some group already holds, or an
                option that would change the level's problem.
        """
        level = param_group.get("level")
        if level not in ("upper", "lower"):
            raise ValueError(f'a parameter group needs "level": "upper" or "lower", got {level!r}')
        held = {id(p) for group in self.param_groups for p in group["params"]}
        group = dict(param_group)
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if any(id(p[1] if isinstance(p, tuple) else p) in held for p in group["params"]):
            raise ValueError("a parameter of the new group is already in a group of either level")
        rule = self._rules()[level]
        held_here = levels.named(self.upper, "upper") + levels.named(self.lower, "lower")
        new = [
            p if isinstance(p, tuple) else (f"the new group's [{i}]", p)
            for i, p in enumerate(group["params"])
        ]
        levels.check_memory([*held_here, *new])
        part = levels.owner(rule, group)
        rules.check_group(part, part.defaults | group, level, self._lower_is_map())
        rule.add_param_group(group)
        self._order.append(level)
        self._group_added(level, group["params"])
        self._built_as = self._kinds() | self._built_as

    def _here(self) -> Here:
        """The parameters as they are now; raises ``ValueError`` where they cannot be stepped."""
        upper, lower = levels.named(self.upper, "upper"), levels.named(self.lower, "lower")
        moves = [p.requires_grad for _, p in lower]
        if len(lower) < len(self.adjoint):
            raise ValueError(
                f"the groups of lower hold {len(lower)} parameters and held {len(self.adjoint)} "
                "before: was a group, or its 'params', shortened? To let a parameter stand still "
                "freeze it with requires_grad_(False); to leave it out build a new optimizer"
            )
        if not any(moves):
            raise ValueError(
                "every parameter of lower is frozen (requires_grad False), so there is no lower "
                "problem; thaw some, or train upper by its own optimizer meanwhile"
            )
        shapes = [tuple(q.shape) for q in self._adjoint]
        for i, (name, parameter) in enumerate(lower):
            if shapes[i : i + 1] != [tuple(parameter.shape)]:
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} is not what its group "
                    "held when the optimizer was built; add tensors by add_param_group of this "
                    "optimizer, or build a new one"
                )
        moving = [(n, p) for n, p in upper if p.requires_grad]
        below = [(n, p) for n, p in lower if p.requires_grad]
        return Here(
            at=Pair(tuple(p for _, p in moving), tuple(p for _, p in below)),
            upper_names=[name for name, _ in moving],
            lower_names=[name for name, _ in below],
            lower=tuple(p for _, p in lower),
            moves=moves,
        )

    def _kinds(self) -> _Kinds:
        pairs = levels.named(self.upper, "upper") + levels.named(self.lower, "lower")
        return {id(p): (p.dtype, p.device, p.shape) for _, p in pairs}

    def _explain_changed(self, error: Exception) -> None:
        """Raise ``ValueError`` from ``error`` if a parameter is not what it was; often why."""
        pairs = levels.named(self.upper, "upper") + levels.named(self.lower, "lower")
        now = self._kinds()
        for name, parameter in pairs:
            before, here = self._built_as.get(id(parameter)), now[id(parameter)]
            if before is not None and before != here:
                was, became = (f"{tuple(s)} {d} on {where}" for d, where, s in (before, here))
                raise ValueError(
                    f"parameter {name!r} was a tensor of {was} when the optimizer was built and is "
                    f"one of {became}: what is remembered for it no longer fits ({error}). Call "
                    "model.to(), .double() and the like before the optimizer is built"
                ) from error

    @property
    def adjoint(self) -> Tensors:
        """The estimate q, shaped like v."""
        raise NotImplementedError

    def _devices(self) -> list[torch.device]:
        groups = (*self.upper.param_groups, *self.lower.param_groups)
        return [p.device for group in groups for p in group["params"]]

    def _group_added(self, level: str, parameters: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def _own_state(self) -> checkpoint.Memory:
        """What is remembered beside the rules' own state, for a checkpoint."""
        raise NotImplementedError

    def _lists(self) -> tuple[str, ...]:
        """Names in ``_own_state`` of lists with an entry per lower parameter, or empty."""
        raise NotImplementedError

    def _lower_is_map(self) -> bool:
        raise NotImplementedError
