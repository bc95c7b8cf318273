"""What an optimizer of two levels remembers, in the layout that torch's checkpoint tools know.

They keep ``state``, by parameter, and ``param_groups``, and drop the rest; they save what a fresh
optimizer of the same making has too. So what belongs to a lower parameter lies beside its
moments, and all other memory in the first lower group, under names with a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

PREFIX = "bilevel_"
GROUP = "bilevel"
STATELESS = PREFIX + "stateless"
"""Marks a parameter of which nothing is remembered: torch's tools want an entry for each."""

Memory: TypeAlias = dict[str, Any]
"""By name; a list holds one entry per lower parameter, and then those of lower inequalities."""


def spread(memory: Memory, shared: Sequence[str], count: int) -> tuple[list[Memory], Memory]:
    """An entry for each of ``count`` lower parameters, and one for their group.

    Args:
        memory: to be saved.
        shared: names of lists that are not empty or have an entry per parameter.
        count: of the parameters.
    """
    kept = [name for name in shared if memory[name]]
    entries = [{PREFIX + name: memory[name][index] for name in kept} for index in range(count)]
    group = {name: value for name, value in memory.items() if name not in shared}
    group["lengths"] = {name: len(memory[name]) for name in shared}
    group["rest"] = {name: list(memory[name][count:]) for name in kept if memory[name][count:]}
    return entries, group


def gathered(
    entries: Sequence[Mapping[str, Any] | None], group: Memory, here: Sequence[Memory]
) -> Memory:
    """The memory that ``spread`` took apart.

    Args:
        entries: of each lower parameter; None where the checkpoint dropped it, as torch's tools do
            where a parameter is frozen.
        group: of the group.
        here: what this optimizer has instead for each parameter.

    Raises:
        ValueError: entries are missing.
    """
    memory = {name: value for name, value in group.items() if name not in ("lengths", "rest")}
    for name, length in group["lengths"].items():
        memory[name] = [] if length == 0 else _column(name, entries, here)
        memory[name] += group.get("rest", {}).get(name, [])
        if len(memory[name]) != length:
            raise ValueError(_missing(name, f"has {len(memory[name])} of {length} entries"))
    return memory


def _column(
    name: str, entries: Sequence[Mapping[str, Any] | None], here: Sequence[Memory]
) -> list[Any]:
    key = PREFIX + name
    found: list[Any] = []
    for index, (entry, own) in enumerate(zip(entries, here, strict=True)):
        held = own if entry is None else entry
        # A dict without entries is one that flattened checkpoints cannot say.
        if key not in held and name != "moments":
            raise ValueError(_missing(name, f"lacks that of lower parameter {index}"))
        found.append(held.get(key, {}))
    return found


def _missing(name: str, what: str) -> str:
    return (
        f"the checkpoint's {name} {what}; if it was loaded into the state dict of a fresh "
        "optimizer, take a step with that optimizer first"
    )


def without(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """``state`` of all parameters as the rules know it."""
    bare = {
        key: {k: v for k, v in entry.items() if not str(k).startswith(PREFIX)}
        for key, entry in state.items()
    }
    return {key: entry for key, entry in bare.items() if entry}


def check_options(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` for groups of another kind of rule.

    Versions of torch differ by options that one of them has not; kinds of rules do both ways.
    """
    own = {"params", "param_names", GROUP, "level", "initial_lr"}
    for position, (theirs, here) in enumerate(zip(saved, groups, strict=True)):
        lacks, has = sorted(here.keys() - theirs.keys() - own), theirs.keys() - here.keys() - own
        if lacks and has:
            raise ValueError(
                f"group {position} of the checkpoint belongs to another kind of rule: it has "
                f"{sorted(has)} and lacks {lacks}; nothing was changed (rules in another order?)"
            )


def check_shapes(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` for moments of other shapes than the parameters have here."""
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    here = [p for group in groups for p in group["params"]]
    for position, (number, parameter) in enumerate(zip(numbers, here, strict=False)):
        for key, value in state_dict["state"].get(number, {}).items():
            is_like = isinstance(value, Tensor) and value.dim() == parameter.dim()
            own = key in ("row_var", "col_var") or key.startswith(PREFIX)
            if is_like and not own and value.shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint's {key!r} of parameter {position} has shape "
                    f"{tuple(value.shape)}, the parameter here {tuple(parameter.shape)}; "
                    "nothing was changed (another number of samples?)"
                )
