"""Ordinary torch optimizers that behave as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


class Joined(Optimizer):
    """Rules with one list of groups and one state, which are views of what the rules hold.

    They are computed when asked for, so a scheduler, a checkpoint or a hook may address either: a
    copied list would silently fork as soon as a rule reloads its own state.

    Subclasses name their instance attributes in ``_fields`` (what pickle keeps) and call ``_join``.
    """

    _order: list[Hashable]
    """Of which rule each group is, in the order in which they were added."""
    _fields: ClassVar[tuple[str, ...]] = ("defaults", "_order")

    def _rules(self) -> Mapping[Any, Optimizer]:
        raise NotImplementedError

    def _join(self) -> None:
        """Start life with ``_rules``, in the way unpickling does."""
        rules = self._rules()
        self._order = [key for key, rule in rules.items() for _ in rule.param_groups]
        # Schedulers that cycle momentum look here for what all groups have; values are the groups'.
        first, *rest = [rule.defaults for rule in rules.values()]
        common = {k: v for k, v in first.items() if all(k in other for other in rest)}
        super().__setstate__({"defaults": common})

    # torch.optim.Optimizer keeps ``param_groups`` and ``state`` as plain attributes.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, in the order they were added."""
        waiting = {key: iter(rule.param_groups) for key, rule in self._rules().items()}
        groups = [next(waiting[key]) for key in self._order]
        for key, rest in waiting.items():  # added to a rule behind this object's back
            for group in rest:
                self._appeared(key, group)
                self._order.append(key)
                groups.append(group)
        return groups

    def _appeared(self, key: Any, group: dict[str, Any]) -> None:
        """Hear of a group that a rule was given without this object."""

    # Pickle, deepcopy.

    def __getstate__(self) -> dict[str, Any]:
        # Not the rest of __dict__: schedulers wrap ``step`` on the instance, and hooks, as torch
        # has it, are not pickled.
        return {name: self.__dict__[name] for name in self._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {k: v for k, v in state.items() if k not in ("param_groups", "state")}
        super().__setstate__(own)
        if "param_groups" in state:  # from load_state_dict, which builds new groups and state
            of_group = list(zip(self._order, state["param_groups"], strict=True))
            for key, rule in self._rules().items():
                groups = [group for owner, group in of_group if owner == key]
                held = [p for g in groups for p in g["params"] if p in state["state"]]
                moments = {p: state["state"][p] for p in held}
                rule.__setstate__({"param_groups": groups, "state": defaultdict(dict, moments)})


class Together(Joined):
    """Several rules that move one level together: Muon for the matrices, AdamW for the rest.

    Args:
        rules: ready optimizers without a common parameter.

    Raises:
        ValueError: a parameter is in two of them.
    """

    rules: list[Optimizer]
    _fields: ClassVar[tuple[str, ...]] = ("defaults", "_order", "rules")

    def __init__(self, rules: Sequence[Optimizer]) -> None:
        held = [p for rule in rules for group in rule.param_groups for p in group["params"]]
        if len({id(p) for p in held}) < len(held):
            raise ValueError("a parameter is in two of the rules of one level")
        self.rules = list(rules)
        self._take = _step
        self._join()

    def _rules(self) -> Mapping[Any, Optimizer]:
        return dict(enumerate(self.rules))

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The state of all parameters; what is written goes to the rule that moves the tensor."""
        return _States(self.rules)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of each rule, between the hooks of the whole."""
        take = self._take
        for rule in self.rules:
            take(rule)

    def step_by(self, take: Callable[[Optimizer], None]) -> None:
        """``step`` in which each rule steps by ``take``."""
        self._take = take
        try:
            self.step()
        finally:
            self._take = _step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the rule whose number is its ``"rule"`` entry, the last one by default."""
        key = self.number_for(param_group)
        param_group.pop("rule", None)
        _ = self.param_groups  # with those added to a rule so far
        self.rules[key].add_param_group(param_group)
        self._order.append(key)

    def number_for(self, new_group: Mapping[str, Any]) -> int:
        """Of the rule that a new group would go to; raises ``ValueError``."""
        count = len(self.rules)
        number = new_group.get("rule", count - 1)
        if type(number) is not int or number not in range(count):
            raise ValueError(f'"rule" must be a number from 0 to {count - 1}, got {number!r}')
        return number

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._take = _step
        super().__setstate__(state)


def parts(rule: Optimizer) -> list[Optimizer]:
    """The rules of ``Together``, or the one that it is."""
    return rule.rules if isinstance(rule, Together) else [rule]


def owner(rule: Optimizer, group: Mapping[str, Any]) -> Optimizer:
    """Which of ``parts(rule)`` holds ``group``, or would be given it."""
    if not isinstance(rule, Together):
        return rule
    holding = (part for part in rule.rules if any(g is group for g in part.param_groups))
    return next(holding, None) or rule.rules[rule.number_for(group)]


def _step(rule: Optimizer) -> None:
    rule.step()


class _States(MutableMapping[Tensor, Any]):
    def __init__(self, rules: Sequence[Optimizer]) -> None:
        self._states = [rule.state for rule in rules]
        pairs = zip(rules, self._states, strict=True)
        self._of = {
            id(p): state for rule, state in pairs for g in rule.param_groups for p in g["params"]
        }

    def __getitem__(self, parameter: Tensor) -> Any:
        state = self._of[id(parameter)]
        if parameter not in state:  # which would make an entry
            raise KeyError(parameter)
        return state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._of[id(parameter)][parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of[id(parameter)][parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for state in self._states for parameter in state)

    def __len__(self) -> int:
        return sum(len(state) for state in self._states)
