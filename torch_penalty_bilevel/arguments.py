"""What arguments may be: a name or an object, a count."""

from __future__ import annotations

import math
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


def check_waiting(lower_steps: Any, certificate_tolerance: Any, max_lower_steps: Any) -> None:
    """Raise unless these say how many lower steps an upper one waits for."""
    if isinstance(lower_steps, str) and lower_steps != "auto":
        raise ValueError(f'lower_steps must be an integer >= 1 or "auto", got {lower_steps!r}')
    if lower_steps != "auto":
        check_count("lower_steps", lower_steps, at_least=1)
    check_count("max_lower_steps", max_lower_steps, at_least=1)
    if not 0 < certificate_tolerance < math.inf:
        raise ValueError(f"certificate_tolerance must be > 0, got {certificate_tolerance}")
