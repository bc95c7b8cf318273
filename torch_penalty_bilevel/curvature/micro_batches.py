r"""A loss that is the mean of several, taken one after the other: the graph of one lives at a time.

.. math::
    g = \tfrac1N\sum_i g_i, \qquad r = \tfrac1N\sum_i \nabla_v g_i, \qquad
    q = \nu + \gamma r, \qquad H q = \tfrac1N\sum_i H_i q

q is not linear in the data, so r has to be complete before any product is taken: a pass over the
parts makes r, each graph freed before the next, and a second one the product, with the random
numbers of the first. Averaging what each part's own r_i gives would penalise ||r_i||^2, the noise
of the parts. A finite difference takes two passes in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors, filled, sum_of
from ..undo.random_state import RandomState
from ..undo.repeats import check_gradient_repeats
from .protocol import Linearised, Loss

Terms: TypeAlias = Callable[[Tensors, Tensors, Tensor], Sequence[Tensor]]
"""(upper, lower, value of the loss) -> what is to be added to it, 0-d each."""

NEEDS_REPETITION = (
    "Micro-batches are evaluated twice, all of them for grad_v g before the first for its product: "
    "draw the batches outside the closures"
)


class MeanLoss:
    """The mean of ``parts``, losses or maps, which are always evaluated in their order.

    An engine that knows nothing of it may call it like any loss, and has one graph of all parts.
    """

    def __init__(self, parts: Sequence[Loss]) -> None:
        self.parts = tuple(parts)

    def __call__(self, upper: Tensors, lower: Tensors) -> Any:
        values: list[Any] = [part(upper, lower) for part in self.parts]
        if isinstance(values[0], Tensor):
            return _mean(values)
        return tuple(map(_mean, zip(*values, strict=True)))

    def plus(self, terms: Terms) -> MeanLoss:
        """With terms that are evaluated once, by the last part and N times as large."""
        count, seen = len(self.parts), list[Tensor]()

        def noted(part: Loss) -> Loss:
            def value_of_part(upper: Tensors, lower: Tensors) -> Tensor:
                value = part(upper, lower)
                seen.append(bare(value))
                return value

            return value_of_part

        *others, final = map(noted, self.parts)

        def last(upper: Tensors, lower: Tensors) -> Tensor:
            value = final(upper, lower)
            plain = _mean(seen[-count:])
            seen.clear()
            with torch.enable_grad():
                return sum((count * t for t in terms(upper, lower, plain)), value)

        return MeanLoss([*others, last])


def parts_of(loss: Any) -> tuple[Any, ...]:
    """The losses whose mean ``loss`` is, in order; most are their own."""
    return loss.parts if isinstance(loss, MeanLoss) else (loss,)


def each(wrap: Callable[[Loss], Loss], loss: Loss) -> Loss:
    """``wrap(loss)``, part by part."""
    if isinstance(loss, MeanLoss):
        return MeanLoss([wrap(part) for part in loss.parts])
    return wrap(loss)


def plus(loss: Loss, terms: Terms) -> Loss:
    """``loss`` with the terms added one after the other."""
    if isinstance(loss, MeanLoss):
        return loss.plus(terms)

    def total(upper: Tensors, lower: Tensors) -> Tensor:
        value = loss(upper, lower)
        with torch.enable_grad():
            return sum(terms(upper, lower, value), value)

    return total


def bare(value: Tensor) -> Tensor:
    """The numbers alone, also of a tensor inside ``torch.func.grad``."""
    value = value.detach()
    if hasattr(torch.func, "debug_unwrap"):
        return torch.func.debug_unwrap(value, recurse=True)
    wrappers: Any = torch._C  # torch 2.6 has no public name for it
    while wrappers._functorch.is_functorch_wrapped_tensor(value):
        value = wrappers._functorch.get_unwrapped(value)
    return value


def value_of(loss: Loss, at: Pair) -> Tensor:
    """The detached value, without more than the graph of one part."""
    values = [part(*at).detach() for part in parts_of(loss)]
    return values[0] if len(values) == 1 else _mean(values)


def mean_gradient(
    one: Callable[[Loss], tuple[Tensor, OptionalPair]], loss: Loss
) -> tuple[Tensor, OptionalPair]:
    """What ``one`` says of the loss, or of each part, averaged in place."""
    if not isinstance(loss, MeanLoss):
        return one(loss)
    mean = _Mean(len(loss.parts))
    for part in loss.parts:
        mean.take(*one(part))
    return mean.result()


class TwoPasses:
    """A mean linearised, for engines whose products need a graph of r."""

    def __init__(self) -> None:
        self._repeats = False

    def linearised(
        self,
        first: Callable[[Any], tuple[Tensor, OptionalTensors]],
        again: Callable[[Any], Linearised],
        loss: MeanLoss,
        at: Pair,
        half_square: Callable[[Tensors], Tensor] | None = None,
    ) -> Linearised:
        """The residual r from one pass over the parts, each product from another.

        Args:
            first: the value of a part and its r_i, without a graph.
            again: a part linearised; its graph is freed before the next is made.
            loss: their mean.
            at: (u, v).
            half_square: of a map, whose loss is ||r||^2 / 2 of the mean r.

        Raises:
            NondeterministicClosureError: parts return something else when called again; asked once.
        """
        random = RandomState(t.device for t in (*at.upper, *at.lower))

        def one(part: Loss) -> tuple[Tensor, OptionalPair]:
            value, residual = first(part)
            return value, OptionalPair((), residual)

        def passed() -> tuple[Tensor, OptionalPair]:
            value, pair = mean_gradient(one, loss)
            residual = filled(pair.lower, at.lower)
            return half_square(residual) if half_square else value, OptionalPair((), residual)

        def replayed(take: Callable[[Linearised], OptionalPair]) -> OptionalPair:
            def taken(part: Loss) -> tuple[Tensor, OptionalPair]:
                made = again(part)
                return made.loss, take(made)

            with random.replayed():
                return mean_gradient(taken, loss)[1]

        def product(direction: Tensors) -> OptionalPair:
            return replayed(lambda made: made.product(direction))

        def transposed(direction: Tensors) -> Tensors:
            def pushed(made: Linearised) -> OptionalPair:
                assert made.transposed is not None
                return OptionalPair((), made.transposed(direction))

            return filled(replayed(pushed).lower, at.lower)

        value, residual = here = passed()
        if not self._repeats:
            with random.replayed():
                check_gradient_repeats(here, passed(), NEEDS_REPETITION)
            self._repeats = True
        backwards = transposed if half_square else None
        return Linearised(value, filled(residual.lower, at.lower), product, backwards, again=1)


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Of tensors shaped alike, summed in at least float32 where the first lies."""
    first = values[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    total = sum((v.to(first.device, wide) for v in values[1:]), first.to(wide))
    return (total / len(values)).to(first.dtype)


class _Mean:
    """A mean under way: a value and a vector of both levels, in at least float32."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: list[Tensor] = []
        self._sums: list[list[Tensor | None]] = []
        self._dtypes: dict[tuple[int, int], torch.dtype] = {}

    def take(self, value: Tensor, pair: OptionalPair) -> None:
        self._values.append(value)
        self._sums = self._sums or [[None] * len(level) for level in pair]
        for i, level in enumerate(pair):
            for j, part in enumerate(level):
                if part is not None:
                    self._dtypes[i, j] = part.dtype
                    self._sums[i][j] = _added(self._sums[i][j], part, 1 / self._count)

    def result(self) -> tuple[Tensor, OptionalPair]:
        upper, lower = (
            tuple(None if t is None else t.to(self._dtypes[i, j]) for j, t in enumerate(level))
            for i, level in enumerate(self._sums)
        )
        return _mean(self._values), OptionalPair(upper, lower)


def _added(total: Tensor | None, part: Tensor, share: float) -> Tensor:
    """``total + share * part``, in place where both are dense."""
    wide = torch.promote_types(part.dtype, torch.float32)
    if total is None:
        return part.to(wide) * share  # new: what autograd returns may be a view or a constant
    if torch.strided == part.layout == total.layout:
        return total.add_(part, alpha=share)
    return sum_of(total, part.to(wide) * share)
