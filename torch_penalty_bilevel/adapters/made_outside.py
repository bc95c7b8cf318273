"""Tensors that closures use and do not compute: right until what they come from moves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..curvature import autograd_graph as graph
from ..levels import Level, named
from ..tensors import local

_Point: TypeAlias = dict[int, tuple[str, float, float]]
"""Name, sum and norm of each parameter, by its id: versions say nothing under fused rules."""


class MadeOutside:
    """Refuses losses with an old graph: w = u.sigmoid() before the loop, read in a closure.

    In the first steps each node of the losses' graphs is marked with where the parameters were. A
    node that comes again, and leads to a parameter that has moved since, belongs to a tensor that
    nobody has computed anew. (A view of a parameter has its values, and a new node when they
    change.)
    """

    _POINTS = 3
    """Calls at which to look, and then different u: at the second an old graph shows."""
    _CALLS = 100
    """After which u is not waited for."""

    def __init__(self) -> None:
        self._here: _Point = {}
        self._looks = False
        self._points = self._calls = 0

    def begin(self, upper: Optimizer, lower: Optimizer, are_new: bool) -> None:
        """A call begins, ``are_new``: of closures that nobody has looked at."""
        if are_new:
            self._points = self._calls = 0
        self._calls += 1
        self._looks = self._points < self._POINTS and self._calls <= self._CALLS
        if not self._looks:
            self._here = {}
            return
        before, self._here = self._here, _point(upper, "upper") | _point(lower, "lower")
        moved = any(self._here[id(p)] != before.get(id(p)) for _, p in named(upper, "upper"))
        self._points += moved
        self._looks = moved or self._calls <= self._POINTS

    def look(self, value: Any, level: Level) -> None:
        """At what a closure of ``level`` returned; raises ``ValueError`` if part of it is old."""
        if not self._looks:
            return
        outputs: Sequence[Tensor] = [value] if isinstance(value, Tensor) else value
        for node in graph.nodes(*outputs):
            if hasattr(node, "variable"):  # a parameter's own, which stays
                continue
            then: _Point = node.metadata.setdefault(self, self._here)
            if then is not self._here and (name := self._moved_behind(node, then)):
                operation = re.sub(r"Backward\d*$", "", node.name())
                raise ValueError(
                    f"{level}_closure uses a tensor that was computed outside of the closure (its "
                    f"last operation is {operation}) from parameter {name!r}, which has moved "
                    "since: w = u.sigmoid() before the loop keeps the values of the first u. "
                    "Compute it inside the closure"
                )

    def _moved_behind(self, node: Any, then: _Point) -> str | None:
        """Name of a parameter that ``node`` leads to and that is not where it was ``then``."""
        for leaf in graph.leaves(node):
            here = self._here.get(id(leaf))
            if here is not None and then.get(id(leaf), here) != here:
                return here[0]
        return None


def _point(rule: Optimizer, level: Level) -> _Point:
    pairs = named(rule, level)
    with torch.no_grad():
        held = [local(p) for _, p in pairs]
        sizes = [size for p in held for size in (_sum(p), torch.linalg.vector_norm(p))]
        # One wait for the device.
        numbers = torch.stack([size.to(sizes[0].device) for size in sizes]).tolist()
    known = [0.0 if math.isnan(number) else number for number in numbers]  # NaN is not itself
    both = zip(pairs, known[::2], known[1::2], strict=True)
    return {id(p): (name, total, size) for (name, p), total, size in both}


def _sum(tensor: Tensor) -> Tensor:
    has_double = tensor.device.type in ("cpu", "cuda")
    return tensor.sum(dtype=torch.float64 if has_double else None)
