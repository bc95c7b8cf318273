"""Every penalty with every rule and every engine, what each declares, and what each refuses.

A line per case; ``test_contract.py`` runs the same tests over all of them. Letters: H = d2g/dv2,
J = d2g/du dv (of a map I - Phi_v and -Phi_u, transposed), b and A of the problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.extending.engine import Dense
from examples.extending.multiplier_rule import HeavyBall
from examples.extending.penalty import Regularised
from torch_penalty_bilevel import EpsilonTest, FixedPoint, LeastSquares, Stationarity, ValueGap
from torch_penalty_bilevel.curvature import (
    Automatic,
    Curvature,
    DoubleBackward,
    FiniteDifference,
    VectorJacobian,
)

KAPPA = 0.3


@dataclass(frozen=True)
class Formulation:
    make: Callable[[], Any]
    is_map: bool = False
    shift: float = 0.0
    """kappa of r = grad_v g + kappa v."""


@dataclass(frozen=True)
class Engine:
    make: Callable[[], Curvature]
    serves_maps: bool = True
    takes_pure: bool = False
    """Are the closures functions of (upper, lower)?"""
    tolerance: float = 1e-12


FORMULATIONS = {
    "stationarity": Formulation(Stationarity),
    "stationarity, ridge": Formulation(lambda: Stationarity(LeastSquares(ridge=0.1))),
    "stationarity, two batches": Formulation(lambda: Stationarity(independent_batches=True)),
    "paper": Formulation(lambda: Stationarity(EpsilonTest(tolerance=10.0))),
    "heavy ball": Formulation(lambda: Stationarity(HeavyBall())),
    "regularised": Formulation(lambda: Regularised(KAPPA), shift=KAPPA),
    "value": Formulation(ValueGap),
    "fixed point": Formulation(FixedPoint, is_map=True),
    "fixed point, paper": Formulation(lambda: FixedPoint("paper"), is_map=True),
    "fixed point, heavy ball": Formulation(lambda: FixedPoint(HeavyBall()), is_map=True),
}
ENGINES = {
    "auto": Engine(Automatic),
    "double_backward": Engine(DoubleBackward),
    # Central differences of a loss that is quadratic: rounding alone, eps / 1e-5.
    "finite_difference": Engine(FiniteDifference, serves_maps=False, tolerance=1e-8),
    "functional": Engine(VectorJacobian, takes_pure=True),
    "dense": Engine(Dense, serves_maps=False),
}


def cases() -> list[tuple[str, str]]:
    """Those that are served."""
    return [c for c in itertools.product(FORMULATIONS, ENGINES) if not refused(*c)]


def refused(formulation: str, engine: str) -> bool:
    """A map needs products with a transposed Jacobian."""
    return FORMULATIONS[formulation].is_map and not ENGINES[engine].serves_maps


class Problem:
    """f = |v - b|^2 / 2 + c'u + |u|^2 / 4, g = (v - B u)'A (v - B u) / 2 with v in two tensors;
    as a map Phi = v - (A + N)(v - B u) / 4, N skew, so that its Jacobian is not symmetric."""

    def __init__(self, formulation: Formulation, engine: Engine) -> None:
        draw = torch.Generator().manual_seed(5)
        self.formulation, self.engine = formulation, engine
        root = torch.randn(5, 5, generator=draw)
        self.A = root @ root.T / 5 + torch.eye(5) / 2
        skew = torch.randn(5, 5, generator=draw)
        self.M = (self.A + (skew - skew.T) / 4) / 4
        self.B = torch.randn(5, 3, generator=draw)
        self.b, self.c = torch.randn(5, generator=draw), torch.randn(3, generator=draw)
        self.u = torch.randn(3, generator=draw).requires_grad_()
        self.v = [torch.randn(n, generator=draw).requires_grad_() for n in (2, 3)]
        self.calls = 0

    def _f(self, u: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        return (v - self.b).square().sum() / 2 + self.c @ u + u.square().sum() / 4

    def _g(self, u: Tensor, v: Tensor) -> Any:
        self.calls += 1
        away = v - self.B @ u
        if self.formulation.is_map:
            image = v - self.M @ away
            return image[:2], image[2:]
        return away @ self.A @ away / 2

    @property
    def closures(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if self.engine.takes_pure:
            f, g = ((lambda u, v, h=h: h(u[0], torch.cat(v))) for h in (self._f, self._g))
        else:
            f, g = ((lambda h=h: h(self.u, torch.cat(self.v))) for h in (self._f, self._g))
        return f, g

    @property
    def derivatives(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(grad_u f, grad_v f, J, H) here, written out; J is 3 x 5."""
        u, v = self.u.detach(), torch.cat(self.v).detach()
        curvature = self.M.T if self.formulation.is_map else self.A
        H = curvature + self.formulation.shift * torch.eye(5)
        return self.c + u / 2, v - self.b, -self.B.T @ curvature, H
