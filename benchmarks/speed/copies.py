"""Peak memory of one step by finite differences, in copies of v and over plain training with AdamW.

    python -m benchmarks.speed.copies
    python -m benchmarks.speed.copies --kinds transformer LSTM

From the events of the allocator, parameters and data included. With the correction of the
multiplier, which keeps four vectors like v (the default up to 10 million numbers in v), and without
(``LeastSquares(subspace=False)``, the default above): steps 2 and 3, which probe the curvature.
With a new random batch in every step the correction rests after 20, but for 10 steps in 100: there
steps 41 and 42.
"""

from __future__ import annotations

import torch

from benchmarks.speed import methods, metrics, problems
from examples.shared import command
from torch_penalty_bilevel import LeastSquares, Stationarity

RESTS = 40  # steps of new batches after which the correction rests


def peak(kind: str, subspace: bool | None, new_batches: bool = False) -> int:
    """In bytes; None: of plain training."""

    def built() -> methods.Step:
        problem = problems.by_kind(kind)
        if subspace is None:
            return methods.training(problem, torch.optim.AdamW)
        penalty = Stationarity(LeastSquares(subspace=subspace))
        step = methods.penalty(problem, curvature="finite_difference", penalty=penalty)
        return (lambda: (problem.redraw(), step())) if new_batches else step

    return metrics.peaks_of(built, RESTS if new_batches else 1)["peak_bytes"]


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=problems.BY_KIND, default=problems.BY_KIND)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = "plain", "with correction", "while it rests", "without"
    print("| copies of v (over plain training) |", " | ".join(columns), "|")
    print("|---" * 5 + "|")
    for kind in options.kinds:
        unit = sum(p.numel() * p.element_size() for p in problems.by_kind(kind).lower)
        plain = peak(kind, None)
        ours = peak(kind, True), peak(kind, True, new_batches=True), peak(kind, False)
        cells = [f"{p / unit:.1f} ({p / plain:.2f})" for p in ours]
        print(f"| {kind} | {plain / unit:.1f} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
