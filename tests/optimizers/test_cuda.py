"""On CUDA: the numbers of the CPU, few waits for the device, and all or nothing."""

import io
import random

import pytest
import torch
from contract import cases
from hypergradient_runs import METHODS, SOLVERS, UNROLLED
from torch.optim import SGD, Adam
from twins import Cleaning, Twin
from waiting import waits

from torch_penalty_bilevel import HypergradientOptimizer, minimize
from torch_penalty_bilevel.constraints import Ball, Box, Inequality, NonNegative, Simplex
from torch_penalty_bilevel.functional import hypergradient, penalty_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = "cuda:0"
STEPS = 20


def close(mine, theirs, engine="double_backward"):
    """Float64 sums in another order, which 20 steps amplify by less than 1e5; central differences
    have 1e-11 of rounding in place of 1e-16."""
    tolerance = 1e-6 if engine == "finite_difference" else 1e-10
    torch.testing.assert_close(
        mine.detach().cpu(), theirs.detach().cpu(), rtol=tolerance, atol=tolerance
    )


def assert_twins(mine, theirs, engine):
    close(mine.point(), theirs.point(), engine)
    ours, its = mine.made.metrics, theirs.made.metrics
    close(ours.adjoint_residual_norm, its.adjoint_residual_norm, engine)
    close(ours.upper_loss, its.upper_loss, engine)
    assert ours.gradient_evaluations == its.gradient_evaluations
    for q, other in zip(mine.made.adjoint, theirs.made.adjoint, strict=True):
        close(q, other, engine)


def stepped(twin, steps=STEPS, **options):
    twin.made = twin.optimizer(**options)
    for _ in range(steps):
        twin.made.step(*twin.closures)
    return twin


@pytest.mark.parametrize(("formulation", "engine"), cases())
def test_steps_are_those_of_the_cpu(formulation, engine):
    mine, theirs = (stepped(Twin(formulation, engine, here)) for here in (CUDA, "cpu"))
    assert mine.u.device.type == mine.made.adjoint[0].device.type == "cuda"
    assert_twins(mine, theirs, engine)


# The example's dense engine joins the blocks of a level, so it wants them in one place.
@pytest.mark.parametrize(("formulation", "engine"), [c for c in cases() if c[1] != "dense"])
@pytest.mark.parametrize("places", [(CUDA, "cpu", (CUDA, "cpu")), ("cpu", CUDA, ("cpu", CUDA))])
def test_levels_over_two_devices(formulation, engine, places):
    mine = stepped(Twin(formulation, engine, *places))
    assert [q.device.type for q in mine.made.adjoint] == [d.split(":")[0] for d in places[2]]
    assert_twins(mine, stepped(Twin(formulation, engine, "cpu")), engine)


@pytest.mark.parametrize("kind", ["box", "positive", "simplex", "ball", "inequality"])
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_constraints(kind, level):
    def run(here):
        twin = Twin("stationarity", "auto", here)
        constraint = {
            "box": Box(torch.tensor(-0.5), 0.5),
            "positive": NonNegative(),
            "simplex": Simplex(),
            "ball": Ball(0.7),
            "inequality": Inequality(lambda: torch.cat([twin.u, *twin.v]).square() - 1),
        }[kind]
        for p in [twin.u] if level == "upper" else twin.v:
            if kind != "inequality":
                p.data = constraint.project(p.data)
        return stepped(twin, **{f"{level}_constraint": constraint})

    assert_twins(run(CUDA), run("cpu"), "auto")


@pytest.mark.parametrize("method", METHODS)
def test_hypergradient_optimizer(method):
    def run(here):
        twin = Twin("stationarity", "auto", here)
        rules = SGD([twin.u], lr=0.02), SGD(twin.v, lr=0.1)
        twin.made = HypergradientOptimizer(*rules, method=method, lower_steps=3)
        for _ in range(STEPS):
            twin.made.step(*twin.closures)
        return twin

    assert_twins(run(CUDA), run("cpu"), "auto")


@pytest.mark.filterwarnings("ignore:hypergradient")  # some stop before they have converged
@pytest.mark.parametrize("method", [*SOLVERS, *UNROLLED, "one_step", "alternating"])
def test_functional_hypergradients(method):
    def found(here):
        twin = Twin("stationarity", "auto", here)
        f, g = ((lambda u, v, h=h: h(u, torch.cat(v))) for h in (twin._f, twin._g))
        at = twin.u.detach(), [v.detach() for v in twin.v]
        rate = {"step_size": 0.1} if method == "one_step" else {}
        return hypergradient(f, g, *at, method=method, **rate)

    (mine, info), (theirs, other) = found(CUDA), found("cpu")
    assert mine.device.type == "cuda"
    close(mine, theirs)
    assert info.status == other.status


def test_functional_penalty_gradient_is_compiled_and_mapped():
    twin = Twin("stationarity", "functional", CUDA)
    u, v = twin.u.detach(), torch.cat(twin.v).detach()

    def upper_grad(u, v):
        return penalty_gradient(twin._f, twin._g, u, v, weight=0.5).upper_grad

    eager = upper_grad(u, v)
    close(torch.compile(upper_grad, fullgraph=True)(u, v), eager)
    close(torch.func.vmap(upper_grad, (0, None))(torch.stack([u, 2 * u]), v)[0], eager)


