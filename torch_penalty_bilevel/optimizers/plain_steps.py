"""Lower steps that cost what plain training costs, between those that learn the multiplier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import levels
from ..adapters.closures import Closure
from ..curvature.micro_batches import parts_of
from ..hypergradients import LocalProblem
from ..levels import rules
from ..penalties import Losses, Reduce
from ..tensors import Pair, Tensors, axpy, clones
from ..undo.buffers import BufferGuard
from ..undo.random_state import RandomState
from .two_level import Here
from .waiting import WaitsForLower


class TakesPlainSteps(WaitsForLower):
    """Steps on g alone; the multiplier waits."""

    reduce: Reduce

    def plain_lower_step(self, lower_closure: Closure) -> Tensor:
        r"""One update of v by grad_v g alone; returns g. It costs what plain training costs.

        .. math:: v \leftarrow \text{lower rule}(\lambda r), \qquad r = \nabla_v g(u, v)

        No gradient of f and no second-order product: the multiplier stays as it is, and learns at
        the next ``lower_step`` or ``step``. lambda is the rule's ``damping``; the pull towards what
        f likes, w (grad_v f + H nu) of ``lower_step``, is left out, so that where argmin_v g is not
        unique f chooses less. Both vanish at a solution, which is the same::

            for k, batch in enumerate(loader):
                if k % 4 < 3:
                    optimizer.plain_lower_step(lambda: g(batch))
                else:
                    optimizer.step(lambda: f(validation), lambda: g(batch))

        ``metrics`` stay those of the last evaluation, but for ``gradient_evaluations``. The first
        call with new lines of code evaluates g once more, uncompiled, to see which modules it uses.

        Args:
            lower_closure: as in ``step``.

        Raises:
            ValueError: the penalty's multiplier lives in where v is (``"value"``, ``"paper"``), so
                that a step on g alone would wash it out; or the lower level has an ``Inequality``.
            NonFiniteError: g or its gradient is not finite; nothing was changed.
        """
        rule = self.penalty.rule
        self._check_plain(lower_closure)
        with self._undone([]) as guard:
            losses, here = self._losses(lower_closure, lower_closure, guard), self._here()
            lower, dual = here.at.lower, self._dual.only(self._moving(here))
            loss, full_residual, silent = self._plain_residual(losses, here)
            face = losses.lower_faces(lower, full_residual)
            direction = rule.plain_direction(dual, face.tangent(full_residual))
            assert direction is not None
            pairs = zip(direction, silent, strict=True)
            levels.give(self.lower, [None if is_silent else d for d, is_silent in pairs])
            before = clones(lower) if rule.follows_lower(dual) else ()
            with face.retracting(lower):
                rules.step_without_decay(self.lower)
            if before:
                move = axpy(-1.0, before, tuple(p.detach() for p in lower))
                dual = rule.followed_further(dual, move)
                self._dual = self._dual.merged(dual, self._moving(here), here.lower)
        return loss

    def _check_plain(self, lower_closure: Closure) -> None:
        if not (callable(lower_closure) or isinstance(lower_closure, (list, tuple))):
            raise TypeError(
                "plain_lower_step needs the lower closure, or one per micro-batch; lower_closure "
                f"is {type(lower_closure).__name__}"
            )
        if self.penalty.rule.plain_direction(self._dual, self._dual.multiplier) is None:
            raise ValueError(
                f"plain_lower_step does not go with penalty={self.penalty.name!r} and its rule "
                f"{type(self.penalty.rule).__name__}: its multiplier lives in where v is, and a "
                'step on g alone would wash it out; use lower_step, or penalty="stationarity"'
            )
        if self._sets.lower.inequalities:
            raise ValueError(
                "plain_lower_step does not go with an Inequality in lower_constraint, whose "
                "multiplier moves with that of the adjoint equation; use lower_step"
            )

    def _plain_residual(self, losses: Losses, here: Here) -> tuple[Tensor, Tensors, Sequence[bool]]:
        """The loss g, r, and which tensors of it are silent."""
        engine = self.curvature
        at = Pair((), here.at.lower) if engine.reads_live else here.at
        if self._scope.is_new:
            self._search(losses, engine.point(at))
        place = f"in a plain lower step after step {self._counts['steps']}; nothing was changed"
        is_map = self.penalty.lower_is_map
        problem = LocalProblem(
            losses, at, engine, lower_is_map=is_map, reduce=self.reduce, place=place
        )
        loss, residual = problem.residual()
        self._counts["gradient_evaluations"] += problem.evaluations
        if self._seen is not None:
            self._seen = *self._seen[:-1], self._counts["gradient_evaluations"]
        return loss, residual, problem.silent

    def _search(self, losses: Losses, at: Pair) -> None:
        """Find the modules that new lines of code use."""
        if self._scope.has_searched:
            self.curvature.renew()
        random = RandomState(self._devices())
        with self._scope.searching():
            for part in parts_of(losses.lower):
                part(*at)
        random.restore()

    def _losses(self, upper: Closure, lower: Closure, guard: BufferGuard) -> Losses:
        raise NotImplementedError
