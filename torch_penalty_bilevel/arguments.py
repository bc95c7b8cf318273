"""What arguments may be: a name or an object, a count, a number, a truth value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")

_RANGES: Mapping[str, Callable[[float], bool]] = {
    "be a finite number > 0": lambda x: 0 < x < math.inf,
    "be a finite number >= 0": lambda x: 0 <= x < math.inf,
    "be a finite number >= 1": lambda x: 1 <= x < math.inf,
    "lie in (0, 1]": lambda x: 0 < x <= 1,
    "lie in (0, 1)": lambda x: 0 < x < 1,
}


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


def is_number(value: Any) -> bool:
    """Is it a real number, neither a truth value nor a tensor?"""
    return not isinstance(value, bool) and isinstance(value, Real)


def checked_number(name: str, value: Any, must: str, remedy: str) -> float:
    """``value`` as a float, which checkpoints keep; raise ValueError unless it ``must`` be such.

    A tensor is refused even if 0-d: what becomes of it later would not be seen.
    """
    if is_number(value):
        try:
            number = float(value)
        except OverflowError:  # an integer of many digits
            number = math.inf
        if _RANGES[must](number):
            return number
    raise ValueError(f"{name} must {must}, got {value!r}; {remedy}")


def checked_truth(name: str, value: Any) -> bool:
    """``value``; raise TypeError unless it is True or False (a string or a tensor may be both)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


class Option:
    """An attribute that is checked whenever it is set, so that later ones are as good."""

    _name = ""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None or self._name not in instance.__dict__:
            raise AttributeError(self._name)
        return instance.__dict__[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = self.checked(instance, value)

    def checked(self, instance: Any, value: Any) -> Any:
        """What to keep of ``value``; raises where it will not do."""
        raise NotImplementedError


class Number(Option):
    """A number, see ``checked_number``."""

    def __init__(self, must: str, remedy: str) -> None:
        self._must, self._remedy = must, remedy

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> float:
        return super().__get__(instance, owner)

    def checked(self, instance: Any, value: Any) -> float:
        return checked_number(self._name, value, self._must, self._remedy)


class Count(Option):
    """An integer >= 1, see ``check_count``; or ``"auto"`` where that is offered."""

    def __init__(self, auto: bool = False) -> None:
        self._auto = auto

    def checked(self, instance: Any, value: Any) -> Any:
        if self._auto and isinstance(value, str):
            if value != "auto":
                raise ValueError(f'{self._name} must be an integer >= 1 or "auto", got {value!r}')
            return "auto"
        check_count(self._name, value, at_least=1)
        return value


class Fixed(Option):
    """What is read at construction: to set it later would go unnoticed, and is refused."""

    def checked(self, instance: Any, value: Any) -> Any:
        if self._name in instance.__dict__:
            kind = type(instance).__name__
            raise AttributeError(
                f"{self._name} is read at construction; setting it to {value!r} would have no "
                f"effect, so construct another {kind}({self._name}=...)"
            )
        return value
