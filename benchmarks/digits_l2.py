"""One L2 weight per pixel for softmax regression on handwritten digits, solved by ``minimize``.

    python -m benchmarks.digits_l2 --seed 0 --budget 14000

scikit-learn digits, shuffled by --seed: 600 training, 400 validation images. u holds 64 log weights
(from --start), v the 64 x 10 weights of a softmax regression without bias.

    f = cross entropy on the validation images
    g = cross entropy on the training images + sum_j e^{u_j} |v_j|^2 / 2

When f first falls to --target, the lower level is solved again from zero at that u and f taken
there, so a v that is not a lower solution cannot pass. Only the optimisation is measured:
400 validation images choose 64 weights, so f is no estimate of a test loss.

With --nested the usual way runs first: at every u the lower level solved to 1e-9 by L-BFGS from the
last v, the hypergradient by conjugate gradients, L-BFGS on u, until f is at most --target (or 60
iterations).
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.shared import command
from torch_penalty_bilevel import BilevelWarning, MinimizeResult, functional, minimize


def shuffled(seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels; the first 600 are for training, the next 400 for validation."""
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(data)[order] / 16, torch.tensor(labels)[order]


def losses_on(x: Tensor, y: Tensor, training: Any, validation: Any) -> tuple[Any, Any]:
    """F and g of these rows (slices or indices)."""

    def f(u: Tensor, v: Tensor) -> Tensor:
        return cross_entropy(x[validation] @ v, y[validation])

    def g(u: Tensor, v: Tensor) -> Tensor:
        penalty = (u.exp()[:, None] * v.square()).sum() / 2
        return cross_entropy(x[training] @ v, y[training]) + penalty

    return f, g


def losses(seed: int) -> tuple[Any, Any]:
    """F and g of all rows."""
    return losses_on(*shuffled(seed), slice(600), slice(600, 1000))


def nested(f: Any, g: Any, u: Tensor, target: float) -> None:
    """Exact hypergradients of a solved lower level; prints the time to the target."""
    u, v = u.clone().requires_grad_(), torch.zeros(64, 10, requires_grad=True)
    began, hypergradients, best = time.perf_counter(), 0, float("inf")
    solver = torch.optim.LBFGS([u], max_iter=1, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        nonlocal hypergradients, best
        solve_lower(g, u.detach(), v, 1e-9)
        point = u.detach(), v.detach()
        u.grad, _ = functional.hypergradient(f, g, *point, tolerance=1e-6, max_iterations=1000)
        hypergradients += 1
        loss = f(*point)
        best = min(best, float(loss))
        return loss

    for _ in tqdm(range(60), unit="iteration"):
        with warnings.catch_warnings():
            # H is singular at dead pixels, where conjugate gradients stop early.
            warnings.simplefilter("ignore", BilevelWarning)
            solver.step(closure)  # type: ignore[arg-type]
        if best <= target:
            break
    print(
        f"nested: f = {best:.5f} after {hypergradients} hypergradients, "
        f"{time.perf_counter() - began:.1f} s"
    )


def resolved(f: Any, g: Any, u: Tensor) -> float:
    """F where the lower level is solved from zero at u, by L-BFGS."""
    v = torch.zeros(64, 10, requires_grad=True)
    solve_lower(g, u, v, 1e-10)
    with torch.no_grad():
        return float(f(u, v))


def solve_lower(g: Any, u: Tensor, v: Tensor, tolerance: float, iterations: int = 20000) -> None:
    """Move v to the minimiser of g(u, .), by L-BFGS."""
    solver = torch.optim.LBFGS(
        [v],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=50,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = g(u, v)
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--budget", type=int, default=14000, help="evaluations")
    parser.add_argument("--start", type=float, default=-7.0, help="all entries of u")
    parser.add_argument("--target", type=float, default=0.0486, help="upper loss looked for")
    parser.add_argument("--nested", action="store_true", help="run the nested method too")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    f, g = losses(options.seed)
    u = torch.full((64,), options.start)
    print(f"start: f = {resolved(f, g, u):.5f} on the solved lower level")
    if options.nested:
        nested(f, g, u, options.target)
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
