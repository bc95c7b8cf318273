"""What a check of the hypergradient found, and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Repeats = Literal["exactly", "with the same random numbers", "no"]

AGREEMENT = 0.1
"""Relative errors up to here count as agreement."""


class Finding(NamedTuple):
    """One reason not to trust the estimate, or the check of it."""

    name: str
    """A key, e.g. ``"multiplier"``; ``HypergradientReport`` lists all."""
    message: str
    """The cause and the remedy, for a person."""


class Slope(NamedTuple):
    """Derivatives of f(u, v*(u)) along one unit direction d of u."""

    direction: str
    """``"the estimate"`` or ``"a random direction"``."""
    estimate: float
    """<estimate, d>."""
    exact: float
    """<implicit hypergradient at (u, v), d>."""
    resolved: float
    """(f(u + h d, v*(u + h d)) - f(u - h d, v*(u - h d))) / 2h, v* solved for anew."""
    uncertainty: float
    """||q|| (||r+|| + ||r-||) / 2h: what is left of r = grad_v g after solving may add so much."""


@dataclass(frozen=True, eq=False)
class HypergradientReport:
    r"""The optimizer's hypergradient estimate against implicit differentiation at the same (u, v).

    With H = d2g/dv2, J = d2g/du dv, r = grad_v g, q the optimizer's adjoint estimate and
    a = grad_v f + H q,

    .. math::
        \text{estimate} - \text{exact} = J H^{-1} a, \qquad
        \lVert\text{estimate} - \text{exact}\rVert \le
            \lVert J H^{-1}\rVert_2 \, \lVert a\rVert

    .. math::
        \lVert\text{estimate} - \nabla_u f(u, v^*(u))\rVert \le
            \lVert J H^{-1}\rVert_2 \, \lVert a\rVert + c \, \lVert r\rVert

    The first line is an identity for every q: exact = grad_u f - J H^{-1} grad_v f at this (u, v).
    The second adds what it costs that v is not v*(u): v - v* is at most ||r|| / m where H >= m I,
    so c = M / m with M a Lipschitz constant of the implicit formula in v.

    ``findings`` hold, most fundamental first, any of:

    - ``"closures"``: f or g differ from call to call; ``"random"``: they draw random numbers
      (a note: the check holds them fixed);
    - ``"penalty"``: the penalty solves another problem than grad_v g = 0, or has another product;
    - ``"unused"``: an upper parameter that neither f nor grad_v g depends on;
    - ``"dependence"``: grad_v g does not depend on u; ``"upper loss"``: f does not depend on v;
    - ``"curvature"``: H is not positive definite; ``"solve"``: the exact solve stopped early;
    - ``"engine"``: two ways to differentiate g twice disagree;
    - ``"stationary"``: the hypergradient is a small difference of large terms (a note);
    - ``"ridge"``, ``"multiplier"`` (``"adjoint"`` of ``HypergradientOptimizer``), ``"damping"``:
      why estimate and exact differ at this (u, v), or why there is no estimate;
    - ``"lower level"``: v is not near v*(u); ``"landscape"``: it is, and still the re-solved lower
      level says otherwise.
    """

    cosine: float
    """<estimate, exact> / (||estimate|| ||exact||); NaN where one is unknown or zero."""
    relative_error: float
    """||estimate - exact|| / ||exact||; NaN where one is unknown."""
    residual_norm: float
    """||r||_2 = ||grad_v g||_2."""
    adjoint_residual_norm: float
    """||a||_2 = ||grad_v f + H q||_2, the certificate that the optimizer reports; NaN without q."""
    slope_norm: float
    """||grad_v f||_2: what the certificate is for q = 0, so its natural unit."""
    lower_distance: float
    """||H^{-1} r|| / ||v||: about how far v is from v*(u); NaN where H is not positive definite."""
    curvature_along_residual: float
    """<r, H r> / <r, r>; negative: g falls faster than linearly along r. NaN at r = 0."""
    positive_definite: bool
    """The exact solve met positive curvature only."""
    depends_on_upper: bool
    """Does grad_v g depend on u (by the graph, and by a product that is not zero)?"""
    repeats: Repeats
    """Do the closures return the same value when called again?"""
    engine: str
    """What the exact solve differentiated with."""
    engine_difference: float
    """Relative difference of J q, H q between ``engine`` and an independent one; NaN: none ran."""
    products: int
    """Second-order products of the exact solve."""
    solve_residual: float
    """||(H + lambda I) q + grad_v f|| / ||grad_v f|| of the exact solve."""
    solved: bool
    """The exact solve reached its tolerance."""
    damping: float
    """lambda of the exact solve; above 0 it is not quite exact."""
    slopes: tuple[Slope, ...]
    """Finite differences of the re-solved lower level; empty where it was not re-solved."""
    findings: tuple[Finding, ...]
    """What is wrong or remarkable, likely causes first."""
    estimate: tuple[Tensor, ...]
    """The optimizer's hypergradient, one tensor per upper parameter that moves; NaN where its
    adjoint equation has no solution by its method."""
    exact: tuple[Tensor, ...]
    """grad_u f - J H^{-1} grad_v f at (u, v)."""
    same_lower_problem: bool = True
    """Is the residual that the penalty drives to zero grad_v g? ``exact`` is made of that."""

    @property
    def agrees(self) -> bool:
        """Is the estimate right to 10 %?

        Of the re-solved slopes where the lower level was re-solved, as these need first derivatives
        only; else of the implicit formula, which shares the estimate's view of the graph.
        """
        if math.isnan(self.relative_error) or not self.telling:
            return self._fits_formula
        return self._fits_slopes

    @property
    def telling(self) -> tuple[Slope, ...]:
        """The slopes that say something.

        One whose uncertainty is larger than the gradients that it is to judge agrees with all.
        """
        known = [t for t in (_length(self.estimate), _length(self.exact)) if math.isfinite(t)]
        size = max(known, default=0.0)
        return tuple(
            # Three times is what is granted to them.
            s
            for s in self.slopes
            if s.uncertainty <= size or 3 * s.uncertainty < abs(s.resolved) < math.inf
        )

    @property
    def _fits_formula(self) -> bool:
        return self.relative_error <= AGREEMENT

    @property
    def _fits_slopes(self) -> bool:
        """Along the estimate to 10 % of its length, along a random direction of its share there."""
        length = _length(self.estimate)
        entries = sum(t.numel() for t in self.estimate)
        # A random unit direction sees about 1 / sqrt(n) of a vector with n entries.
        shares = {"a random direction": min(1.0, 2.0 / math.sqrt(entries))}
        return all(
            abs(s.resolved - s.estimate)
            <= AGREEMENT * length * shares.get(s.direction, 1.0) + 3 * s.uncertainty
            for s in self.telling
        )

    def _verdict(self) -> str:
        if math.isnan(_length(self.estimate)):
            return "no estimate: the adjoint equation has no solution by this method"
        if not self.same_lower_problem:
            return "no verdict: the penalty solves another lower problem than grad_v g = 0"
        if math.isnan(self.relative_error):
            return "no verdict: the implicit hypergradient does not exist here"
        if self.damping > 0 and not self._fits_formula and (not self.telling or self._fits_slopes):
            return (
                f"the estimate differs from the solution damped by {self.damping:g}, which is not "
                "the exact one; " + ("v re-solved agrees" if self.telling else "damp less")
            )
        if self.agrees and self.slope_norm == 0:
            return (
                "nothing to compare: grad_v f is exactly zero, so that the hypergradient is grad_u "
                "f alone"
            )
        if not self.telling or self._fits_slopes == self._fits_formula:
            return f"the estimate {'agrees' if self.agrees else 'DISAGREES'} with the exact one"
        if self._fits_slopes:
            agrees = "the estimate agrees with the re-solved lower level"
            if any(finding.name == "lower level" for finding in self.findings):
                return f"{agrees}, not with the implicit formula at this v, which is not v*(u)"
            return f"{agrees}; it is the implicit formula by {self.engine} that does not"
        return (
            "the estimate DISAGREES with the re-solved lower level, though it fits the implicit "
            f"formula by {self.engine}"
        )

    def __str__(self) -> str:
        lines = [f"Hypergradient check: {self._verdict()}", *_aligned(self._rows())]
        if self.slopes:
            lines.append("  df(u, v*(u)) along     estimate      exact   v re-solved")
        lines += [
            f"    {s.direction:<19}{s.estimate:>10.3g} {s.exact:>10.3g} "
            f"{s.resolved:>13.3g} ± {s.uncertainty:.0e}"
            for s in self.slopes
        ]
        lines += [f"- {finding.name}: {finding.message}" for finding in self.findings]
        return "\n".join(lines)

    def _rows(self) -> dict[str, str]:
        certificate = f"{self.adjoint_residual_norm:.3g}"
        if self.slope_norm > 0:
            share = self.adjoint_residual_norm / self.slope_norm
            certificate += f" ({share:.2g} of ||grad_v f||)"
        known = not math.isnan(self.lower_distance)
        distance = f"about {self.lower_distance:.2g} ||v||" if known else "unknown"
        end = "converged" if self.solved else "NOT converged"
        rows = {
            "cosine": f"{self.cosine:.6f}",
            "relative error": f"{self.relative_error:.3g}",
            "certificate ||grad_v f + H q||": certificate,
            "residual ||grad_v g||": f"{self.residual_norm:.3g}",
            "distance of v from v*(u)": distance,
            "curvature of g along r": f"{self.curvature_along_residual:.3g}",
            "grad_v g depends on u": "yes" if self.depends_on_upper else "NO",
            "closures repeat": self.repeats,
            "exact solve": f"{end}, {self.products} products by {self.engine}, "
            f"relative residual {self.solve_residual:.0e}",
        }
        if not math.isnan(self.engine_difference):
            rows["products differ between engines"] = f"by {self.engine_difference:.0e}"
        return rows


def _length(tensors: tuple[Tensor, ...]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _aligned(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {label:<{width}}  {value}" for label, value in rows.items()]
