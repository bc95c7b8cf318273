"""The floor: the default method written out by hand for one problem, with nothing around it.

No closures, no engines to choose from, no roll-back after an error, no metrics: what a user would
write in a notebook who knows the algorithm. And no correction of the multiplier: ``test_micro.py``
checks that it takes the steps of ``LeastSquares(subspace=False)``.

Letters as in ``LeastSquares``: r = grad_v g, nu the multiplier, H = d2g/dv2, a = grad_v f + H nu.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.problems import Problem

SHARE = 0.3
Tensors = tuple[Tensor, ...]


def _length(tensors: Tensors) -> float:
    return math.hypot(*torch.stack(torch._foreach_norm(tensors)).tolist())


def _unit(tensors: Tensors) -> Tensors:
    return torch._foreach_mul(tensors, 1.0 / _length(tensors))


def floor(problem: Problem, upper_lr: float = 0.1, lower_lr: float = 1e-3) -> Callable[[], None]:
    """One step of the loop."""
    u, v = problem.upper, problem.lower
    upper_rule, lower_rule = torch.optim.Adam([u], lr=upper_lr), torch.optim.Adam(v, lr=lower_lr)
    nu = tuple(torch.zeros_like(p) for p in v)
    probe: Tensors = ()
    largest = indefinite = length = steepest = 0.0  # bound on ||H||, kappa, D and S of the rule
    r2 = a2 = f2 = curved = nu2 = 0.0  # running averages
    count = 0

    def step() -> None:
        nonlocal nu, probe, largest, indefinite, length, steepest, r2, a2, f2, curved, nu2, count
        probes = count < 10 or count % 20 == 0
        slope = torch.autograd.grad(problem.f(), v)
        graph = torch.autograd.grad(problem.g(), v, create_graph=True)
        upper_grad, *product = torch.autograd.grad(graph, (u, *v), nu, retain_graph=probes)
        r = tuple(t.detach() for t in graph)
        a = torch._foreach_add(slope, product)
        vectors = [nu, r, slope, product, a]
        if probes:
            probe = probe or _unit(torch._foreach_add(_unit(r), _unit(slope)))
            ahead = torch.autograd.grad(graph, v, probe)
            vectors.append(ahead)
        # One transfer for all numbers.
        norms = [n for each in vectors for n in torch._foreach_norm(each)]
        dots = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(nu, product, strict=True)]
        numbers = torch.stack([*norms, *dots, upper_grad.norm()]).tolist()
        if not all(map(math.isfinite, numbers)):
            raise ValueError("not finite")
        n, rows = len(v), len(vectors)
        long_nu, long_r, long_f, long_h, long_a, *long_p = (
            math.hypot(*numbers[i * n : (i + 1) * n]) for i in range(rows)
        )
        if probes:
            probe = torch._foreach_mul(ahead, 1.0 / long_p[0])
        ratio = long_h / long_nu if long_nu > 0 else 0.0
        largest = max(0.999 * largest, ratio, *long_p)
        r2 = 0.99 * r2 + 0.01 * long_r**2
        a2 = 0.99 * a2 + 0.01 * long_a**2
        f2 = 0.99 * f2 + 0.01 * long_f**2
        curved = 0.9 * curved + 0.1 * sum(numbers[rows * n : rows * n + n])
        nu2 = 0.9 * nu2 + 0.1 * long_nu**2
        indefinite = max(0.99 * indefinite, -curved / nu2 if nu2 > 0 else 0.0)
        length = max(math.sqrt(r2) / largest, length * count / (count + 1))
        steepest = max(math.sqrt(f2), steepest * (count + 100) / (count + 101))
        unit = max(steepest, math.sqrt(a2 + f2), math.hypot(long_a, long_f))
        pull = SHARE * largest * length / unit
        direction = torch._foreach_add(r, a, alpha=pull)
        size = 1.0 / (largest + 2.0 * indefinite)
        nu = torch._foreach_mul(nu, 1.0 - 2.0 * indefinite * size)
        torch._foreach_add_(nu, a, alpha=-size)
        for parameter, gradient in zip(v, direction, strict=True):
            parameter.grad = gradient
        lower_rule.step()
        _step_rows(upper_rule, u, upper_grad)
        count += 1

    return step


def _step_rows(rule: torch.optim.Optimizer, u: Tensor, gradient: Tensor) -> None:
    """Adam on the rows of the batch: the others and their moments stay."""
    absent = gradient == 0
    moments = [t for t in rule.state.get(u, {}).values() if t.shape == u.shape]
    before = [t.detach().clone() for t in (u, *moments)]
    u.grad = gradient
    rule.step()
    moments = [t for t in rule.state[u].values() if t.shape == u.shape]
    with torch.no_grad():
        for now, old in zip((u, *moments), before, strict=False):
            now.copy_(torch.where(absent, old, now))
