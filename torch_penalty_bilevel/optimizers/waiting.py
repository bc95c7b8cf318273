"""When u may follow the hypergradient, and when it waits for v and the multiplier."""

from __future__ import annotations

from ..arguments import Count, Fixed, Number, check_count
from ..errors import warn
from ..evaluation import Norms
from ..penalties import Losses
from . import summary
from .penalty_memory import RemembersDual
from .two_level import Seen

_PATIENCE = 20
"""Calls in a row whose lower steps end uncertified, after which to say so."""
_WARM = 0.5
"""Of ||grad_v f||, which ||a|| is at q = 0."""


class WaitsForLower(RemembersDual):
    """By the certificate ||a|| / ||grad_v f||, a = grad_v f + H q.

    Where f is switched off, grad_v f = 0 and the exact adjoint is 0, but q is that of before until
    H q has decayed as well. So ||a|| is then compared with what ||grad_v f|| last was: q is waited
    for once, and a silence that lasts costs one evaluation per step.
    """

    lower_steps = Count(auto=True)
    certificate_tolerance = Number("lie in (0, 1)", "q = 0 has 1, 0.05 is usual")
    max_lower_steps = Count()
    warmup_steps = Fixed()

    def _start_waiting(self, warmup_steps: int) -> None:
        check_count("warmup_steps", warmup_steps, at_least=0)
        self.warmup_steps = warmup_steps
        self._counts = {"steps": 0, "gradient_evaluations": 0, "warmup_left": warmup_steps}
        # By the last evaluation; ||grad_v f|| where it was last above 0.
        self._counts |= {"certified": False, "slope": 0.0, "vain_waits": 0}

    def _described(self) -> dict[str, str]:
        rule = type(self.penalty.rule).__name__
        return {
            "penalty": f"{self.penalty.name} by {rule}, lower_steps={self.lower_steps!r}",
            "curvature": summary.of_engine(self.curvature),
            "progress": summary.of_progress(self._counts, self.metrics),
        }

    def _most_lower_steps(self) -> int:
        """Of one call of ``step``; at least 1."""
        return self.max_lower_steps if self.lower_steps == "auto" else self.lower_steps

    def _certify(self, norms: Norms) -> None:
        """Would u follow the hypergradient of this evaluation?"""
        self._counts["certified"] = norms.certificate <= self.certificate_tolerance
        self._counts["slope"] = norms.asked

    def _warms_up(self, norms: Norms) -> bool:
        """Is the hypergradient of this step still too rough for u to follow it?

        A silent f says nothing of what comes, so that it does not end the warm-up for good.
        """
        ready = norms.certificate <= _WARM
        left = self._counts["warmup_left"]
        self._counts["warmup_left"] = 0 if ready and norms.slope > 0 else max(left - 1, 0)
        return left > 0 and not ready

    def _descend(self, losses: Losses, shared: bool) -> Seen:
        """The lower steps of one call.

        Where the last evaluation serves u, ``"auto"`` asks for its derivatives once the
        evaluation before was certified: those of the others would be for nothing.
        """
        waits = self.lower_steps == "auto"
        left = self._most_lower_steps()
        while True:
            serves = left == 1 or (waits and bool(self._counts["certified"]))
            seen = self._move_lower_together([self._evaluate(losses, for_upper=shared and serves)])
            left -= 1
            if left == 0 or (waits and self._counts["certified"] and (serves or not shared)):
                if waits:
                    self._warn_of_vain_waits(seen.norms)
                return seen

    def _warn_of_vain_waits(self, norms: Norms) -> None:
        """Once, of waits that end by their number of steps alone; warm-up is another wait."""
        counts = self._counts
        if counts["vain_waits"] == _PATIENCE or counts["warmup_left"] > 0:
            return
        counts["vain_waits"] = 0 if counts["certified"] else counts["vain_waits"] + 1
        if counts["vain_waits"] == _PATIENCE:
            warn(
                f'lower_steps="auto" has taken all max_lower_steps={self.max_lower_steps} lower '
                f"steps in {_PATIENCE} calls in a row: ||grad_v f + H q|| is still "
                f"{norms.certificate:.2g} of ||grad_v f||, and certificate_tolerance is "
                f"{self.certificate_tolerance:g}. The noise of minibatches or dropout and kinks "
                "(ReLU, max) may keep it above for good: then choose a number, lower_steps=5. "
                "Without them: a smaller upper_lr, a larger lower_lr, weight decay in g, or a "
                "larger certificate_tolerance"
            )

    def _evaluate(self, losses: Losses, *, for_upper: bool) -> Seen:
        raise NotImplementedError

    def _move_lower_together(self, held: list[Seen]) -> Seen:
        raise NotImplementedError
