"""``HypergradientOptimizer`` as an optimizer of torch: groups, checkpoints, steps that fail."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypergradient_runs import METHODS, Run
from torch import Tensor

from torch_penalty_bilevel import AdjointError, NonFiniteError, UnusedParameterError
from torch_penalty_bilevel.constraints import Box, Inequality


def test_groups_schedulers_hooks_and_new_groups() -> None:
    run = Run(method="cg", lower_steps=2)
    optimizer = run.optimizer
    assert [g["level"] for g in optimizer.param_groups] == ["upper", "lower"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    run.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.05]
    assert seen == [1]
    w = torch.zeros(2, requires_grad=True)
    optimizer.add_param_group({"params": [w], "level": "lower", "lr": 0.1})
    run.closures = (
        lambda: run.problem.f(run.u, run.v) + (w - 1).square().sum(),
        lambda: run.problem.g(run.u, run.v) + (w - run.u[:2]).square().sum(),
    )
    run.step()
    assert [t.shape for t in optimizer.adjoint] == [run.v.shape, w.shape]
    assert bool((w != 0).all())


def test_frozen_lower_parameters_stay() -> None:
    run = Run(method="cg", lower_steps=2)
    w = torch.ones(2, requires_grad=True)
    run.optimizer.add_param_group({"params": [w], "level": "lower", "lr": 0.1})
    w.requires_grad_(False)
    run.step(2)
    assert torch.equal(w, torch.ones(2))
    assert torch.equal(run.optimizer.adjoint[1], torch.zeros(2))
    assert bool((run.optimizer.adjoint[0] != 0).all())


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_resuming_is_bit_equal(how: str, warm_start: bool) -> None:
    options = {"method": "fixed_point", "lower_steps": 2, "warm_start": warm_start}
    whole = Run(momentum=0.5, **options)
    whole.step(3)
    if how == "state_dict":
        part = Run(momentum=0.5, **options)
        buffer = io.BytesIO()
        torch.save(whole.optimizer.state_dict(), buffer)
        with torch.no_grad():
            part.u.copy_(whole.u)
            part.v.copy_(whole.v)
        buffer.seek(0)
        part.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        part = copy.copy(whole)
        duplicate = copy.deepcopy(whole.optimizer)
        if how == "pickle":
            duplicate = pickle.loads(pickle.dumps(whole.optimizer))
        part.optimizer = duplicate
        (part.u,), (part.v,) = (g["params"] for g in duplicate.param_groups)
        part.closures = (
            lambda: part.problem.f(part.u, part.v),
            lambda: part.problem.g(part.u, part.v),
        )
    whole.step(3)
    part.step(3)
    assert torch.equal(whole.u, part.u)
    assert torch.equal(whole.v, part.v)
    assert torch.equal(whole.optimizer.adjoint[0], part.optimizer.adjoint[0])
    a, b = (r.optimizer.metrics.gradient_evaluations for r in (whole, part))
    assert a == b


def test_a_checkpoint_of_another_method_is_refused() -> None:
    run, other = Run(method="cg"), Run(method="neumann")
    with pytest.raises(ValueError, match="made with method 'cg'"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())


def test_a_checkpoint_of_other_shapes_is_refused_and_changes_nothing() -> None:
    run, other = Run(method="cg"), Run(method="cg")
    run.step(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["state"][1]["bilevel_adjoint"] = torch.zeros(1)
    before = snapshot(run)
    with pytest.raises(ValueError, match=r"adjoint has shapes \[\(1,\)\]"):
        run.optimizer.load_state_dict(state)
    assert same(before, snapshot(run))
    other.optimizer.load_state_dict(run.optimizer.state_dict())


# All or nothing.


def snapshot(run: Run) -> list[Any]:
    state = run.optimizer.state_dict()
    flat = torch.utils._pytree.tree_leaves(state)
    kept = [t.clone() if isinstance(t, Tensor) else t for t in flat]
    metrics = run.optimizer.metrics
    return [run.u.detach().clone(), run.v.detach().clone(), torch.get_rng_state(), metrics, *kept]


def same(left: list[Any], right: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b

    return len(left) == len(right) and all(map(equal, left, right))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("failure", ["raise", "nan"])
def test_a_failing_step_changes_nothing(method: str, warm_start: bool, failure: str) -> None:
    """Fail at every single call of either closure in turn."""
    run = Run(method=method, lower_steps=2, momentum=0.0, warm_start=warm_start)
    run.step(1)
    good, failed = run.closures, 0

    def guarded(closure: Any, calls: list[int], doomed: int) -> Any:
        def call() -> Tensor:
            calls[0] += 1
            torch.rand(())
            if calls[0] == doomed:
                if failure == "raise":
                    raise KeyError("doomed")
                return closure() * float("nan")
            return closure()

        return call

    # The first step with these lines of code looks at them once more, without using the value.
    run.optimizer.step(*(guarded(closure, [0], 0) for closure in good))
    for doomed in range(1, 40):
        calls = [0]
        before = snapshot(run)
        message = ""
        try:
            run.optimizer.step(*(guarded(closure, calls, doomed) for closure in good))
        except (KeyError, NonFiniteError) as error:
            message = str(error)
        if not message:
            break
        failed += 1
        assert same(before, snapshot(run)), doomed
        assert ("doomed" if failure == "raise" else "in step 3; nothing was changed") in message
    assert failed >= 3
    assert failed == calls[0]


def test_an_upper_rule_that_raises_undoes_the_step() -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("upper")

    for warm_start in (True, False):
        run = Run(method="cg", warm_start=warm_start)
        handle = run.optimizer.upper.register_step_pre_hook(refuse)
        before = snapshot(run)
        with pytest.raises(KeyError, match="upper"):
            run.step()
        assert same(before, snapshot(run))
        handle.remove()
        run.step()
        assert run.optimizer._own_state()["steps"] == 1


def test_a_breakdown_of_the_solver_is_an_error() -> None:
    run = Run(method="cg")
    run.problem.A = -run.problem.A
    before = snapshot(run)
    with pytest.raises(AdjointError, match=r"adjoint: curvature .* in step 1; nothing") as raised:
        run.step()
    assert raised.value.status == "negative_curvature"
    assert "cg_normal" in str(raised.value)
    assert same(before, snapshot(run))
    run.optimizer.method = "cg_normal"  # the remedy
    run.step()
    run = Run(method="fixed_point", step_size=10.0)
    with pytest.raises(AdjointError, match="diverged") as raised:
        run.step()
    assert raised.value.status == "diverged"
    assert isinstance(pickle.loads(pickle.dumps(raised.value)), NonFiniteError)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "forward"}, ValueError, "functional.hypergradient"),
        ({"method": "magic"}, ValueError, "method must be one of"),
        ({"truncation": 2}, ValueError, "truncation=2 has no effect with method='cg'"),
        ({"method": "reverse", "inner_iterations": 2}, ValueError, "inner_iterations=2 has no"),
        ({"method": "reverse", "step_size": 0.3}, ValueError, "step_size=0.3 has no effect"),
        ({"method": "reverse", "tolerance": 0.3}, ValueError, "tolerance=0.3 has no effect"),
        ({"method": "one_step", "tolerance": 0.3}, ValueError, "tolerance=0.3 has no effect"),
        ({"method": "alternating", "tolerance": 0.3}, ValueError, "tolerance=0.3 has no effect"),
        (
            {"method": "stochastic", "step_size": 0.3, "linear_optimizer": print},
            ValueError,
            "beside",
        ),
        ({"lower_steps": 0}, ValueError, "lower_steps must be an integer >= 1"),
        ({"inner_iterations": 1.5}, ValueError, "inner_iterations must be an integer >= 1"),
        ({"warm_start": "both"}, ValueError, "warm_start must be"),
        ({"lower_is_map": True, "curvature": "finite_difference"}, ValueError, "transposed"),
        ({"upper_constraint": Inequality(lambda: 0)}, ValueError, "projection"),
        ({"upper_constraint": Box(5, 6)}, ValueError, "starts outside"),
        ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0"),
    ],
)
def test_construction_errors(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Run(**options)


def test_unused_upper_parameters_are_named() -> None:
    run = Run(method="cg")
    w = torch.zeros(2, requires_grad=True)
    run.optimizer.add_param_group({"params": [w], "level": "upper"})
    with pytest.raises(UnusedParameterError, match=r"upper\[1\]"):
        run.step()
    run = Run(method="alternating")
    run.closures = (lambda: run.v.square().sum(), run.closures[1])
    with pytest.raises(UnusedParameterError, match="follows grad_u f alone"):
        run.step()
