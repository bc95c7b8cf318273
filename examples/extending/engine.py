"""An engine of one's own: J and H as matrices, for a small v and many products.

    python -m examples.extending.engine

An engine takes first derivatives and linearises the lower loss. ``Curvature`` has a default for
everything else; one with a memory also offers ``packed`` and ``unpack``, and is then checkpointed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_penalty_bilevel import HypergradientOptimizer
from torch_penalty_bilevel.curvature import Curvature, Linearised, Loss
from torch_penalty_bilevel.tensors import OptionalPair, Pair, Tensors


class Dense(Curvature):
    """Row i of (J' H): the derivatives of entry i of r = grad_v g."""

    name = "dense"

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        value, n = loss(*at), len(at.upper)
        parts = torch.autograd.grad(value, (*at.upper, *at.lower), allow_unused=True)
        return value.detach(), OptionalPair(parts[:n], parts[n:])

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        value = loss(*at)
        residual = torch.autograd.grad(value, at.lower, create_graph=True, materialize_grads=True)
        entries = torch.cat([r.reshape(-1) for r in residual])
        both = (*at.upper, *at.lower)
        rows = [
            torch.autograd.grad(r, both, retain_graph=True, materialize_grads=True) for r in entries
        ]
        blocks = [torch.stack(column) for column in zip(*rows, strict=True)]

        def product(direction: Tensors) -> OptionalPair:
            q = torch.cat([d.reshape(-1) for d in direction])
            parts = tuple(torch.tensordot(q, block, 1) for block in blocks)
            return OptionalPair(parts[: len(at.upper)], parts[len(at.upper) :])

        return Linearised(value.detach(), tuple(r.detach() for r in residual), product)


def main() -> None:
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    b = torch.tensor([1.0, -2.0])
    optimizer = HypergradientOptimizer(
        [u], [v], curvature=Dense(), upper_lr=0.01, lower_lr=0.05, lower_steps=5
    )
    for _ in range(1000):
        optimizer.step(lambda: (v - b).square().sum(), lambda: (v - u).square().sum())
    print(f"u = {u.tolist()}, should be {b.tolist()}")


if __name__ == "__main__":
    main()
