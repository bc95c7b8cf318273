"""Methods that solve the adjoint equation A q = -grad_v f at one point."""

from __future__ import annotations

from typing import Any

import torch

from ..linear_solve import (
    Product,
    Solution,
    conjugate_gradient,
    fixed_point,
    largest_stretch,
    least_squares,
    neumann,
    stochastic,
)
from ..tensors import OptionalTensors, Tensors, axpy, scale, sum_of_optional
from .options import MethodOptions
from .problem import Linear, LocalProblem


def solve_adjoint(
    problem: LocalProblem,
    linear: Linear,
    slope: Tensors,
    method: str,
    options: MethodOptions,
    tolerance: float,
) -> Solution:
    r"""The q of an implicit method.

    .. math:: (A + \lambda I) q = -\nabla_v f, \qquad A = (\partial r / \partial v)^T

    Args:
        problem: to draw A again, for ``"stochastic"``.
        linear: A at this point.
        slope: grad_v f.
        method: one of ``IMPLICIT``.
        options: of the method, checked.
        tolerance: bound on ||(A + lambda I) q + grad_v f||_2 / ||grad_v f||_2.
    """
    right, damping = scale(slope, -1.0), options.damping or 0.0
    product, transposed = _damped(linear.product, damping), _damped(linear.transposed, damping)
    solve: dict[str, Any] = {"tolerance": tolerance, "start": options.start}
    if options.max_iterations is not None:
        solve["max_iterations"] = options.max_iterations
    maker, step = options.linear_optimizer, options.step_size or 1.0
    needs_step = method in ("neumann", "fixed_point", "stochastic") and maker is None
    if needs_step and options.step_size is None:
        step = usual_step(problem, product, slope)

    match method:
        case "cg":
            return conjugate_gradient(product, right, **solve)
        case "cg_normal":
            return least_squares(product, right, transposed=transposed, **solve)
        case "neumann":
            return neumann(product, right, step_size=step, **solve)
        case "fixed_point":
            return fixed_point(product, right, step_size=step, **solve)
        case "stochastic":
            fresh = _damped(lambda q: problem.linearise().product(q), damping)
            maker = maker or (lambda unknowns: torch.optim.SGD(unknowns, lr=step))
            samples = options.samples or 1
            return stochastic(fresh, right, optimizer=maker, samples=samples, **solve)
        case "approx_grad":
            solve = {"max_iterations": 1000, "transposed": transposed} | solve
            if maker is None:
                return least_squares(product, right, conjugate=False, **solve)
            return stochastic(product, right, optimizer=maker, **solve)
        case _:
            raise AssertionError(method)


def sampled_indirect(problem: LocalProblem, adjoint: Tensors, samples: int) -> OptionalTensors:
    """(dr/du)'q, the mean of ``samples`` evaluations of the lower closure."""
    total = problem.linearise().both(adjoint)[0]
    for _ in range(samples - 1):
        total = sum_of_optional(total, problem.linearise().both(adjoint)[0])
    return tuple(None if t is None else t / samples for t in total)


def usual_step(problem: LocalProblem, product: Product, like: Tensors) -> float:
    """1 for a map, whose iteration contracts by itself; 1 / ||H||_2 (estimated) for a loss."""
    if problem.lower_is_map:
        return 1.0
    size = largest_stretch(product, like)
    return 1.0 / size if 0 < size < float("inf") else 1.0


def _damped(product: Product, damping: float) -> Product:
    return (lambda q: axpy(damping, q, product(q))) if damping else product
