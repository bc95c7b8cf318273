"""What the multiplier's correction costs against the size of v: time of a step, and memory.

    python -m benchmarks.speed.correction
    python -m benchmarks.speed.correction --device cuda --sizes 1e5 1e6 1e7 1e8 --batch 512

v: a network of three equal layers with about so many numbers; u: one weight per sample of a batch
that stays the same, so that the correction is at work. Steps with ``LeastSquares(subspace=True)``
and ``False`` in turn: the median of the ratios of neighbours (quartiles). Memory: what the state
holds more, in copies of v. "gain" is the correction's, at the end. Seconds are CPU time, on CUDA
time between synchronisations.

A correction that halves the number of lower steps pays where the ratio is below 2; the limit of
``LeastSquares(subspace=None)`` rests on this table and on the memory.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.shared import command
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

CLASSES = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(size: float) -> tuple[nn.Sequential, int]:
    """About ``size`` numbers, and the width."""
    width = max(8, round(math.sqrt(size / 3)))
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.Linear(width, CLASSES)), width


class Run:
    """One optimizer on one network and one batch."""

    def __init__(
        self, size: float, batch: int, device: str, autocast: torch.dtype, subspace: bool
    ) -> None:
        torch.manual_seed(0)
        model, width = network(size)
        self.model = model.to(device)
        self.noisy, self.clean = (torch.randn(batch, width, device=device) for _ in range(2))
        self.labels = torch.randint(CLASSES, (2, batch), device=device)
        self.logits = torch.zeros(batch, device=device, requires_grad=True)
        self.computed = torch.autocast(device, autocast, enabled=autocast != torch.float32)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.logits],
            list(model.parameters()),
            upper_lr=1e-2,
            lower_lr=1e-4,
            penalty=Stationarity(LeastSquares(subspace=subspace)),
            curvature="double_backward",
        )

    def upper(self) -> Tensor:
        with self.computed:
            return cross_entropy(self.model(self.clean), self.labels[1])

    def lower(self) -> Tensor:
        with self.computed:
            losses = cross_entropy(self.model(self.noisy), self.labels[0], reduction="none")
        decay = sum(p.square().sum() for p in self.model.parameters())
        return (self.logits.sigmoid() * losses).mean() + 5e-3 * decay

    def step(self) -> None:
        self.optimizer.step(self.upper, self.lower)

    def held(self) -> int:
        """Numbers in the dual state."""
        dual = self.optimizer._dual
        return sum(t.numel() for name in dual.lists() for t in getattr(dual, name))


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=DTYPES, default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| numbers in v | ms without | ratio, median (quartiles) | copies of v more | gain |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        rest = options.batch, options.device, DTYPES[options.autocast]
        plain, corrected = (Run(size, *rest, subspace) for subspace in (False, True))
        for _ in range(10):  # probes of the curvature in all of them
            plain.step()
            corrected.step()
        pairs = [
            (seconds(plain.step, options.device), seconds(corrected.step, options.device))
            for _ in tqdm(range(options.rounds), desc=f"{size:.0e}", leave=False)
        ]
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        numbers = sum(t.numel() for t in corrected.optimizer.adjoint)
        copies = (corrected.held() - plain.held()) / numbers
        gain = float(corrected.optimizer.metrics.correction_gain)
        print(
            f"| {numbers:.1e} | {1e3 * statistics.median(a for a, _ in pairs):.2f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {copies:.0f} | {gain:.2f} |",
            flush=True,
        )
    where = command.machine(options.device)
    print(f"\n{options.rounds} rounds, batch {options.batch}, {options.autocast}; {where}")


if __name__ == "__main__":
    main()
