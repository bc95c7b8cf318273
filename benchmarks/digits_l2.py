"""One L2 weight per pixel for softmax regression on handwritten digits, solved by ``minimize``.

    python benchmarks/digits_l2.py --seed 0 --budget 14000

scikit-learn digits, shuffled by --seed: 600 training, 400 validation images. u holds 64 log weights
(from --start), v the 64 x 10 weights of a softmax regression without bias.

    f = cross entropy on the validation images
    g = cross entropy on the training images + sum_j e^{u_j} |v_j|^2 / 2

When f first falls to --target, the lower level is solved again from zero at that u and f taken
there, so a v that is not a lower solution cannot pass. Only the optimisation is measured:
400 validation images choose 64 weights, so f is no estimate of a test loss.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import MinimizeResult, minimize


def losses(seed: int) -> tuple[Any, Any]:
    """F and g."""
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(data)[order] / 16, torch.tensor(labels)[order]

    def f(u: Tensor, v: Tensor) -> Tensor:
        return cross_entropy(x[600:1000] @ v, y[600:1000])

    def g(u: Tensor, v: Tensor) -> Tensor:
        penalty = (u.exp()[:, None] * v.square()).sum() / 2
        return cross_entropy(x[:600] @ v, y[:600]) + penalty

    return f, g


def resolved(f: Any, g: Any, u: Tensor) -> float:
    """F where the lower level is solved from zero at u, by L-BFGS."""
    v = torch.zeros(64, 10, requires_grad=True)
    solver = torch.optim.LBFGS(
        [v],
        max_iter=20000,
        max_eval=40000,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = g(u, v)
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(f(u, v))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--budget", type=int, default=14000, help="evaluations")
    parser.add_argument("--start", type=float, default=-7.0, help="all entries of u")
    parser.add_argument("--target", type=float, default=0.0486, help="upper loss looked for")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    f, g = losses(options.seed)
    u = torch.full((64,), options.start)
    print(f"start: f = {resolved(f, g, u):.5f} on the solved lower level")
    began, checking = time.perf_counter(), 0.0
    found = False

    def watch(result: MinimizeResult) -> None:
        nonlocal found, checking
        if found or result.upper_loss > options.target:
            return
        seconds, found = time.perf_counter() - began, True
        loss = resolved(f, g, result.upper)
        checking = time.perf_counter() - began - seconds
        certificate = f"|r| = {result.residual_norm:.1e}, |a| = {result.adjoint_residual_norm:.1e}"
        print(
            f"first <= {options.target}: f = {result.upper_loss:.5f}, re-solved {loss:.5f}, "
            f"{result.evaluations} evaluations, {seconds:.1f} s, {certificate}"
        )

    result = minimize(f, g, u, torch.zeros(64, 10), max_evaluations=options.budget, callback=watch)
    print(
        f"end: f = {result.upper_loss:.5f}, {result.evaluations} evaluations, "
        f"{time.perf_counter() - began - checking:.1f} s, {result.status}\n"
        f"certificate: |r| = {result.residual_norm:.1e}, |a| = {result.adjoint_residual_norm:.1e}, "
        f"hypergradient {result.upper_grad_norm:.1e}\n{result.message}"
    )


if __name__ == "__main__":
    main()
