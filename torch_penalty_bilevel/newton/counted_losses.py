r"""Both losses on flat vectors, their derivatives, and the count of evaluations.

.. math::
    r = \nabla_v g, \quad H = \nabla^2_{vv} g, \quad J = \nabla^2_{uv} g, \qquad
    L(u, v) = f + \langle q, r\rangle

An evaluation is a loss with its gradient, or a product with a Hessian of g. What differentiates g
three times, the gradient of L or a product with its Hessian, counts two.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..curvature import autograd_graph as graph
from ..curvature.refusals import explained, names_operation
from ..errors import DoubleBackwardError, NonFiniteError, UnusedParameterError
from ..pytrees import Structure
from .autograd import gradient, jacobian, variable

Product: TypeAlias = Callable[[Tensor], Tensor]
Values: TypeAlias = Callable[[Any, Any], Tensor]
Joint: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PureLoss: TypeAlias = Callable[[Any, Any], Tensor]


class Exhausted(Exception):
    """The evaluation budget is spent."""


class UpperModel(NamedTuple):
    """f with its gradient at a point."""

    value: float
    upper_grad: Tensor
    lower_grad: Tensor


class LowerModel(NamedTuple):
    """g with r, and products with its second derivatives at a point."""

    value: float
    residual: Tensor
    hessian: Product  # y -> H y
    joint: Joint  # (p, y) -> (g_uu p + J y, J' p + H y)
    matrices: Callable[[], tuple[Tensor, Tensor]]  # H and J, for n_v evaluations


class FlatLevel:
    """One level's pytree as a flat float64 vector, and the way back."""

    def __init__(self, name: str, tree: Any) -> None:
        self.structure = Structure(name, tree)
        self.leaves = self.structure.leaves
        if not self.leaves:
            raise ValueError(f"{name} is empty; give a pytree with at least one tensor")
        for label, leaf in zip(self.structure.names, self.leaves, strict=True):
            require_finite(f"{label} at the start", leaf)
        self.sizes = [leaf.numel() for leaf in self.leaves]
        if not sum(self.sizes):
            raise ValueError(f"{name} has no entries; give at least one tensor that is not empty")
        self.eps = max(torch.finfo(leaf.dtype).eps for leaf in self.leaves)

    def vector(self, device: torch.device) -> Tensor:
        parts = [t.detach().reshape(-1).to(device, torch.float64) for t in self.leaves]
        return torch.cat(parts)

    def tree(self, vector: Tensor) -> Any:
        """The pytree of ``vector``; every tensor with the dtype, device and shape it came with."""
        parts = torch.split(vector, self.sizes)
        leaves = [
            part.reshape(like.shape).to(like.device, like.dtype)
            for part, like in zip(parts, self.leaves, strict=True)
        ]
        return self.structure.tree(leaves)


