r"""Sets that a level's parameters stay in, tensor by tensor, for ``PenaltyBilevelOptimizer``.

A step from x with gradient g goes to the set C in three moves:

1. the critical face at (x, g): entries at a bound that -g pushes outward are held, and the
   projector P onto the span of the face takes from g what no feasible motion can follow;
2. the level's rule takes a step with P g, so its moments see only feasible motion;
3. the result is projected onto the face (onto C, with the held entries held).

Projecting the result of a step with g itself, as is often done, has false fixed points when the
rule scales entries: on a simplex Adam's first step is the same for every entry, it is
normal to the simplex and nothing moves. Here -P g lies in the tangent cone T of C at x. For a
diagonal scaling D > 0, a fixed point means that -D P g lies in the normal cone, the polar of T, so
<D P g, P g> <= 0, hence P g = 0: only stationary points are fixed. Holding the entries of move 1
also in move 3 makes the step a descent direction to first order.

In the lower level the same face gives the hypergradient. With v held to its face, the adjoint
lives on the span of the face,

.. math:: r = P \nabla_v g, \qquad q = P q, \qquad a = P(\nabla_v f + H q + \mu q) = 0,
          \qquad \nabla F = \nabla_u f + J q

where mu = 0 for flat sets; for the sphere ||v|| = R it is the multiplier <-grad g, v> / R^2 of
(||v||^2 - R^2) / 2. Where an entry sits at its bound with a zero multiplier (no strict
complementarity) the solution map has a kink; such entries count as free.
"""

from __future__ import annotations

from .ball import Ball as Ball
from .box import Box as Box
from .box import NonNegative as NonNegative
from .box_and_ball import BoxAndBall as BoxAndBall
from .faces import NO_FACES as NO_FACES
from .faces import Face as Face
from .faces import Faces as Faces
from .faces import FacesOf as FacesOf
from .faces import everywhere as everywhere
from .inequality import Inequality as Inequality
from .inequality import LowerPoint as LowerPoint
from .projection import Projection as Projection
from .simplex import Simplex as Simplex
