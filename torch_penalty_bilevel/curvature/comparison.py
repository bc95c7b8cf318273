"""What a second-order product costs by either engine, and whether both agree on it."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.grad_mode import (
    _unsafe_preserve_version_counter,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors, norm, sum_of_present
from ..undo.random_state import RandomState
from .finite_difference import FiniteDifference
from .protocol import Loss

_CHEAPER = 2.0
_CLOSE = 1e-2
_WRONG = 5e-2
# Of the default relative step. Rounding sets the best step of MLPs, truncation that of deeper
# networks (attention, LSTM, CNN).
_TIMES = (0.3, 1.0, 3.0)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write inside the block, views excepted.

    Of a compiled function it sees the kernels that go through torch's dispatcher, not the fused.
    """

    # torch asks for this before it lets operators that take functions (flex attention) through.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Dynamo gives up, for good, every function that it meets under another kind of mode.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            touched = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in touched)
        return result


class Evidence(NamedTuple):
    """Double backward against finite differences, at one point and along one direction."""

    traffic: float
    """Bytes moved by double backward over those of a difference, r included in both."""
    disagreement: float
    """The larger of the two ||difference - exact||_2 / ||exact||_2, for J q and H q, at the best
    of three relative steps."""
    spread: float
    """The same of two differences with neighbouring steps, the closest pair."""

    @property
    def favours_differences(self) -> bool:
        """Half the memory traffic, and products within one per cent.

        Traffic predicts time where FLOPs do not: double backward takes fused kernels (LSTM
        cells, normalisations, GELU) apart into elementwise operations. On one core a ratio under 2
        meant 0.9 to 1.7 times the time of a difference, above 2 it meant 1.6 to 4.7. Unlike time it
        is the same in every run, so runs repeat.
        """
        return self.traffic > _CHEAPER and self.disagreement < _CLOSE

    @property
    def refutes_double_backward(self) -> bool:
        """Differences agree among themselves ten times better than with double backward.

        Neither error of a difference can do that: truncation grows and rounding falls with the
        step, so each separates neighbouring steps by more than the better of them is off.
        """
        return self.disagreement > _WRONG and self.spread < 0.1 * self.disagreement

    def __str__(self) -> str:
        return (
            f"double backward moves {self.traffic:.1f} times the bytes of a finite difference, "
            f"which errs by {self.disagreement:.1g}"
        )


def is_comparable(at: Pair) -> bool:
    """Is the lower level in plain float32 or float64, on one worker?

    With 16 bits a difference is noise, and workers would have to agree on the choice.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    wide = (torch.float32, torch.float64)
    plain = all(v.dtype in wide and v.layout == torch.strided for v in at.lower)
    devices = {v.device.type for v in at.lower}
    return plain and not distributed and not any(map(torch.is_autocast_enabled, devices))


def weigh(
    differences: FiniteDifference,
    loss: Loss,
    at: Pair,
    direction: Tensors,
    exact: OptionalPair,
    moved: int,
    random: RandomState,
) -> Evidence:
    """Take the same product by finite differences and compare.

    Args:
        differences: the engine that would be used, which has noted how g is computed; left with
            the best of a few relative steps.
        loss: g.
        at: (u, v).
        direction: q, not zero.
        exact: (J q, H q) by double backward, whose graph may be used afterwards.
        moved: bytes that r and ``exact`` took.
        random: the generators as they were when ``exact`` was found.

    Raises:
        NondeterministicClosureError: the closure returns something else when called again.
    """
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        # v is put back bit by bit, so graphs that hold it stay right: autograd need not know. (A
        # dispatch mode hides it in torch 2.13, which is no promise.)
        for parameter in at.lower:
            stack.enter_context(_unsafe_preserve_version_counter(parameter))
        found = _products(differences, loss, at, direction, random, traffic)
    errors = {step: _error_of(product, exact) for step, product in found.items()}
    closest, spread = _closest(found)
    # The gradient at the shifted point costs what r does.
    by_differences = 2 * traffic.bytes / len(found)
    evidence = Evidence(moved / max(by_differences, 1), min(errors.values()), spread)
    best = min(errors, key=lambda step: errors[step])
    differences.relative_step = closest if evidence.refutes_double_backward else best
    return evidence


def steadied(
    differences: FiniteDifference, loss: Loss, at: Pair, direction: Tensors, random: RandomState
) -> float:
    """How far products with neighbouring relative steps are apart, the closest pair.

    For differences that nothing exact can be compared with; ``differences`` is left with the
    smaller step of that pair. Kinks keep all of them apart.

    Args:
        differences: the engine in use.
        loss: g.
        at: (u, v).
        direction: q, not zero.
        random: the generators as they were when r was found.
    """
    step, spread = _closest(_products(differences, loss, at, direction, random))
    differences.relative_step = step
    return spread


def _products(
    differences: FiniteDifference,
    loss: Loss,
    at: Pair,
    direction: Tensors,
    random: RandomState,
    traffic: Traffic | None = None,
) -> dict[float, OptionalPair]:
    """(J q, H q) for each relative step, in increasing order."""
    found: dict[float, OptionalPair] = {}
    default = differences.usual_step(at.lower)
    for differences.relative_step in (times * default for times in _TIMES):
        with random.replayed():
            linearised = differences.linearise(loss, at)
            with traffic or contextlib.nullcontext():
                found[differences.relative_step] = linearised.product(direction)
    return found


def _closest(found: dict[float, OptionalPair]) -> tuple[float, float]:
    """Of neighbouring steps, the smaller of the pair that differs least, and by how much."""
    steps = list(found)
    gaps = {
        small: _error_of(found[small], found[large]) for small, large in itertools.pairwise(steps)
    }
    return min(gaps.items(), key=lambda item: item[1])


def _error_of(found: OptionalPair, exact: OptionalPair) -> float:
    return max(_error(found.upper, exact.upper), _error(found.lower, exact.lower))


def _error(found: OptionalTensors, exact: OptionalTensors) -> float:
    """||found - exact|| / ||exact||; infinite where that is not a number, but 0 / 0 is 0."""
    pairs = zip(found, exact, strict=True)
    gaps = (sum_of_present(a, None if b is None else -b) for a, b in pairs)
    gap, length = (
        float(norm([t for t in tensors if t is not None])) for tensors in (list(gaps), exact)
    )
    if gap == 0:
        return 0.0
    return gap / length if length > 0 and math.isfinite(gap) else math.inf
