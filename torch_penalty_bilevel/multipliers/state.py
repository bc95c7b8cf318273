"""What a multiplier rule remembers: each rule extends ``DualState`` by fields of its own.

A field says how it follows the lower parameters: ``along(ZEROS)``, ``along(DIRECTION)``,
``along(POINT)`` and ``along(MEMORY)`` hold an entry for each of them; all others are numbers, or
records of numbers such as the watch. What freezing, thawing, added groups, restarts and
checkpoints do to a field follows from that, so a rule with one more tensor has one more line:

    @dataclass(frozen=True, eq=False)
    class WithMomentum(DualState):
        velocity: Tensors = along(ZEROS)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..tensors import Tensors, check_like, is_sharded
from ..undo.rule_memory import copied, relocated

State = TypeVar("State", bound="DualState")
Entries = tuple[Any, ...]

_RETIRED = {"first_weight"}
_ROLE = "role"


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _nothing(parameter: Tensor) -> Tensor:
    """Zeros in the place of one number; a shard's layout has no such thing."""
    if is_sharded(parameter):
        return _zeros(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=parameter.device).expand(parameter.shape)


def _kept(entry: Any, parameter: Tensor) -> Any:
    return entry


def _as_it_is(entry: Any) -> Any:
    return entry


def _on_its_own(parameter: Tensor) -> Tensor:
    return parameter.detach().clone()


def _placed(saved: Tensor, like: Tensor, device: torch.device) -> Tensor:
    return saved.detach().clone().to(like.device, like.dtype)


class Role(NamedTuple):
    """How one entry follows its lower parameter."""

    added: Callable[[Tensor], Any] = _zeros
    """The entry of a new parameter."""
    held: Callable[[Any, Tensor], Any] = _kept
    """That of a frozen one."""
    restarted: Callable[[Any, Tensor], Any] = _kept
    """That of one that starts on another lower problem."""
    placed: Callable[[Any, Any, torch.device], Any] = _placed
    """From a checkpoint, where this state has the second argument, on that device."""
    saved: Callable[[Any], Any] = _as_it_is
    """For a checkpoint."""


ZEROS = Role(restarted=lambda entry, parameter: torch.zeros_like(entry))
"""Belongs to the present lower problem, like nu: 0 where that begins; in at least float32."""
LATE = Role(
    added=_nothing,
    restarted=lambda entry, parameter: _nothing(entry),
    # Checkpoint tools write into what a fresh optimizer shows them.
    saved=lambda entry: entry.contiguous(),
)
"""Zeros that take no memory until there is something to remember; never written in place."""
DIRECTION = Role()
"""Outlives the lower problem, like a direction in which H was stiff."""
POINT = Role(
    added=_on_its_own,
    # v itself, not a copy of what it was: whenever v thaws, z starts from it.
    held=lambda entry, parameter: parameter.detach(),
    restarted=lambda entry, parameter: _on_its_own(parameter),
)
"""A second lower point: it starts at v, and is v where that is frozen."""
MEMORY = Role(
    added=lambda parameter: {},
    placed=lambda saved, entry, device: relocated(saved, device),
)
"""What a torch rule remembers of a second point."""


def along(role: Role) -> Any:
    """A field with an entry for each lower parameter."""
    return dataclasses.field(default=(), metadata={_ROLE: role})


class _Fields(NamedTuple):
    along: dict[str, Role]
    numbers: dict[str, Callable[[Any], Any]]
    """Also those of records, by their own names, with the type that a checkpoint gives them."""
    records: dict[str, type[Any]]


@functools.cache
def _fields(kind: type[Any]) -> _Fields:
    found = _Fields({}, {}, {})
    names = [field.name for field in dataclasses.fields(kind)]
    for field in dataclasses.fields(kind):
        if _ROLE in field.metadata:
            found.along[field.name] = field.metadata[_ROLE]
        elif dataclasses.is_dataclass(field.default):
            found.records[field.name] = type(field.default)
            own = _fields(type(field.default)).numbers
            # A checkpoint keeps them side by side.
            if twice := own.keys() & (found.numbers.keys() | names):
                raise TypeError(f"{kind.__name__} has two numbers of the name {sorted(twice)}")
            found.numbers.update(own)
        elif field.name != "steps":
            found.numbers[field.name] = type(field.default)
    return found


