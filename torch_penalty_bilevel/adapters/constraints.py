"""What a level's constraint argument means to the optimizer: a set, inequalities, multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..constraints import NO_FACES, Face, Faces, Inequality, LowerPoint, Projection
from ..curvature import Loss
from ..curvature.micro_batches import bare, plus
from ..evaluation import Evaluation
from ..levels import Level, names, parameters
from ..multipliers import DualState, MultiplierRule
from ..penalties import Losses, Penalty, Reduce
from ..tensors import Pair, Tensors, placed, zeros_for
from ..undo.random_state import RandomState

Constraint: TypeAlias = Projection | Inequality


class ConstrainedLevel:
    """The constraints of one level; without one, nothing here does anything.

    Args:
        level: whose they are.
        constraint: what the user gave.

    Raises:
        TypeError: not a constraint.
        ValueError: two projections.
    """

    def __init__(self, level: Level, constraint: Constraint | Sequence[Constraint] | None) -> None:
        self.level: Level = level
        self.projection: Projection | None = None
        self.inequalities: tuple[Inequality, ...] = ()
        self.multipliers: Tensors = ()
        """mu or z of each inequality, >= 0; empty until the first evaluation shows their shapes."""
        self._seen: tuple[Tensor, Tensors] | None = None
        """The loss and h in the last evaluation of the augmented loss."""
        given: Any = () if constraint is None else constraint
        each: Any
        for each in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(each, Inequality):
                self.inequalities += (each,)
            elif isinstance(each, type) or not hasattr(each, "project"):
                raise TypeError(
                    f"{level}_constraint must be an object of torch_penalty_bilevel.constraints "
                    f"such as Box(0, 1), or a list of them, got {each!r}"
                )
            elif self.projection is not None:
                raise ValueError(
                    f"{level}_constraint has two projections, {type(self.projection).__name__} and "
                    f"{type(each).__name__}; write all but one as Inequality(...)"
                )
            else:
                self.projection = each

    # Projections.

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
                    f"{float(gap.max()):.3g}; set p.data = constraint.project(p.data) first"
                )

    @property
    def is_free(self) -> bool:
        """No projection: a zero gradient then says that the loss is stationary."""
        return self.projection is None

    @property
    def is_empty(self) -> bool:
        """Neither a projection nor an inequality."""
        return self.is_free and not self.inequalities

    def faces(self, point: Tensors, gradient: Sequence[Tensor | None]) -> Faces:
        """The critical faces of ``point``; a missing gradient counts as zero."""
        projection = self.projection
        if projection is None:
            return NO_FACES
        held = len(self.multipliers) if self.level == "lower" else 0
        pairs = list(zip(point, gradient, strict=True))
        with torch.no_grad():
            found = [
                projection.face(x.detach(), torch.zeros_like(x) if g is None else g)
                for x, g in pairs[: len(pairs) - held]
            ]
        return Faces([*found, *[Face()] * held])

    # Inequalities.

    def with_multipliers(self, loss: Loss, values: Sequence[Loss]) -> Loss:
        """The augmented loss; lower multipliers are the last entries of ``lower``.

        What it saw stays for ``restricted``: a closure that draws, called again, says otherwise.
        """
        if not values:
            return loss

        def terms(upper: Tensors, lower: Tensors, plain: Tensor) -> list[Tensor]:
            seen = [h(upper, lower) for h in values]
            if self.level == "upper":
                self._seen = bare(plain), tuple(bare(h) for h in seen)
                self.multipliers = self.multipliers or zeros_for(self._seen[1])
            z = LowerPoint.of(lower, len(values)).multipliers
            held = self.multipliers if self.level == "upper" else z
            return [
                self._term(*triple) for triple in zip(self.inequalities, seen, held, strict=True)
            ]

        return plus(loss, terms)

    def _term(self, inequality: Inequality, h: Tensor, multiplier: Tensor) -> Tensor:
        """Sum of (max(0, mu + rho h)^2 - mu^2) / (2 rho)."""
        if h.shape != multiplier.shape:
            raise ValueError(
                f"an Inequality of {self.level}_constraint returned shape {tuple(h.shape)}, before "
                f"{tuple(multiplier.shape)}; its multiplier belongs to entries, keep their number"
            )
        multiplier = multiplier.to(h.device)
        shifted = (multiplier + inequality.weight * h).clamp(min=0)
        return (shifted.square() - multiplier.square()).sum() / (2 * inequality.weight)

    def restricted(self, evaluation: Evaluation, at: Pair, reduce: Reduce) -> Evaluation:
        """An upper evaluation with the plain f, h, and the gradient in the critical face's span."""
        upper_loss, values = self._seen or (evaluation.upper_loss, ())
        self._seen = None
        face = self.faces(at.upper, evaluation.upper_grad)
        return evaluation._replace(
            upper_loss=upper_loss,
            upper_grad=face.optional_tangent(evaluation.upper_grad),
            upper_face=face,
            upper_values=reduce(values) if values else (),
        )

    def ascend(self, values: Tensors) -> None:
        """One step: mu <- mu + kappa (max(0, mu + rho h) - mu)."""
        triples = zip(self.inequalities, self.multipliers, values, strict=True)
        self.multipliers = tuple(
            mu + i.rate * ((mu + i.weight * h.to(mu)).clamp(min=0) - mu) for i, mu, h in triples
        )

    def ascend_jointly(
        self, rule: MultiplierRule, before: DualState, after: DualState, evaluation: Evaluation
    ) -> DualState:
        """Move z along its residual, and in ``after`` the z part of nu along its own."""
        if not (k := len(self.multipliers)):
            return after
        residual = LowerPoint.of(evaluation.residual, k).multipliers
        triples = zip(self.inequalities, self.multipliers, residual, strict=True)
        self.multipliers = tuple(
            (z.detach() + i.rate * i.weight * r.to(z)).clamp(min=0) for i, z, r in triples
        )
        bound = rule.curvature_bound(after)
        steps = [min(i.weight, 1 / bound if bound else i.weight) for i in self.inequalities]
        nus = LowerPoint.of(before.multiplier, k).multipliers
        slopes = LowerPoint.of(evaluation.adjoint_residual, k).multipliers
        triples = zip(steps, nus, slopes, strict=True)
        ascended = tuple(nu + step * a.to(nu) for step, nu, a in triples)
        v = LowerPoint.of(after.multiplier, k).parameters
        return after.but(multiplier=LowerPoint(v, ascended).row)

    def check(self, saved: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` if ``saved`` are the multipliers of other inequalities."""
        here = [tuple(t.shape) for t in self.multipliers]
        there = [tuple(t.shape) for t in saved]
        fits = len(saved) in (0, len(self.inequalities)) and (not here or here == there)
        if not fits:
            raise ValueError(
                f"the checkpoint has {self.level} inequalities of shapes {there}, here are "
                f"{len(self.inequalities)} (of shapes {here} so far); construct with the same ones"
            )


def upper_projection(constraint: Any, rule: Optimizer) -> ConstrainedLevel:
    """The upper level held to a set; raises ``ValueError`` for an ``Inequality``."""
    restriction = ConstrainedLevel("upper", constraint)
    if restriction.inequalities:
        raise ValueError(
            "upper_constraint takes a projection such as Box(0, 1) here; an Inequality needs "
            "PenaltyBilevelOptimizer"
        )
    restriction.check_start(names(rule, "upper"), parameters(rule))
    return restriction


class ConstrainedLevels:
    """The constraints of both levels.

    Args:
        upper_constraint: what the user gave.
        lower_constraint: likewise.
        upper_rule: its parameters must start inside.
        lower_rule: likewise.
    """

    def __init__(
        self,
        upper_constraint: Any,
        lower_constraint: Any,
        upper_rule: Optimizer,
        lower_rule: Optimizer,
    ) -> None:
        self.upper = ConstrainedLevel("upper", upper_constraint)
        self.lower = ConstrainedLevel("lower", lower_constraint)
        self.inequalities = self.upper.inequalities, self.lower.inequalities
        for each, rule in ((self.upper, upper_rule), (self.lower, lower_rule)):
            each.check_start(names(rule, each.level), parameters(rule))

    @property
    def multipliers(self) -> tuple[Tensors, Tensors]:
        """Mu and z."""
        return self.upper.multipliers, self.lower.multipliers

    @multipliers.setter
    def multipliers(self, held: tuple[Tensors, Tensors]) -> None:
        self.upper.multipliers, self.lower.multipliers = held

    def check_penalty(self, penalty: Penalty, dual: DualState) -> None:
        """Raise ``ValueError`` if the penalty or its rule cannot serve the lower level."""
        if not self.lower.is_empty and not penalty.takes_lower_constraints:
            raise ValueError(
                f"penalty={penalty.name!r} cannot serve a lower_constraint: its hypergradient does "
                'not see which part of v is held; use penalty="stationarity", or constrain the '
                "upper level only"
            )
        if self.lower.inequalities and getattr(penalty.rule, "correct_lower", False):
            raise ValueError("an Inequality in lower_constraint needs correct_lower=False")
        if self.lower.inequalities and penalty.rule.curvature_bound(dual) is None:
            raise ValueError(
                "an Inequality in lower_constraint needs a multiplier rule that knows a bound on "
                'H: use penalty="stationarity" with LeastSquares() and no preconditioner, or a '
                "Box, Simplex or Ball"
            )

    def check_comparable(self) -> None:
        """Raise ``ValueError`` unless implicit differentiation of g alone is the reference."""
        for each in (self.lower, self.upper):
            if each.inequalities or (each.level == "lower" and not each.is_free):
                raise ValueError(
                    "check_hypergradient compares with implicit differentiation of an "
                    f"unconstrained lower level and takes no {each.level}_constraint other than an "
                    "upper projection; watch optimizer.metrics.adjoint_residual_norm, or check an "
                    "optimizer built without it"
                )

    def start(self, losses: Losses, at: Pair, dual: DualState) -> DualState:
        """Zero multipliers of the lower level where there are none yet, and room for z in ``dual``.

        Those of the upper level come with the first evaluation; z is a variable of it.
        """
        if len(self.lower.multipliers) == len(losses.lower_values):
            return dual
        random = RandomState(p.device for p in (*at.upper, *at.lower))
        self.lower.multipliers = zeros_for([h(*at).detach() for h in losses.lower_values])
        random.restore()
        return dual.extended(self.lower.multipliers)

    def applied(self, losses: Losses) -> Losses:
        """Both losses with their multiplier terms, and the faces of v."""
        return losses._replace(
            upper=self.upper.with_multipliers(losses.upper, losses.upper_values),
            lower=self.lower.with_multipliers(losses.lower, losses.lower_values),
            lower_faces=self.lower.faces,
        )

    def extended(self, at: Pair) -> Pair:
        """(u, (v, z)), with z as leaves of the graphs to come."""
        self.lower.multipliers = tuple(z.detach().requires_grad_() for z in self.lower.multipliers)
        return Pair(at.upper, LowerPoint(at.lower, self.lower.multipliers).row)

    # Checkpoints.

    def saved(self) -> dict[str, list[Tensor]]:
        """Mu and z by level, for a state dict; tensors are not copied."""
        return {r.level: [t.detach() for t in r.multipliers] for r in (self.upper, self.lower)}

    def check(self, entries: dict[str, list[Tensor]], dual: DualState) -> DualState:
        """``dual`` with room for the z of a checkpoint; ``ValueError`` if it does not fit."""
        self.upper.check(entries["upper"])
        self.lower.check(entries["lower"])
        return dual if self.lower.multipliers else dual.extended(entries["lower"])

    def load(self, entries: dict[str, list[Tensor]], device: torch.device) -> None:
        """Take over multipliers."""
        for each in (self.upper, self.lower):
            saved = entries[each.level]
            each.multipliers = placed(saved, each.multipliers or [t.to(device) for t in saved])
