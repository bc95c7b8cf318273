"""What ``torch.compile(fullgraph=True)`` gains on ``functional.penalty_gradient``.

    python -m benchmarks.compiled

A MLP 64-h-10 with tanh, a batch of 64, one weight per sample. Eager and compiled calls alternate;
the ratio is the median of 15 rounds of 10 calls each. Compiling needs a C++ compiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.shared import command
from torch_penalty_bilevel import functional

Weights = dict[str, Tensor]


def call(width: int) -> tuple[Callable[..., Any], tuple[Tensor, Weights, Weights]]:
    """A penalty gradient and its arguments (u, v, multiplier)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    v = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(2, 64, 64), torch.randint(0, 10, (2, 64))

    def f(u: Tensor, v: Weights) -> Tensor:
        return cross_entropy(functional_call(model, v, (x[0],)), y[0])

    def g(u: Tensor, v: Weights) -> Tensor:
        losses = cross_entropy(functional_call(model, v, (x[1],)), y[1], reduction="none")
        return (u.sigmoid() * losses).mean()

    def gradient(u: Tensor, v: Weights, multiplier: Weights) -> Any:
        return functional.penalty_gradient(
            f, g, u, v, weight=0.5, multiplier=multiplier, damping=1.0
        )

    return gradient, (torch.zeros(64), v, {name: torch.randn_like(p) for name, p in v.items()})


def seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Of ten calls, each."""
    began = time.perf_counter()
    for _ in range(10):
        function(*arguments)
    return (time.perf_counter() - began) / 10


def row(width: int, rounds: int, backend: str) -> str:
    """A line of the table."""
    eager, arguments = call(width)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    began = time.perf_counter()
    first = compiled(*arguments)
    compiling = time.perf_counter() - began
    for name, gradient in eager(*arguments).lower_grad.items():
        torch.testing.assert_close(first.lower_grad[name], gradient)
    pairs = [(seconds(eager, arguments), seconds(compiled, arguments)) for _ in range(rounds)]
    ratio = statistics.median(fast / slow for slow, fast in pairs)
    slow, fast = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return f"| {width} | {slow:.2f} | {fast:.2f} | {ratio:.2f} | {compiling:.0f} |"


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--rounds", type=int, default=15, help="of ten calls each (15)")
    parser.add_argument("--backend", default="inductor", help="aot_eager compiles no C++")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row(width, chosen.rounds, chosen.backend) for width in tqdm(chosen.widths, unit="width")
    ]
    print("\n| h | eager, ms | compiled, ms | ratio | seconds to compile |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{command.machine()}")


if __name__ == "__main__":
    main()
