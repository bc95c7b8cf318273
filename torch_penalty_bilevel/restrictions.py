"""What a level's constraint argument means to the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .constraints import Projection
from .evaluation import Evaluation
from .faces import Faces
from .levels import Level
from .tensors import Tensors

Constraint: TypeAlias = Projection


class Restriction:
    """The constraint of one level; without one, nothing here does anything.

    Args:
        level: whose it is.
        constraint: what the user gave.

    Raises:
        TypeError: not a constraint.
    """

    def __init__(self, level: Level, constraint: Constraint | None) -> None:
        self.level: Level = level
        self.projection: Projection | None = None
        if constraint is not None:
            if isinstance(constraint, type) or not hasattr(constraint, "project"):
                raise TypeError(
                    f"{level}_constraint must be an object of torch_penalty_bilevel.constraints "
                    f"such as Box(0, 1), got {constraint!r}"
                )
            self.projection = constraint

    def check_start(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless the parameters that move are in the set, up to rounding."""
        if self.projection is None:
            return
        for name, parameter in zip(names, parameters, strict=True):
            point = parameter.detach()
            wide = torch.promote_types(point.dtype, torch.float32)
            gap = (self.projection.project(point).to(wide) - point.to(wide)).abs()
            size = float(point.abs().max()) if point.numel() else 0.0
            allowed = 16 * torch.finfo(point.dtype).eps * max(1.0, size)
            if parameter.requires_grad and bool((gap > allowed).any()):
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(point.shape)} starts outside of "
                    f"{self.level}_constraint={type(self.projection).__name__} by "
                    f"{float(gap.max()):.3g}; start inside, e.g. p.data = constraint.project(p.data)"
                )

    def faces(self, point: Tensors, gradient: Sequence[Tensor | None]) -> Faces:
        """The critical faces of ``point``; a missing gradient counts as zero."""
        projection = self.projection
        if projection is None:
            return Faces()
        pairs = zip(point, gradient, strict=True)
        with torch.no_grad():
            return Faces(
                [
                    projection.face(x.detach(), torch.zeros_like(x) if g is None else g)
                    for x, g in pairs
                ]
            )

    @property
    def is_free(self) -> bool:
        """No projection: a zero gradient then says that the loss is stationary."""
        return self.projection is None

    def restricted(self, evaluation: Evaluation, upper: Tensors) -> Evaluation:
        """The evaluation with its upper gradient in the span of the critical face."""
        face = self.faces(upper, evaluation.upper_grad)
        return evaluation._replace(
            upper_grad=face.optional_tangent(evaluation.upper_grad), upper_face=face
        )
