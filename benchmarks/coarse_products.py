"""How far a difference of 16-bit gradients is from the product that it stands for.

    python -m benchmarks.coarse_products
    python -m benchmarks.coarse_products --training 1 --kinds mlp

Weights are float32, the forward pass is under autocast. Told is ||product - exact|| / ||exact|| of
H q and of J q, exact by double backward in float32, for three directions q: the gradient of g,
noise, and a multiplier for f = g (30 steps of Richardson's iteration). "double" is double
backward under the same autocast, "default" the difference as it comes, then differences of other
relative steps h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.speed.problems import Transformer, convolutional, mlp
from examples.shared import command
from torch_penalty_bilevel.curvature import Curvature, DoubleBackward, FiniteDifference
from torch_penalty_bilevel.tensors import OptionalPair, Pair, Tensors, axpy, filled, norm, scale

KINDS = ("mlp", "cnn", "transformer")
STEPS = {
    torch.bfloat16: (2e-3, 4e-3, 7e-3, 1e-2, 2e-2, 6e-2),
    torch.float16: (1e-3, 2e-3, 4e-3, 1e-2, 3e-2),
}
Loss = Callable[[Tensors, Tensors], Tensor]


class Case:
    """A network after a few steps of training, and one weight per sample."""

    def __init__(self, kind: str, training: int) -> None:
        torch.manual_seed(0)
        if kind == "mlp":
            self.model, self.x = mlp(64, 64), torch.randn(64, 64)
        elif kind == "cnn":
            self.model, self.x = convolutional(8), torch.randn(16, 3, 8, 8)
        else:
            self.model = Transformer(width=32, length=16, math=True)
            self.x = torch.randint(0, Transformer.VOCABULARY, (16, 16))
        self.y = torch.randint(0, 10, (len(self.x),))
        u = torch.zeros(len(self.x), requires_grad=True)
        self.at = Pair((u,), tuple(self.model.parameters()))
        rule = torch.optim.Adam(self.at.lower, lr=3e-3)
        for _ in range(training):
            rule.zero_grad()
            cross_entropy(self.model(self.x), self.y).backward()
            rule.step()

    def loss(self, dtype: torch.dtype | None = None) -> Loss:
        def g(*_: Tensors) -> Tensor:
            torch.clear_autocast_cache()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = self.model(self.x).float()
            losses = cross_entropy(outputs, self.y, reduction="none")
            return (self.at.upper[0].sigmoid() * losses).mean()

        return g

    def product(
        self, engine: Curvature, direction: Tensors, dtype: torch.dtype | None = None
    ) -> OptionalPair:
        return engine.linearise(self.loss(dtype), self.at).product(direction)

    def exact(self, direction: Tensors) -> Tensors:
        return filled(self.product(DoubleBackward(), direction).lower, self.at.lower)

    def directions(self) -> dict[str, Tensors]:
        slope = DoubleBackward().linearise(self.loss(), self.at).residual
        stiff = slope
        for _ in range(8):
            stiff = self.exact(scale(stiff, 1 / float(norm(stiff))))
        adjoint = scale(slope, 0.0)
        for _ in range(30):
            residual = axpy(1.0, self.exact(adjoint), slope)
            adjoint = axpy(-1 / float(norm(stiff)), residual, adjoint)
        noise = tuple(torch.randn_like(v) for v in self.at.lower)
        return {"gradient": slope, "noise": noise, "multiplier": adjoint}


def error(found: OptionalPair, exact: OptionalPair) -> str:
    shares: list[str] = []
    for one, other in ((found.lower, exact.lower), (found.upper, exact.upper)):
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
        gap = norm([a - b for a, b in pairs])
        shares.append(f"{float(gap / norm([b for _, b in pairs])):.2g}")
    return " / ".join(shares)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--training", type=int, default=20, help="steps before the comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype, steps in STEPS.items():
        print(f"\n{dtype}: H q / J q\n")
        print("| q | double | default |", " | ".join(f"h = {step:g}" for step in steps), "|")
        print("|---" * (len(steps) + 3) + "|")
        for kind in options.kinds:
            case = Case(kind, options.training)
            for name, direction in case.directions().items():
                exact = case.product(DoubleBackward(), direction)
                engines = DoubleBackward(), FiniteDifference(), *map(FiniteDifference, steps)
                found = [error(case.product(e, direction, dtype), exact) for e in engines]
                print(f"| {kind}, {name} |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    main()