@pytest.mark.parametrize("constraint", [None, Box(-0.3, 0.3), Simplex(), Ball(0.5)])
def test_minimize(constraint):
    def solved(here):
        twin = Twin("stationarity", "auto", here)
        v = torch.cat(twin.v).detach()
        v = v if constraint is None else constraint.project(v)
        start = twin.u.detach(), v
        return minimize(twin._f, twin._g, *start, lower_constraint=constraint)

    mine, theirs = solved(CUDA), solved("cpu")
    assert mine.upper.device.type == "cuda"
    assert mine.status == theirs.status
    # Both stop at the tolerance of 1e-8.
    torch.testing.assert_close(mine.upper.cpu(), theirs.upper, rtol=1e-6, atol=1e-6)


def test_check_hypergradient():
    reports = []
    for here in (CUDA, "cpu"):
        twin = stepped(Twin("stationarity", "double_backward", here))
        reports.append(twin.made.check_hypergradient(*twin.closures))
    assert reports[0].cosine == pytest.approx(reports[1].cosine, rel=1e-8)
    assert str(reports[0])


# A network with statistics and random numbers of its own.

ENGINES = ["double_backward", "finite_difference", "auto"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_batchnorm_and_weights_of_samples(penalty, engine):
    mine, theirs = (
        Cleaning(engine, here, 0.0, penalty=penalty).run(STEPS) for here in (CUDA, "cpu")
    )
    assert int(mine.net[1].num_batches_tracked) == STEPS
    # Adam divides by gradients that are about zero.
    torch.testing.assert_close(mine.point(), theirs.point(), rtol=1e-5, atol=1e-5)


def test_dropout_masks_replay():
    """The certificate and the hypergradient of the same numbers by both engines."""
    seen = []
    for engine in ("double_backward", "finite_difference"):
        torch.manual_seed(5)
        task = Cleaning(engine, CUDA, penalty="paper").run()
        seen.append((task.u.grad, task.made.metrics.adjoint_residual_norm))
    # Central differences err by 1e-9 relative; another mask changes all digits.
    torch.testing.assert_close(*seen, rtol=1e-6, atol=1e-9)


def kept(task):
    generators = torch.cuda.get_rng_state(), torch.get_rng_state()
    return [t.detach().clone() for t in (*task.tensors(), *generators)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_a_step_that_raises_changes_nothing(penalty, engine):
    task = Cleaning(engine, CUDA, penalty=penalty, lower_steps=2).run(6)  # past the first look
    before = task.calls
    task.run()
    in_one_step = task.calls - before
    for fatal in range(1, in_one_step + 1):
        held, drawn = kept(task), random.getstate()
        task.calls, task.fatal = 0, fatal
        with pytest.raises(KeyError):
            task.made.step(task.f, task.g)
        assert all(torch.equal(a, b) for a, b in zip(kept(task), held, strict=True))
        assert random.getstate() == drawn


RULES = {
    "adam": lambda p: Adam(p, lr=0.02),
    "fused": lambda p: Adam(p, lr=0.02, fused=True),
    "capturable": lambda p: Adam(p, lr=0.02, capturable=True),
    "foreach": lambda p: SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "fused SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalty", ["stationarity", "value"])
def test_rules_with_kernels_of_their_own(rule, penalty):
    plain = "adam" if "SGD" not in rule and rule != "foreach" else "foreach"
    mine, theirs = (
        Cleaning("double_backward", CUDA, 0.0, (RULES[name],) * 2, penalty=penalty).run(STEPS)
        for name in (rule, plain)
    )
    # As above: Adam divides by gradients that are about zero.
    torch.testing.assert_close(mine.point(), theirs.point(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_checkpoints_go_over_to_the_cpu_and_back(penalty, rule):
    def build(here):
        return Cleaning("double_backward", here, 0.0, (RULES[rule],) * 2, penalty=penalty)

    def saved(task):
        file = io.BytesIO()
        tensors = {"u": task.u, "shift": task.shift, "net": task.net.state_dict()}
        torch.save({**tensors, "optimizer": task.made.state_dict()}, file)
        return file

    def loaded(file, task, **options):
        file.seek(0)
        found = torch.load(file, weights_only=True, **options)
        task.net.load_state_dict(found["net"])
        task.made.load_state_dict(found["optimizer"])
        with torch.no_grad():
            task.u.copy_(found["u"])
            task.shift.copy_(found["shift"])
        return task

    # Torch loads the counters of capturable rules in float32; they are made in the default dtype.
    torch.set_default_dtype(torch.float32)
    whole = build(CUDA).run(6)
    file = saved(whole)
    whole.run(6)
    if rule != "capturable":  # which only the device has
        on_cpu = loaded(file, build("cpu"), map_location="cpu")
        file = saved(on_cpu)
        torch.testing.assert_close(on_cpu.run(6).point(), whole.point(), rtol=1e-5, atol=1e-5)
    back = loaded(file, build(CUDA), map_location="cpu").run(6)
    assert torch.equal(back.point(), whole.point())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_waits_of_a_step(penalty, engine):
    task = Cleaning(engine, CUDA, penalty=penalty, dtype=torch.float32).run(
        40
    )  # no look of "auto" follows
    evaluations = 2 if penalty == "paper" else 1
    # Of both upper tensors at once, and the rows of the one that has some outside of the batch.
    expected = {"evaluation.py:_on_host": evaluations, "levels/rows.py:_rows_in_batch": 2}
    if penalty == "paper":
        expected["multipliers/published.py:upper_update"] = 1
    found = [waits(task.run) for _ in range(20)]
    assert found == [expected] * 20
