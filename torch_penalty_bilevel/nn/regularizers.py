"""Learned strengths of any differentiable terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..arguments import checked_number
from . import checked

Term: TypeAlias = Callable[[tuple[Tensor, ...]], Tensor]
"""Of the tensors to be regularised, 0-d; differentiable twice."""

WIDTH = 1e-3
"""Below this size of a number (of the root mean square of a group) absolute values are rounded
off."""


def _wide(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def l1(tensors: tuple[Tensor, ...], width: float = WIDTH) -> Tensor:
    r"""Mean over all elements of :math:`\sqrt{p^2 + width^2} - width`, which is |p| but near 0."""
    total = _total((t.square() + width**2).sqrt().sum() - width * t.numel() for t in _wide(tensors))
    return total / _size(tensors)


def l2(tensors: tuple[Tensor, ...]) -> Tensor:
    """Mean over all elements of p^2 / 2."""
    return _total(t.square().sum() / 2 for t in _wide(tensors)) / _size(tensors)


def group(tensors: tuple[Tensor, ...], width: float = WIDTH) -> Tensor:
    r"""Group lasso over output units, the entries along the first dimension.

    Mean over all elements of the root mean square p of their unit, rounded off as in ``l1``:
    sum over units of :math:`m (\sqrt{\|p\|^2 / m + width^2} - width) / N`, m its elements. It sets
    units to zero as wholes.
    """

    def units(t: Tensor) -> Tensor:
        if not t.numel():  # units without entries have no mean
            return t.sum()
        squares = t.reshape(len(t), -1).square().mean(1)
        return ((squares + width**2).sqrt() - width).sum() * (t.numel() // max(len(t), 1))

    return _total(units(t.reshape(1) if t.dim() == 0 else t) for t in _wide(tensors)) / _size(
        tensors
    )


READY: Mapping[str, Term] = {"l1": l1, "l2": l2, "group": group}


class Regularizers(nn.Module):
    r"""The sum over terms k of :math:`e^{s_k}\, term_k`, with strengths that an upper level learns.

    The ready terms are means over the elements, of order one for weights of order one whatever
    the size of the model. A step of s changes a strength by a factor whatever the term's scale. So
    strengths need no learning rate of their own: Adam at 0.01 changes each by 1 % per step. A term
    of your own should be a mean too.

    Give tensors whose scale the loss sees: of weights before a normalisation layer it does not, so
    that g falls as they shrink and has no minimum (docs/symptoms.md, "g has no minimum").

    Args:
        terms: names of ready terms, ``"l1"`` (rounded off near 0, so that second derivatives
            exist), ``"l2"``, ``"group"`` (of output units); or a mapping from names to ready terms
            or callables, ``{"l2": "l2", "smooth": lambda tensors: ...}``, each of which gets
            the tuple of tensors and returns a 0-d tensor. Pickling needs callables with a name.
        initial: first strength e^s > 0 of each term.
        dtype: of the strengths; default: torch's.
        device: where they lie.

    Shape:
        ``log_strengths``: s, (terms,), in order; ``forward(tensors)``: 0-d.

    Raises:
        ValueError, TypeError: of a bad argument, naming it; a term that is not 0-d.

    Example:
        >>> regularizers = Regularizers(["l1", "l2"], initial=0.5)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, -1.0]]))
        >>> f"{regularizers(model.parameters()).item():.3f}"  # 0.5 * 4 / 2 + 0.5 * 10 / 4
        '2.250'
    """

    def __init__(
        self,
        terms: Iterable[str] | Mapping[str, str | Term],
        initial: float = 1e-3,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(terms, str):
            raise TypeError(f"terms must be a list of names or a mapping, got {terms!r}")
        given = list(terms.items() if isinstance(terms, Mapping) else ((n, n) for n in terms))
        self._terms = {name: _ready(term) for name, term in given}
        if not given or len(self._terms) < len(given):
            raise ValueError(f"terms must have one or more names, each once, got {terms!r}")
        must, remedy = "be a finite number > 0", "on the log scale no step leads away from 0"
        initial = checked_number("initial", initial, must, remedy)
        self.log_strengths = nn.Parameter(
            torch.full(
                (len(given),), math.log(initial), dtype=checked.floating(dtype), device=device
            )
        )
        check_strength(initial, self.log_strengths)

    def forward(self, tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """The sum.

        Args:
            tensors: what the terms are of: ``model.parameters()``, some weights, or a dict by name
                as ``torch.func.functional_call`` takes it. Leave biases out yourself.
        """
        if isinstance(tensors, Tensor):
            raise TypeError(
                f"tensors must be an iterable or a mapping of tensors, got one tensor of shape "
                f"{tuple(tensors.shape)}, whose rows would each count as one; give [tensor]"
            )
        values = tuple(tensors.values() if isinstance(tensors, Mapping) else tensors)
        if not values:
            raise ValueError("tensors is empty (an iterator that was used before?); give a list")
        if not _size(values):
            shapes = [tuple(t.shape) for t in values]
            raise ValueError(f"tensors must have elements, got shapes {shapes}, which have no mean")
        total = self.log_strengths.new_zeros(())
        for (name, term), strength in zip(
            self._terms.items(), self.log_strengths.exp(), strict=True
        ):
            value = term(values)
            if not isinstance(value, Tensor):  # pyright: ignore
                raise TypeError(
                    f"term {name!r} must return a 0-d tensor, got {value!r}, which has no gradient"
                )
            if value.dim():
                raise ValueError(
                    f"term {name!r} must return a 0-d tensor, got shape {tuple(value.shape)}; take "
                    "its mean"
                )
            total = total + strength * value.to(total.device)
        return total

    def strengths(self) -> dict[str, Tensor]:
        """e^s by name, 0-d each."""
        return dict(zip(self._terms, self.log_strengths.exp(), strict=True))

    def extra_repr(self) -> str:
        """The names of the terms."""
        return f"{list(self._terms)}"


def check_strength(initial: float, log_strengths: Tensor) -> None:
    """Raise if e^s is no longer the number, but 0 or infinite, in the precision of s."""
    strengths = log_strengths.detach().exp()
    if not bool((strengths.isfinite() & (strengths > 0)).all()):
        raise ValueError(
            f"initial={initial!r} is {float(strengths[0])} as {strengths.dtype}; give a number "
            "that it holds"
        )


def _ready(term: Any) -> Term:
    if isinstance(term, str) and term in READY:
        return READY[term]
    if callable(term):
        return cast(Term, term)
    raise ValueError(f"a term must be one of {sorted(READY)} or a callable, got {term!r}")


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first + part.to(first.device)
    return first


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() for t in tensors)
