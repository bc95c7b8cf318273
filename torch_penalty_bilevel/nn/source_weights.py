"""One weight per source of data, together a distribution that cannot collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..arguments import check_count, is_number
from . import checked

_NEWTON = 32
"""Steps at most: the distance to a root near the uniform distribution halves, elsewhere it
squares."""


class SourceWeights(nn.Module):
    r"""Weights of sources (domains, annotators, data sets) on the simplex, from ``logits``.

    .. math::
        p = \text{softmax}(\text{logits}), \qquad w = (1 - s)\,p + s / K, \qquad
        H(w) = -\sum_k w_k \log w_k \ge \text{entropy\_floor}

    with the least share s in [0, 1) of the uniform distribution that reaches the floor. H(w) is
    concave in s and greatest at s = 1, so s is unique. It depends on p; derivatives go through it
    by the implicit function theorem, exact to the third. Where H(p) is the floor itself there is a
    kink, and the derivatives of s = 0 are given. A share is at least one unit of rounding, so that
    floors of less (1e-6 nats in float32) are exceeded.

    With no floor a softmax may put everything on one source, from where its gradient does not come
    back. exp(H) counts the sources in use: a floor of log(2) keeps about two.

    Args:
        count: K >= 2, the number of sources.
        entropy_floor: in nats, 0 <= floor < log(K); reached up to rounding.
        dtype: of the logits; default: torch's.
        device: where they lie.

    Shape:
        ``logits``, ``forward()``: (K,); ``forward(index)``: as index.

    Raises:
        ValueError, TypeError: of a bad argument, naming it.

    Example:
        >>> weights = SourceWeights(3, entropy_floor=0.5)
        >>> with torch.no_grad():
        ...     weights.logits[0] = 50.0  # all on one
        >>> w = weights()
        >>> bool(w[0] > 0.8), f"{-(w * w.log()).sum().item():.3f}"
        (True, '0.500')
        >>> weights(torch.tensor([0, 2])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        count: int,
        entropy_floor: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_count("count", count, at_least=2)
        if not is_number(entropy_floor) or not 0 <= entropy_floor < math.log(count):
            raise ValueError(
                f"entropy_floor must lie in [0, log(count)) = [0, {math.log(count):.4g}) nats, got "
                f"{entropy_floor!r}; at log(count) only equal weights are left"
            )
        self.entropy_floor = float(entropy_floor)
        self.logits = nn.Parameter(torch.zeros(count, dtype=checked.floating(dtype), device=device))

    def forward(self, index: Tensor | None = None) -> Tensor:
        """w, or the weights of the sources with these numbers (one for each sample, say).

        Args:
            index: integers in [0, K) of any shape.

        Raises:
            TypeError: an index that is not made of integers, a mask, say.
            IndexError: integers outside of [0, K). On an accelerator its own assertion.
        """
        p = self.logits.softmax(0)
        weights = self._mixed(p) if self.entropy_floor else p
        if index is None:
            return weights
        with checked.within(len(p), "sources"):
            return weights[checked.numbers(index, len(p), p.device)]

    def _mixed(self, p: Tensor) -> Tensor:
        """P with the least share of the uniform distribution."""
        wide = p.to(torch.promote_types(p.dtype, torch.float32))
        floor = max(self.entropy_floor, torch.finfo(wide.dtype).tiny)  # less would compare as 0
        below = torch.special.entr(wide.detach()).sum() < floor
        # Where p needs no share there may be no root: there another distribution takes its place.
        corner = torch.zeros_like(wide.detach())
        corner[0] = 1.0
        poor = torch.where(below, wide, corner)
        share = self._share(poor)
        return torch.where(below, _blend(poor, share), wide).to(p.dtype)

    def _share(self, p: Tensor) -> Tensor:
        """S with H((1 - s) p + s / K) = floor.

        Newton's method from the left, where the tangent of a concave function lies above it: it
        never goes past the root. Two more steps, differentiated with s held before them, have the
        derivatives of the root up to the third, since each doubles the order to which s(p) is met.
        """
        with torch.no_grad():
            share = torch.full_like(p[0], torch.finfo(p.dtype).eps)
            for _ in range(_NEWTON):
                share = self._nearer(p.detach(), share)
        return self._nearer(p, self._nearer(p, share.detach()))

    def _nearer(self, p: Tensor, share: Tensor) -> Tensor:
        w = _blend(p, share)
        log = w.log()
        nearer = share + (self.entropy_floor + w @ log) / ((p - 1 / len(p)) @ log)
        # Steps from one unit of rounding to a root below it (a tiny floor, or p that all but
        # reaches it) go past that: the logarithm of a share below 0 would be NaN.
        return nearer.clamp(min=torch.finfo(p.dtype).eps)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{len(self.logits)}, entropy_floor={self.entropy_floor:g}"


def _blend(p: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(p, torch.full_like(p, 1 / len(p)), share)
