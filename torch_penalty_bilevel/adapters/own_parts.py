"""A penalty, a rule or an engine of one's own, tried on a problem of nine numbers.

When the optimizer is built, so that a step has nothing to check: what is missing, and what has
another form than the optimizer takes, is an error that says what to write. Whatever else goes wrong
on that problem is nobody's fault (an engine may serve one network only), and shows in a step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..curvature import Curvature, DoubleBackward, Linearised
from ..evaluation import Evaluation, measure
from ..multipliers import DualState, MultiplierRule
from ..penalties import Losses, Penalty, one_worker
from ..tensors import Pair
from ..undo.random_state import RandomState

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]
_OF_RULE = ("start", "adjoint", "lower_update")
_OF_ENGINE = ("gradient", "linearise")
_SEE = "see examples/extending"


class _Untold(Exception):
    """Something of the user's failed, for a reason that may be the small problem's."""


class _Problem(NamedTuple):
    at: Pair
    losses: Losses


def check_engine(engine: Curvature) -> None:
    """Raise ``TypeError`` where an engine of one's own has not what the optimizer takes."""
    if _is_own(engine):
        _require(f"curvature={_name(engine)}", engine, Curvature, _OF_ENGINE, ["name"])
        with _trial():
            _try_engine(_copied(engine))


def check_penalty(penalty: Penalty, engine: Curvature) -> None:
    """The same of a penalty and its rule; ``engine`` is looked at by ``check_engine``."""
    rule = penalty.rule
    if _is_own(rule):
        others = [n for n in vars(MultiplierRule) if not n.startswith("_")]
        _require(
            f"the rule {_name(rule)}",
            rule,
            MultiplierRule,
            _OF_RULE,
            ["shares_evaluation", *others],
        )
    if _is_own(penalty) or _is_own(rule):
        with _trial():
            _try_penalty(_copied(penalty), _copied(engine) if _is_own(engine) else DoubleBackward())


def check_state(rule: MultiplierRule, state: Any, lower: tuple[Tensor, ...], by: str) -> None:
    """Raise ``TypeError`` unless ``state`` is one of these lower parameters."""
    if not _is_own(rule):
        return
    who = f"{_name(rule)}.{by}"
    if not isinstance(state, DualState):
        raise TypeError(
            f"{who} returned {_kind(state)} for the state; it is a multipliers.DualState or a "
            f"dataclass that extends it, made by State.at(lower) ({_SEE})"
        )
    kind = type(state).__name__
    for field in state.lists():
        entries = getattr(state, field)
        if not isinstance(entries, tuple):
            raise TypeError(
                f"{who} returned a {kind} whose {field} is {_kind(entries)}; it is a tuple with "
                f"an entry per lower parameter, here {len(lower)}"
            )
        if len(entries) != len(lower):
            raise TypeError(
                f"{who} returned a {kind} whose {field} has {len(entries)} entries for "
                f"{len(lower)} lower parameters; the first state is {kind}.at(lower, ...), not "
                f"{kind}(...)"
            )
    _check_tensors(f"{who} returned a {kind} whose multiplier", state.multiplier, lower)
    for field in _own_fields(state):
        value = getattr(state, field)
        if not (_is_number(value) or dataclasses.is_dataclass(value)):
            raise TypeError(
                f"the field {field!r} of {kind} holds {_kind(value)}; a tensor per lower parameter "
                f"is declared as {field}: Tensors = along(ZEROS) (multipliers.along), all other "
                "fields are numbers"
            )


# What is missing.


def _is_own(part: Any) -> bool:
    return type(part).__module__.partition(".")[0] != _PACKAGE


def _require(
    who: str, part: Any, base: type[Any], methods: tuple[str, ...], others: list[str]
) -> None:
    """Methods that the base class only names, and whatever else has no default."""
    missing = [n for n in methods if getattr(type(part), n, None) is getattr(base, n)]
    missing += [n for n in others if not hasattr(part, n)]
    if missing:
        raise TypeError(f"{who} lacks {missing}; write them ({_SEE})")


def _own_fields(state: DualState) -> list[str]:
    """Numbers among the fields that a state adds to those of this package."""
    here = [kind for kind in type(state).__mro__ if kind.__module__.startswith(_PACKAGE)]
    known = {f.name for k in here if dataclasses.is_dataclass(k) for f in dataclasses.fields(k)}
    return [f.name for f in dataclasses.fields(state) if f.name not in known | {*state.lists()}]


def _is_number(value: Any) -> bool:
    try:
        return value is not None and isinstance(float(value), float)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of many
        return False


# The trial.


@contextlib.contextmanager
def _trial() -> Generator[None]:
    """Nothing of it is left, and nothing that only the small problem brought about is told."""
    random = RandomState([torch.device("cpu")])
    with warnings.catch_warnings(), torch.enable_grad(), contextlib.suppress(_Untold):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.restore()