@dataclass(frozen=True, eq=False)
class DualState:
    """What every rule remembers."""

    multiplier: Tensors = along(ZEROS)
    """nu, shaped like the lower parameters, in at least float32."""
    weight: float = 0.0
    """gamma, multiplies the penalty."""
    damping: float = 0.0
    """lambda, multiplies g in the lower level."""
    steps: int = 0
    """Lower steps so far."""

    @classmethod
    def at(cls: type[State], lower: Iterable[Tensor], **numbers: Any) -> State:
        """The state before the first step at these lower parameters."""
        return cls(**numbers).extended(tuple(lower))

    @classmethod
    def lists(cls) -> tuple[str, ...]:
        """Names of the fields with an entry for each lower parameter."""
        return tuple(_fields(cls).along)

    def but(self: State, **changes: Any) -> State:
        """A copy with other values for some fields."""
        return dataclasses.replace(self, **changes)

    def only(self: State, moving: Sequence[bool]) -> State:
        """Restricted to the lower parameters that move."""
        if all(moving):
            return self
        return self.but(
            **{name: tuple(itertools.compress(self._of(name), moving)) for name in self.lists()}
        )

    def merged(self: State, part: State, moving: Sequence[bool], lower: Sequence[Tensor]) -> State:
        """``part`` where the parameters ``lower`` move, this state where they do not.

        Multipliers of inequalities stand behind the parameters, and always move.
        """
        if all(moving):
            return part

        def entries(name: str, role: Role) -> Iterator[Any]:
            fresh = iter(part._of(name))
            for entry, moves, parameter in itertools.zip_longest(self._of(name), moving, lower):
                yield next(fresh) if moves else role.held(entry, parameter)

        return part.but(**{n: tuple(entries(n, r)) for n, r in _fields(type(self)).along.items()})

    def extended(self: State, new: Sequence[Tensor], at: int | None = None) -> State:
        """With entries for lower parameters inserted at ``at``; None: at the end."""
        at = len(self.multiplier) if at is None else at

        def entries(name: str, role: Role) -> Entries:
            old = self._of(name)
            return (*old[:at], *map(role.added, new), *old[at:])

        return self.but(**{n: entries(n, r) for n, r in _fields(type(self)).along.items()})

    def restarted(self: State, lower: Sequence[Tensor]) -> State:
        """On another lower problem, where ``lower`` starts; what outlives the old one is kept."""
        return self.but(
            **{
                n: tuple(itertools.starmap(r.restarted, zip(self._of(n), lower, strict=True)))
                for n, r in _fields(type(self)).along.items()
            }
        )

    def forgetting(self: State, *names: str) -> State:
        """With nothing in these fields, which are ``LATE``."""
        return self.but(**{name: tuple(map(_nothing, self._of(name))) for name in names})

    def remembering(self: State, memories: Sequence[dict[str, Any]]) -> State:
        """With copies of what the lower rule remembers of v for every second point."""
        names = [n for n, r in _fields(type(self)).along.items() if r is MEMORY]
        return self.but(**{name: tuple(map(copied, memories)) for name in names})

    # Checkpoints.

    def packed(self) -> dict[str, Any]:
        """For a state dict; tensors are not copied."""
        fields = _fields(type(self))
        holders = [self, *(getattr(self, name) for name in fields.records)]
        numbers = {
            name: float(getattr(holder, name))
            for holder in holders
            for name in fields.numbers
            if hasattr(holder, name)
        }
        lists = {n: [r.saved(e) for e in self._of(n)] for n, r in fields.along.items()}
        return {**lists, "scalars": numbers, "lower_steps": self.steps}

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ValueError if ``saved`` cannot replace this state."""
        check_like("multiplier", saved["multiplier"], self.multiplier)
        known = _fields(type(self)).numbers.keys()
        # Of an earlier version: what it lacks starts anew, what is no longer kept is dropped.
        if saved["scalars"].keys() - known - _RETIRED:
            raise ValueError(
                f"the checkpoint holds {sorted(saved['scalars'])}, this rule needs "
                f"{sorted(known)}; construct with the rule that made it"
            )

    def unpacked(self: State, saved: dict[str, Any]) -> State:
        """``saved`` by ``packed``, copied to where this state's tensors are."""
        fields, scalars = _fields(type(self)), saved["scalars"]

        def entries(name: str, role: Role) -> Entries:
            triples = zip(saved[name], self._of(name), self.multiplier, strict=True)
            return tuple(role.placed(new, own, nu.device) for new, own, nu in triples)

        def numbers(kind: type[Any]) -> dict[str, Any]:
            return {n: to(scalars[n]) for n, to in _fields(kind).numbers.items() if n in scalars}

        own = {f.name for f in dataclasses.fields(self)}
        changes: dict[str, Any] = {n: v for n, v in numbers(type(self)).items() if n in own}
        for name, kind in fields.records.items():
            changes[name] = dataclasses.replace(getattr(self, name), **numbers(kind))
        changes |= {n: entries(n, r) for n, r in fields.along.items() if n in saved}
        return self.but(**changes, steps=saved["lower_steps"])

    def _of(self, name: str) -> Entries:
        return getattr(self, name)
