r"""The part of a feasible set on which a point moves: held entries, a normal, a curvature.

At a point x of a closed set C with gradient g, the *critical face* collects the directions along
which x can go on improving without being pushed out of C. Its span is the range of the projector

.. math:: P d = m \odot d - n\,\langle n, d\rangle

with m the mask of entries that are not held at a bound and n a unit normal inside the mask (zero
where there is none). On a curved boundary, n turns as x moves; its second-order effect is mu I.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..tensors import OptionalTensors, Tensors, clones

Retract: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(before, after) -> the point of the face that a step from ``before`` to ``after`` ends at."""


def check_dense(vector: Tensor) -> None:
    """Raise ``TypeError`` of a sparse gradient."""
    if vector.layout != torch.strided:
        raise TypeError(
            "a constraint needs dense gradients, got a sparse one; use a dense parameter, or "
            "keep sparse embeddings in a level without a constraint"
        )


def _stay(before: Tensor, after: Tensor) -> Tensor:
    del before
    return after


@dataclass(frozen=True)
class Face:
    """The critical face of one tensor; by default the whole space."""

    retract: Retract = _stay
    moving: Tensor | None = None
    """m: False where the entry is held."""
    normal: Tensor | None = None
    """n: of unit length, or zero, over ``dims``."""
    dims: tuple[int, ...] = ()
    """The dimensions that one normal spans; the others are independent rows."""
    curvature: Tensor | None = None
    """mu >= 0 of each row."""

    def tangent(self, vector: Tensor) -> Tensor:
        """P d, in the dtype of d. NaN and infinity stay visible, held entry or not."""
        check_dense(vector)
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        if self.moving is not None:
            wide = wide * self.moving
        if self.normal is not None:
            normal = self.normal.to(wide.dtype)
            wide = wide - normal * (normal * wide).sum(self.dims, keepdim=True)
        return wide.to(vector.dtype)

    def bend(self, vector: Tensor) -> Tensor:
        """Mu d."""
        assert self.curvature is not None
        return self.curvature.to(vector.dtype) * vector


class Faces:
    """The critical faces of a level's moving tensors; empty for a level without a constraint."""

    def __init__(self, faces: Sequence[Face] = ()) -> None:
        self._faces = tuple(faces)

    def tangent(self, vectors: Tensors) -> Tensors:
        """P d, tensor by tensor."""
        if not self._faces:
            return vectors
        return tuple(f.tangent(d) for f, d in zip(self._faces, vectors, strict=True))

    def optional_tangent(self, vectors: OptionalTensors) -> OptionalTensors:
        """P d where there is a d."""
        if not self._faces:
            return vectors
        pairs = zip(self._faces, vectors, strict=True)
        return tuple(None if d is None else f.tangent(d) for f, d in pairs)

    def curved(self, product: Tensors, vectors: Tensors) -> Tensors:
        """H d + mu d, given H d: the second derivative as seen from the boundary."""
        if not self._faces:
            return product
        return tuple(
            h if f.curvature is None else h + f.bend(d).to(h.dtype)
            for f, h, d in zip(self._faces, product, vectors, strict=True)
        )

    @contextlib.contextmanager
    def retracting(self, parameters: Tensors) -> Generator[None]:
        """After the block, which moves ``parameters``, put them back onto their faces."""
        if not self._faces:
            yield
            return
        before = clones(parameters)
        yield
        with torch.no_grad():
            # The faces of multipliers, at the end, have no parameters.
            for face, old, parameter in zip(self._faces, before, parameters, strict=False):
                parameter.copy_(face.retract(old, parameter.detach()))


NO_FACES = Faces()
"""Of a level without a constraint."""


FacesOf: TypeAlias = Callable[[Tensors, Tensors], Faces]
"""(point, gradient) -> the critical faces there."""


def everywhere(point: Tensors, gradient: Tensors) -> Faces:
    """No constraint."""
    del point, gradient
    return NO_FACES