class CountedLosses:
    """Both losses with their derivatives, on flat vectors.

    Args:
        upper_loss: f, on pytrees.
        lower_loss: g, on pytrees.
        upper: the start u.
        lower: the start v.
        limit: evaluations allowed.

    Attributes:
        eps: the rounding of the coarsest dtype among the parameters.
        count: evaluations so far.
    """

    def __init__(
        self, upper_loss: PureLoss, lower_loss: PureLoss, upper: Any, lower: Any, limit: float
    ):
        self._f, self._g = upper_loss, lower_loss
        self.upper_level, self.lower_level = FlatLevel("upper", upper), FlatLevel("lower", lower)
        device = self.lower_level.leaves[0].device
        self.u, self.v = self.upper_level.vector(device), self.lower_level.vector(device)
        self.eps = max(self.upper_level.eps, self.lower_level.eps)
        self.limit, self.count = limit, 0

    def use(self, upper_loss: PureLoss, lower_loss: PureLoss) -> None:
        """Other losses from now on; the count goes on."""
        self._f, self._g = upper_loss, lower_loss

    def spend(self, evaluations: int = 1) -> None:
        if self.count + evaluations > self.limit:
            raise Exhausted
        self.count += evaluations

    def upper(self, u: Tensor, v: Tensor) -> UpperModel:
        """The upper loss with its gradient; values that are not finite pass through."""
        self.spend()
        with differentiating("upper"):
            u, v = variable(u), variable(v)
            f = self._value("upper_loss", self._f, u, v)
            return UpperModel(float(f.detach()), *gradient(f, (u, v)))

    def lower(self, u: Tensor, v: Tensor) -> LowerModel:
        """The lower loss and its products; g and r that are not finite pass, products do not."""
        self.spend()
        with differentiating("lower"):
            u, v = variable(u), variable(v)
            g = self._value("lower_loss", self._g, u, v)
            g_u, r = gradient(g, (u, v), create_graph=True)

        def hessian(y: Tensor) -> Tensor:
            self.spend()
            with differentiating("lower"):
                (Hy,) = gradient(r, (v,), y, retain_graph=True)
            return require_finite("a product with the Hessian of the lower loss", Hy)

        def joint(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            self.spend()
            with differentiating("lower"):
                out_u, out_v = gradient(g_u @ p + r @ y, (u, v), retain_graph=True)
            require_finite("a product with the Hessian of the lower loss", out_u, out_v)
            return out_u, out_v

        def matrices() -> tuple[Tensor, Tensor]:
            self.spend(v.numel())
            with differentiating("lower"):
                J, H = jacobian(r, (u, v))
            require_finite("the Hessian of the lower loss", H, J)
            return (H + H.T) / 2, J.T

        return LowerModel(float(g.detach()), r.detach(), hessian, joint, matrices)

    def lagrangian(self, u: Tensor, v: Tensor, q: Tensor) -> Joint:
        """(p, y) -> the Hessian of L = f + <q, r> times (p, y)."""
        self.spend(2)
        with differentiating("lower"):
            u, v = variable(u), variable(v)
            f = self._value("upper_loss", self._f, u, v)
            g = self._value("lower_loss", self._g, u, v)
            (r,) = gradient(g, (v,), create_graph=True)
            L_u, L_v = gradient(f + r @ q, (u, v), create_graph=True)

        def product(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            self.spend(2)
            with differentiating("lower"):
                out_u, out_v = gradient(L_u @ p + L_v @ y, (u, v), retain_graph=True)
            require_finite("a product with the Hessian of the Lagrangian", out_u, out_v)
            return out_u, out_v

        return product

    def values(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both losses as parts of an autograd graph; not counted."""
        return self._value("upper_loss", self._f, u, v), self._value("lower_loss", self._g, u, v)

    def scales(self, u: Tensor, v: Tensor) -> tuple[float, float]:
        """How much f and g change over a distance of 1 + ||u|| and 1 + ||v||, by two derivatives.

        Homogeneous: c f has c times the scale of f, so what is relative to the scales does not
        notice c. 1 where both derivatives vanish.
        """
        unit = 1 + float(u.norm()), 1 + float(v.norm())
        along = [
            s / math.sqrt(x.numel()) * torch.ones_like(x) for s, x in zip(unit, (u, v), strict=True)
        ]
        upper, lower = self.upper(u, v), self.lower(u, v)
        f_uu, f_vv = self.lagrangian(u, v, torch.zeros_like(v))(*along)
        slope = upper.upper_grad.norm() * unit[0] + upper.lower_grad.norm() * unit[1]
        f = float(slope + f_uu.norm() * unit[0] + f_vv.norm() * unit[1])
        g = float(lower.residual.norm() + lower.joint(*along)[1].norm()) * unit[1]
        return f or 1.0, g or 1.0

    def check_dependence(self) -> None:
        """Raise if an upper tensor enters neither f nor r, or second derivatives are wrong."""
        with differentiating("lower"):
            leaves = [t.detach().clone().requires_grad_() for t in self.upper_level.leaves]
            tree, v = self.upper_level.structure.tree(leaves), variable(self.v)
            f = self._f(tree, self.lower_level.tree(v))
            g = self._g(tree, self.lower_level.tree(v))
            for loss, value in (("upper", f), ("lower", g)):
                if culprit := graph.silently_wrong(value):
                    raise DoubleBackwardError(
                        f"autograd's second derivative of {culprit} in the {loss} loss is silently "
                        "wrong; write it with elementary operations"
                    )
            (r,) = gradient(g, (v,), create_graph=True)
            direct, through = _reached(f, leaves), _reached(r, leaves)
        for name, a, b in zip(self.upper_level.structure.names, direct, through, strict=True):
            if not (a or b):
                raise UnusedParameterError(
                    f"neither the upper loss nor the gradient of the lower one depends on {name}; "
                    "leave it out of upper"
                )

    def _value(self, name: str, loss: PureLoss, u: Tensor, v: Tensor) -> Tensor:
        value = loss(self.upper_level.tree(u), self.lower_level.tree(v))
        if not isinstance(value, Tensor) or value.dim() != 0:  # pyright: ignore
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__  # pyright: ignore
            raise ValueError(f"{name} must return a 0-d tensor, got {shape}; sum or average it")
        return value


def require_finite(label: str, *tensors: Tensor) -> Tensor:
    """The first of ``tensors``, if all are finite."""
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise NonFiniteError(f"minimize: {label} is not finite")
    return tensors[0]


@contextlib.contextmanager
def differentiating(loss: str) -> Generator[None]:
    """Explains what autograd cannot do."""
    try:
        with torch.enable_grad(), explained(lambda error: not names_operation(error)):
            yield
    except DoubleBackwardError as error:
        if error.__cause__ is None:
            raise
        raise DoubleBackwardError(
            f"minimize differentiates the lower loss three times and the upper one twice, which "
            f"autograd cannot do here ({loss} loss): {error.__cause__}; write the loss with "
            "elementary operations, or use PenaltyBilevelOptimizer"
        ) from error.__cause__


def _reached(out: Tensor, leaves: list[Tensor]) -> list[bool]:
    if not out.requires_grad:
        return [False] * len(leaves)
    grads: Any = torch.autograd.grad(out.sum(), leaves, allow_unused=True, retain_graph=True)
    return [g is not None for g in grads]