def _problem(engine: Curvature, is_map: bool) -> _Problem:
    """The losses f = <v, v> / 2 + <u, 1>, g = <v, v> + <u, 1> <v, 1>; or Phi = v / 2 + <u, 1>."""

    def leaf(*shape: int) -> Tensor:
        ones = torch.full(shape, 0.5, dtype=torch.float32, device="cpu")
        return ones.requires_grad_()

    def total(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([t.sum() for t in tensors]).sum()

    live = Pair((leaf(2), leaf(1, 1)), (leaf(3), leaf(), leaf(1, 2)))

    def at(upper: Any, lower: Any) -> Pair:
        return live if engine.reads_live else Pair(upper, lower)

    def upper_loss(*point: Any) -> Tensor:
        u, v = at(*point)
        return total(tuple(t.square() for t in v)) / 2 + total(u)

    def lower_loss(*point: Any) -> Any:
        u, v = at(*point)
        if is_map:
            return tuple(t / 2 + total(u) for t in v)
        return total(tuple(t.square() for t in v)) + total(u) * total(v)

    return _Problem(engine.point(live), Losses(upper_loss, lower_loss))


def _try_engine(engine: Curvature) -> None:
    at, losses = _problem(engine, is_map=False)
    who = f"curvature={_name(engine)}"
    pair = "OptionalPair(upper, lower), a tuple for each level with a tensor or None per parameter"
    found = _attempted(lambda: engine.gradient(losses.upper, at))
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
        raise TypeError(
            f"{who}.gradient returned {_kind(found)}; return the detached loss and {pair} ({_SEE})"
        )
    _check_pair(f"{who}.gradient", found[1], at, pair)
    linearised = _attempted(lambda: engine.linearise(losses.lower, at, reusable=True))
    if not isinstance(linearised, Linearised):
        raise TypeError(
            f"{who}.linearise returned {_kind(linearised)}; return curvature.Linearised(loss, "
            f"residual, product) ({_SEE})"
        )
    _check_tensors(f"the residual of {who}.linearise", linearised.residual, at.lower)
    direction = tuple(torch.ones_like(v, requires_grad=False) for v in at.lower)
    product = _attempted(lambda: linearised.product(direction))
    _check_pair(f"the product of {who}.linearise", product, at, pair)


def _try_penalty(penalty: Penalty, engine: Curvature) -> None:
    at, losses = _problem(engine, penalty.lower_is_map)
    rule, who = penalty.rule, f"penalty={_name(penalty)}.evaluate"
    state = _attempted(lambda: rule.start(at.lower))
    check_state(rule, state, at.lower, "start")
    residual = tuple(torch.ones_like(v, requires_grad=False) for v in at.lower)
    adjoint = _attempted(lambda: rule.adjoint(state, residual))
    _check_tensors(f"what {_name(rule)}.adjoint returned", adjoint, at.lower)
    found = _attempted(lambda: penalty.evaluate(losses, at, state, engine, one_worker))
    if not isinstance(found, Evaluation):
        raise TypeError(
            f"{who} returned {_kind(found)}; return an evaluation.Evaluation, as "
            f"penalties.evaluate_residual makes it ({_SEE})"
        )
    for field in ("adjoint", "residual", "adjoint_residual"):
        _check_tensors(f"the {field} of {who}", getattr(found, field), at.lower)
    _check_tensors(f"the upper_grad of {who}", found.upper_grad, at.upper, optional=True)
    norms = _attempted(lambda: measure(found, ["u", "b"], 1))
    moved = _attempted(lambda: rule.lower_update(state, found, norms))
    if not isinstance(moved, tuple) or len(moved) != 2:
        raise TypeError(
            f"{_name(rule)}.lower_update returned {_kind(moved)}; return two: the gradient for the "
            f"lower rule, a tuple of tensors, and the state after the step ({_SEE})"
        )
    _check_tensors(f"the direction of {_name(rule)}.lower_update", moved[0], at.lower)
    check_state(rule, moved[1], at.lower, "lower_update")
    after = _attempted(lambda: rule.upper_update(moved[1], found, norms))
    check_state(rule, after, at.lower, "upper_update")


def _attempted(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise _Untold from error


def _copied(part: T) -> T:
    return _attempted(lambda: copy.deepcopy(part))


# Forms.


def _check_pair(who: str, pair: Any, at: Pair, wanted: str) -> None:
    if not (hasattr(pair, "upper") and hasattr(pair, "lower")):
        raise TypeError(f"{who} returned {_kind(pair)}; return {wanted} ({_SEE})")
    if _fits(pair.upper, at.lower) and _fits(pair.lower, at.upper):
        raise TypeError(f"{who} returned the levels swapped; return {wanted}")
    _check_tensors(f"the upper part of what {who} returned", pair.upper, at.upper, optional=True)
    _check_tensors(f"the lower part of what {who} returned", pair.lower, at.lower, optional=True)


def _check_tensors(
    who: str, given: Any, like: tuple[Tensor, ...], *, optional: bool = False
) -> None:
    if not _fits(given, like, optional):
        shapes = [tuple(t.shape) for t in like]
        raise TypeError(
            f"{who} is {_kind(given)}; it is to be a tuple with a tensor per parameter, here of "
            f"shapes {shapes}"
        )


def _fits(given: Any, like: tuple[Tensor, ...], optional: bool = True) -> bool:
    if not isinstance(given, (tuple, list)):
        return False
    entries: list[Any] = [*given]
    if len(entries) != len(like):
        return False
    return all(
        optional if entry is None else isinstance(entry, Tensor) and entry.shape == t.shape
        for entry, t in zip(entries, like, strict=True)
    )


def _name(part: Any) -> str:
    return type(part).__name__


def _kind(value: Any) -> str:
    """What a value is, as far as its form goes."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        entries: list[Any] = [*value]
        inner = ", ".join(_kind(e) for e in entries[:5]) + (", ..." if len(entries) > 5 else "")
        return f"{type(value).__name__}({inner})"
    return type(value).__name__
