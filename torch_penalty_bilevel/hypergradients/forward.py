"""Forward mode: the sensitivities dv_t/du carried along with v_t, for few upper unknowns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..tensors import OptionalTensors, Tensors, norm, scale
from .problem import LocalProblem


class Sensitivities(NamedTuple):
    """What ``carry_forward`` ends with."""

    indirect: OptionalTensors
    """(dv_T/du)' grad_v f."""
    error: float
    """||dr/du + (dr/dv) Z||_F at v_T, with Z = dv_T/du."""
    size: float
    """||dr/du||_F at v_T."""


def carry_forward(
    problem: LocalProblem, visits: list[Tensors], step_size: float, slope: Tensors
) -> Sensitivities:
    r"""The derivative of f(u, v_T) by one Jacobian-vector product per step and upper unknown.

    .. math:: Z_{t+1} = Z_t - \eta\Big(\frac{\partial r}{\partial u} + \frac{\partial r}{\partial v}
              Z_t\Big), \qquad Z_0 = 0, \qquad p = Z_T' \nabla_v f

    ``torch.func.jvp``, vmapped over the columns of Z: time and memory grow with the number of
    upper unknowns, not with T. Source: Franceschi et al. (2017), Algorithm 2.

    Args:
        problem: pure functions at (u, v_T).
        visits: v_0 ... v_{T-1}.
        step_size: eta.
        slope: grad_v f at v_T.
    """
    upper = problem.at.upper
    basis = _basis(upper)
    columns = basis[0].shape[0]
    zero = tuple(torch.zeros(columns, *v.shape).to(v) for v in problem.at.lower)

    def residual(upper: Tensors, lower: Tensors) -> Tensors:
        if problem.lower_is_map:
            image = problem.losses.lower(upper, lower)
            return tuple(v - p for v, p in zip(lower, image, strict=True))
        return torch.func.grad(problem.losses.lower, argnums=1)(upper, lower)

    def change(lower: Tensors, sensitivities: Tensors) -> Tensors:
        """The columns of dr/du + (dr/dv) Z."""

        def column(du: Tensors, dv: Tensors) -> Tensors:
            return torch.func.jvp(residual, (upper, lower), (du, dv))[1]

        problem.evaluations += columns
        return torch.func.vmap(column)(basis, sensitivities)

    carried = zero
    for lower in visits:
        moved = scale(change(lower, carried), -step_size)
        carried = tuple(z + m for z, m in zip(carried, moved, strict=True))
    here = problem.at.lower
    error, size = norm(change(here, carried)), norm(change(here, zero))
    total = torch.zeros((), dtype=slope[0].dtype)
    for z, s in zip(carried, slope, strict=True):
        total = total + z.reshape(columns, s.numel()).to(s.dtype) @ s.reshape(-1)
    parts = total.split([u.numel() for u in upper])
    indirect = tuple(p.reshape(u.shape) for p, u in zip(parts, upper, strict=True))
    return Sensitivities(indirect, float(error), float(size))


def _basis(upper: Tensors) -> Tensors:
    """The unit vectors of the upper level: one row per unknown, cut into its tensors."""
    sizes = [u.numel() for u in upper]
    identity = torch.eye(sum(sizes))
    blocks = identity.split(sizes, dim=1)
    return tuple(b.reshape(-1, *u.shape).to(u) for b, u in zip(blocks, upper, strict=True))
