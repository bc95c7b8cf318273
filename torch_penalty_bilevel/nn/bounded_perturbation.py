"""A perturbation of given inputs that stays within bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..constraints import Ball, Box, BoxAndBall
from . import checked


class BoundedPerturbation(nn.Module):
    r"""x + delta, with delta the parameter: poisons, adversarial and universal changes of data.

    .. math::
        low \le x + \delta \le high \text{ entry by entry}, \qquad
        \|\delta_i\|_2 \le radius \text{ for each row } i

    either, or both. Rows of delta that are not in the batch do not move.

    Give ``constraint`` to the optimizer of the level that delta is alone in (a constraint holds for
    every tensor of its level). The rule then steps along the set, which is not the same as a step
    of Adam that is projected afterwards (see ``torch_penalty_bilevel.constraints``). Elsewhere,
    in an ordinary loop, call ``project_()`` after each step.

    Args:
        inputs: x, (n, ...), floating point, in [low, high]. Kept as a buffer that moves with the
            module and is not in ``state_dict()``: that holds delta alone.
        low: least value of an entry, a number or a tensor that broadcasts to ``inputs``.
        high: largest value, likewise.
        radius: > 0, of the ball around each row, in units of the inputs.

    Shape:
        ``delta``, ``forward()``: (n, ...); ``forward(index)``: as ``inputs[index]``.

    Raises:
        ValueError, TypeError: no bound; inputs outside of theirs; as ``Box`` and ``Ball``.

    Example:
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> poisons = BoundedPerturbation(torch.tensor([[0.9, 0.5]]), low=0.0, high=1.0, radius=0.2)
        >>> v = torch.zeros(2, requires_grad=True)
        >>> optimizer = PenaltyBilevelOptimizer(
        ...     poisons.parameters(), [v], upper_lr=0.05, lower_lr=0.1,
        ...     upper_constraint=poisons.constraint,
        ... )
        >>> for _ in range(60):
        ...     loss = optimizer.step(
        ...         lambda: -v.sum(), lambda: (v - poisons().mean(0)).square().sum()
        ...     )
        >>> [round(x, 3) for x in poisons()[0].tolist()]  # 0.5 + sqrt(0.2^2 - 0.1^2)
        [1.0, 0.673]
    """

    inputs: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        inputs: Tensor,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        radius: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():  # pyright: ignore
            kind = getattr(inputs, "dtype", type(inputs).__name__)
            raise TypeError(f"inputs must be a floating-point tensor, got {kind}; scale images")
        inputs = inputs.detach().clone()
        low = _bound("low", -math.inf if low is None else low, inputs)
        high = _bound("high", math.inf if high is None else high, inputs)
        if not bool((low <= high).all()):  # also catches NaN
            raise ValueError(f"low must be at most high, both numbers, got {low=} and {high=}")
        if bool(inputs.isnan().any()):
            raise ValueError("inputs has NaN entries, which no bound holds for; replace them first")
        if not bool(((inputs >= low) & (inputs <= high)).all()):
            raise ValueError(
                "inputs must lie in [low, high] (delta = 0 is where it starts), got values from "
                f"{float(inputs.min()):.4g} to {float(inputs.max()):.4g}; clamp them first"
            )
        self._has_box = bool(low.isfinite().any()) or bool(high.isfinite().any())
        if not self._has_box and radius is None:
            raise ValueError("give low and high, radius, or all: without a bound delta is free")
        self.radius = radius
        for name, value in (("inputs", inputs), ("low", low), ("high", high)):
            self.register_buffer(name, value, persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(inputs))
        self.constraint.project(self.delta.detach())  # raises what is wrong with the rest

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The sum, or that of the rows with these numbers.

        Args:
            index: integers in [0, n) of any shape.

        Raises:
            TypeError: an index that is not made of integers, a mask, say.
            IndexError: integers outside of [0, n). On an accelerator its own assertion.
        """
        if index is None:
            return self.inputs + self.delta
        count = len(self.inputs)
        index = checked.numbers(index, count, self.inputs.device)
        with checked.within(count, "rows"):
            return self.inputs[index] + self.delta[index]

    @property
    def constraint(self) -> Box | Ball | BoxAndBall:
        """The set of delta, for ``upper_constraint=``; made of the inputs when asked for."""
        if not self._has_box:
            assert self.radius is not None
            return Ball(self.radius, rows=True)
        low, high = -_room(-self.inputs, -self.low), _room(self.inputs, self.high)
        if self.radius is None:
            return Box(low, high)
        return BoxAndBall(low, high, self.radius, rows=True)

    @torch.no_grad()
    def project_(self) -> None:
        """Delta to the nearest point of its set, of the box and the ball together."""
        self.delta.copy_(self.constraint.project(self.delta))

    def extra_repr(self) -> str:
        """The shape and the radius."""
        return f"{tuple(self.inputs.shape)}, radius={self.radius}"


def _bound(name: str, value: float | Tensor, inputs: Tensor) -> Tensor:
    bound = torch.as_tensor(value).detach().to(inputs)
    try:
        bound.expand_as(inputs)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(bound.shape)} does not broadcast to inputs of shape "
            f"{tuple(inputs.shape)}"
        ) from None
    return bound


def _room(inputs: Tensor, high: Tensor) -> Tensor:
    """High - x, less one unit in the last place where x and it would add up to more than high."""
    room = high - inputs
    return torch.where(inputs + room > high, torch.nextafter(room, torch.zeros_like(room)), room)
