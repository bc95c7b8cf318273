"""Both levels as every method sees them: f and its gradient, r and its linearisation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature import Curvature, Linearised, MapCurvature
from ..errors import NonFiniteError
from ..penalties import Losses, Reduce, one_worker
from ..tensors import OptionalTensors, Pair, Tensors, cast_like, dense, filled, norms
from ..undo.in_place import replaced


class Upper(NamedTuple):
    """The upper level at one point."""

    loss: Tensor
    """f, 0-d."""
    direct: OptionalTensors
    """grad_u f; None where f does not depend on the parameter."""
    slope: Tensors
    """grad_v f, dense, in at least float32."""


def check_serves_maps(engine: Curvature) -> None:
    """Raise ``ValueError`` if the engine cannot form products with a map's transposed Jacobian."""
    if not isinstance(engine, MapCurvature):
        raise ValueError(
            "a lower level given as a map needs products with a transposed Jacobian, which "
            f'curvature="{engine.name}" cannot form; use "auto", "double_backward" or '
            '"functional"'
        )


class LocalProblem:
    """Both losses at (u, v), averaged over workers, with a count of what they cost.

    Args:
        losses: f and g, or f and Phi.
        at: (u, v); leaves for live closures, plain tensors for pure functions.
        engine: derivatives.
        lower_is_map: the lower level is v = Phi(u, v), r = v - Phi; else r = grad_v g.
        reduce: averages a tuple of tensors over workers.
        place: where this is, for errors.

    Raises:
        ValueError: the engine cannot form products with a transposed Jacobian, which maps need.
    """

    def __init__(
        self,
        losses: Losses,
        at: Pair,
        engine: Curvature,
        *,
        lower_is_map: bool = False,
        reduce: Reduce = one_worker,
        place: str = "at this point",
    ) -> None:
        if lower_is_map:
            check_serves_maps(engine)
        self.losses, self.at, self.engine = losses, at, engine
        self.lower_is_map, self.reduce, self.place = lower_is_map, reduce, place
        self.evaluations = 0
        """Gradients of f and g, evaluations of Phi and products so far."""
        self.silent: tuple[bool, ...] = ()
        """Which tensors of the last r were exactly zero, as where g does not use the parameter."""

    def upper(self) -> Upper:
        """The upper level here; raises ``NonFiniteError``."""
        loss, parts = self.engine.gradient(self.losses.upper, self._point())
        self.evaluations += 1
        upper = Upper(loss, self.averaged(parts.upper), self.lower_part(parts.lower))
        gradient = (*(g for g in upper.direct if g is not None), *upper.slope)
        self._require_finite({"upper loss": (loss,), "gradient of the upper loss": gradient})
        return upper

    def residual(self) -> tuple[Tensor, Tensors]:
        """(g, r), or (||r||^2 / 2, r) of a map; raises ``NonFiniteError``."""
        if self.lower_is_map:
            linear = self.linearise()
            return linear.loss, linear.residual
        loss, parts = self.engine.gradient(self.losses.lower, self._point())
        self.evaluations += 1
        residual = self.lower_part(parts.lower)
        self._require_finite_lower(loss, residual)
        return loss, residual

    def linearise(self) -> Linear:
        """The lower level and its Jacobian; raises ``NonFiniteError``."""
        point = self._point()
        if self.lower_is_map:
            assert isinstance(self.engine, MapCurvature)
            made = self.engine.linearise_map(self.losses.lower, point, reusable=True)
        else:
            made = self.engine.linearise(self.losses.lower, point, reusable=True)
        self.evaluations += 1
        linear = Linear(self, made)
        self._require_finite_lower(linear.loss, linear.residual)
        return linear

    @contextlib.contextmanager
    def lower_at(self, values: Tensors) -> Generator[None]:
        """Everything inside the block is at (u, values); pure functions' inputs are not touched."""
        if not self.engine.reads_live:
            here = self.at
            self.at = Pair(here.upper, values)
            try:
                yield
            finally:
                self.at = here
        else:
            with replaced(self.at.lower, values):
                yield

    def lower_part(self, parts: OptionalTensors) -> Tensors:
        """A vector of the lower level, complete, dense, wide, averaged."""
        return self.reduce(tuple(dense(t) for t in filled(parts, self.at.lower)))

    def averaged(self, parts: OptionalTensors) -> OptionalTensors:
        """A vector of the upper level, averaged where there is one."""
        present = tuple(t for t in parts if t is not None)
        rest = iter(self.reduce(present) if present else ())
        return tuple(t if t is None else next(rest) for t in parts)

    def _require_finite_lower(self, loss: Tensor, residual: Tensors) -> None:
        if self.lower_is_map:
            sizes = self._require_finite({"residual v - Phi(u, v)": residual})
        else:
            sizes = self._require_finite({"lower loss": (loss,), "residual grad_v g": residual})
        self.silent = tuple(size == 0 for size in sizes[-len(residual) :])

    def _require_finite(self, blocks: dict[str, Tensors]) -> list[float]:
        """The norms; raises ``NonFiniteError`` naming the block, and waits for the device once."""
        sizes = norms([t for block in blocks.values() for t in block])
        lengths: list[float] = torch.stack([s.to(sizes[0].device) for s in sizes]).tolist()
        if all(math.isfinite(length) for length in lengths):
            return lengths
        for label, block in blocks.items():  # the norm of finite numbers may overflow
            if not all(bool(dense(t).isfinite().all()) for t in block):
                raise NonFiniteError(f"hypergradient: {label} is not finite {self.place}")
        return lengths

    def _point(self) -> Pair:
        return self.engine.point(self.at)


class Linear:
    """The equation r(u, v) = 0 linearised: A = (dr/dv)', H of a loss, (I - dPhi/dv)' of a map."""

    def __init__(self, problem: LocalProblem, made: Linearised) -> None:
        self._problem, self._made = problem, made
        self._last: tuple[Tensors, tuple[OptionalTensors, Tensors]] | None = None
        self.loss = made.loss
        self.residual = problem.lower_part(made.residual)

    def both(self, adjoint: Tensors) -> tuple[OptionalTensors, Tensors]:
        """((dr/du)'q, A q); the last product is remembered: solvers end with the one needed."""
        if self._last is None or self._last[0] is not adjoint:
            problem = self._problem
            parts = self._made.product(cast_like(adjoint, problem.at.lower))
            problem.evaluations += problem.engine.product_cost + self._made.again
            both = problem.averaged(parts.upper), problem.lower_part(parts.lower)
            self._last = adjoint, both
        return self._last[1]

    def product(self, adjoint: Tensors) -> Tensors:
        """A q."""
        return self.both(adjoint)[1]

    def transposed(self, vector: Tensors) -> Tensors:
        """A'w; of a loss A w."""
        if self._made.transposed is None:
            return self.product(vector)
        self._problem.evaluations += 1 + self._made.again
        return self._problem.lower_part(
            self._made.transposed(cast_like(vector, self._problem.at.lower))
        )
