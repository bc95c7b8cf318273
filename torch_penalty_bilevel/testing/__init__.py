"""Bilevel problems with known solutions, to test a method or to break one.

Example:
    >>> import torch
    >>> from torch_penalty_bilevel import testing
    >>> problem = testing.get("quadratic", kappa=1000.0)
    >>> u, v = problem.start(torch.Generator().manual_seed(0))
    >>> bool(problem.error(u, v) > 0.1), bool(problem.error(*problem.solution()) < 1e-12)
    (True, True)
    >>> [p.name for p in testing.problems("singular", "synthetic")]
    ['smd22', 'smd23', 'smd24']
"""

from __future__ import annotations

from collections.abc import Callable

from . import constrained, degenerate, equilibria, jumps, library, smooth, synthetic
from .protocol import TAGS as TAGS
from .protocol import Problem as Problem

__all__ = ["TAGS", "Problem", "get", "names", "problems"]

_PROBLEMS: dict[str, Callable[..., Problem]] = {
    **smooth.PROBLEMS,
    **equilibria.PROBLEMS,
    **degenerate.PROBLEMS,
    **constrained.PROBLEMS,
    **library.PROBLEMS,
    **jumps.PROBLEMS,
    **synthetic.PROBLEMS,
}


def names() -> tuple[str, ...]:
    """The names that ``get`` knows.

    Example:
        >>> names()[:2]
        ('quadratic', 'scalar_ridge')
    """
    return tuple(_PROBLEMS)


def get(name: str, **options: float) -> Problem:
    """The problem of that name.

    Args:
        name: one of ``names()``.
        options: what the problem's function in this package takes, such as ``kappa`` (condition
            number of the lower level), sizes and ``seed``.

    Raises:
        ValueError: no such problem.
        TypeError: the problem has no such option.

    Example:
        >>> get("minimax", n_lower=2).solution()[1].shape
        torch.Size([2])
    """
    if name not in _PROBLEMS:
        raise ValueError(f"name must be one of {sorted(_PROBLEMS)}, got {name!r}")
    return _PROBLEMS[name](**options)


def problems(*tags: str) -> tuple[Problem, ...]:
    """All problems that carry all of ``tags`` (see ``TAGS``), with their default options.

    Raises:
        ValueError: no such tag.

    Example:
        >>> [p.name for p in problems("many_solutions", "library")]
        ['mb_2007_16', 'mb_2007_17']
    """
    unknown = set(tags) - TAGS.keys()
    if unknown:
        raise ValueError(f"unknown tags {sorted(unknown)}; known ones are {sorted(TAGS)}")
    everything = (make() for make in _PROBLEMS.values())
    return tuple(p for p in everything if p.tags >= set(tags))
