"""How fast the multiplier solves an adjoint equation that stands still.

    python -m benchmarks.adjoint               # the table of docs/concepts/multiplier.md
    python -m benchmarks.adjoint --products 5 --seeds 1

H has 30 eigenvalues from 1 to kappa on a logarithmic scale, in a random basis; v does not move, and
grad_v f is a random vector. Told is ||grad_v f + H q|| / ||grad_v f|| after so many products,
for the default rule with and without its correction, conjugate gradients, and their bound
2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^products.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from examples.shared import command
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

UNKNOWNS = 30
PRODUCTS = {1e1: 30, 1e3: 200, 1e4: 400}


def system(kappa: float, seed: int) -> tuple[Tensor, Tensor]:
    """H and grad_v f."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(UNKNOWNS, UNKNOWNS, generator=generator)).Q
    eigenvalues = torch.logspace(0, math.log10(kappa), UNKNOWNS)
    return basis @ torch.diag(eigenvalues) @ basis.T, torch.randn(UNKNOWNS, generator=generator)


def by_rule(hessian: Tensor, slope: Tensor, products: int, *, subspace: bool) -> float:
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(UNKNOWNS, requires_grad=True)
    penalty = Stationarity(LeastSquares(subspace=subspace))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=penalty)
    for _ in range(products):
        optimizer.lower_step(
            lambda: slope @ v + 0 * u.sum(), lambda: v @ hessian @ v / 2 + u.sum() * v.sum()
        )
    return float(optimizer.metrics.relative_certificate)


def by_conjugate_gradients(hessian: Tensor, slope: Tensor, products: int) -> float:
    q, residual = torch.zeros_like(slope), -slope
    direction = residual
    for _ in range(products):
        image = hessian @ direction
        length = residual @ residual / (direction @ image)
        q, before = q + length * direction, residual
        residual = residual - length * image
        direction = residual + (residual @ residual) / (before @ before) * direction
        if float(residual.norm()) <= 1e-15 * float(slope.norm()):
            break
    return float((slope + hessian @ q).norm() / slope.norm())


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--products", type=int, help="in place of 30, 200 and 400")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("| kappa | products | plain step | with correction | conjugate gradients | their bound |")
    print("|---|---|---|---|---|---|")
    for kappa, usual in PRODUCTS.items():
        products = options.products or usual
        systems = [system(kappa, seed) for seed in range(options.seeds)]
        plain = [by_rule(*s, products, subspace=False) for s in systems]
        corrected = [by_rule(*s, products, subspace=True) for s in systems]
        exact = [by_conjugate_gradients(*s, products) for s in systems]
        bound = 2 * ((math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)) ** products
        medians = (statistics.median(found) for found in (plain, corrected, exact))
        cells = [f"{number:.0e}" for number in (*medians, bound)]
        print(f"| {kappa:g} | {products} | {' | '.join(cells)} |")
    print(f"\nMedian of seeds 0 to {options.seeds - 1}; float64; {command.machine()}")


if __name__ == "__main__":
    main()
