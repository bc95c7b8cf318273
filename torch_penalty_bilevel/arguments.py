"""What arguments may be: a name or an object, a count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def chosen(
    argument: str, value: str | T, by_name: Mapping[str, Callable[[], T]], method: str, example: str
) -> T:
    """The object behind a name, or the object itself.

    Args:
        argument: name of the option, for the error.
        value: what the user gave.
        by_name: makes the object behind each name.
        method: a method that every object has.
        example: of an object, for the error.

    Raises:
        ValueError: no object has this name.
        TypeError: neither a name nor an object with this method.
    """
    if isinstance(value, str):
        if value not in by_name:
            raise ValueError(
                f"{argument} must be one of {sorted(by_name)} or an object such as {example}, "
                f"got {value!r}"
            )
        return by_name[value]()
    unknown: Any = value
    if isinstance(unknown, type) or not hasattr(unknown, method):
        raise TypeError(
            f"{argument} must be a name or an object such as {example}, got {unknown!r}"
        )
    return value


def check_count(name: str, value: Any, at_least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")
