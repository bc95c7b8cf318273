"""What each method may be told, and what all of them answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from ..arguments import check_count, checked_number
from ..linear_solve import MakeOptimizer
from ..tensors import Tensors

Count: TypeAlias = int | Callable[[int], int]
"""A number, or a function from the number of the step, 0 for the first."""

_SOLVE = {"tolerance", "max_iterations", "damping", "start"}

OPTIONS_OF: Mapping[str, set[str]] = {
    "cg": _SOLVE,
    "cg_normal": _SOLVE,
    "neumann": _SOLVE | {"step_size"},
    "fixed_point": _SOLVE | {"step_size"},
    "stochastic": _SOLVE | {"step_size", "linear_optimizer", "samples"},
    "approx_grad": _SOLVE | {"linear_optimizer"},
    "reverse": {"tolerance", "step_size", "lower_steps", "truncation"},
    "forward": {"tolerance", "step_size", "lower_steps"},
    "one_step": {"tolerance", "step_size"},
    "alternating": {"tolerance"},
}
"""Every method and the options it has; see ``functional.hypergradient``."""

IMPLICIT = frozenset(name for name, options in OPTIONS_OF.items() if "max_iterations" in options)
"""Those that solve the adjoint equation at one point."""


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method; None where the method decides."""

    tolerance: float | None = None
    max_iterations: int | None = None
    damping: float | None = None
    start: Tensors | None = None
    step_size: float | None = None
    lower_steps: int | None = None
    truncation: int | None = None
    linear_optimizer: MakeOptimizer | None = None
    samples: int | None = None


def check_method(method: Any, methods: Mapping[str, set[str]] = OPTIONS_OF) -> None:
    """Raise ``ValueError`` unless there is such a method."""
    if not isinstance(method, str) or method not in methods:
        raise ValueError(f"method must be one of {sorted(methods)}, got {method!r}")


def check_options(method: str, options: MethodOptions) -> None:
    """Raise ``ValueError`` for an option that ``method`` does not have, or one out of range."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    for name, value in given.items():
        if value is not None and name not in OPTIONS_OF[method]:
            raise ValueError(
                f"{name}={value!r} has no effect with method={method!r}, whose options are "
                f"{sorted(OPTIONS_OF[method])}"
            )
    for name, bound in (("tolerance", "> 0"), ("step_size", "> 0"), ("damping", ">= 0")):
        if given[name] is not None:
            must = f"be a finite number {bound}"
            checked_number(name, given[name], must, "None lets the method decide")
    for name in ("max_iterations", "lower_steps", "truncation", "samples"):
        if given[name] is not None:
            check_count(name, given[name], at_least=1)
    if options.max_iterations is not None:
        check_products(method, options, "max_iterations", options.max_iterations)
    maker = options.linear_optimizer
    if maker is not None and options.step_size is not None:
        raise ValueError(
            f"step_size={options.step_size!r} has no effect beside linear_optimizer, which has a "
            "learning rate of its own; pass one of them"
        )
    if maker is not None and not callable(maker):
        raise TypeError(
            "linear_optimizer must be a function from a list of tensors to a torch optimizer, "
            f"got {maker!r}"
        )


def check_products(method: str, options: MethodOptions, name: str, count: int) -> None:
    """Raise ``ValueError`` for fewer products than one iteration takes."""
    in_pairs = method == "cg_normal" or (method == "approx_grad" and not options.linear_optimizer)
    if in_pairs and count < 2:
        raise ValueError(
            f"{name}={count} leaves q where it is with method={method!r}, which takes products in "
            "pairs; give at least 2"
        )


def check_loop(
    method: Any, options: MethodOptions, lower_steps: Any, inner_iterations: Any, warm_start: Any
) -> None:
    """Raise for what an optimizer with live closures cannot do, or options without effect."""
    if method == "forward":
        raise ValueError(
            'method="forward" carries dv/du through pure functions; use '
            'functional.hypergradient(..., method="forward")'
        )
    check_method(method, {name: has for name, has in OPTIONS_OF.items() if name != "forward"})
    check_options(method, options)
    _check_serves_loop(method, options)
    if inner_iterations is not None and method not in IMPLICIT:
        raise ValueError(
            f"inner_iterations={inner_iterations!r} has no effect with method={method!r}, which "
            "does not iterate"
        )
    named = isinstance(warm_start, str) and warm_start in ("lower", "adjoint")
    if not isinstance(warm_start, bool) and not named:
        raise ValueError(
            f'warm_start must be True, False, "lower" or "adjoint", got {warm_start!r}'
        )
    for name, count in (("lower_steps", lower_steps), ("inner_iterations", inner_iterations)):
        if count is not None and not callable(count):
            count_at(name, count, 0)
    if isinstance(inner_iterations, int):
        check_products(method, options, "inner_iterations", inner_iterations)


def _check_serves_loop(method: str, options: MethodOptions) -> None:
    """Raise ``ValueError`` for options that pure functions alone take."""
    if method == "reverse" and options.step_size is not None:
        raise ValueError(
            f'step_size={options.step_size!r} has no effect with method="reverse" here, which goes '
            "back through the steps of the lower rule; set lower_lr"
        )
    if method not in IMPLICIT and options.tolerance is not None:
        raise ValueError(
            f"tolerance={options.tolerance!r} has no effect with method={method!r} here, which "
            "does not iterate; metrics.relative_certificate says how far its q is from exact"
        )


def count_at(name: str, count: Count, number: int) -> int:
    """What a count is in step ``number``; raises ``ValueError`` unless it is at least 1."""
    value: Any = count(number) if callable(count) else count
    check_count(name, value, at_least=1)
    return value
