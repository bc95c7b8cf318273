"""The race of ``benchmarks/race`` is fair: its methods compute what they are named after."""

import math

import pytest
import torch

from torch_penalty_bilevel.functional import hypergradient

for library in ("PIL", "pooch", "requests", "sklearn", "higher", "tqdm", "matplotlib"):
    pytest.importorskip(library)
torchopt = pytest.importorskip("torchopt")

from racing import TASKS, l2_task  # noqa: E402

from benchmarks.race import l2, methods, mnist, omniglot  # noqa: E402
from examples.shared.task import Rates  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

METHODS = {
    "mnist": methods.methods_of(mnist.GRID, ridge=0.1, damping=1.0),
    "l2": l2._methods(),
    "omniglot": methods.methods_of(omniglot.GRID),
}


@pytest.fixture(params=TASKS)
def start(request):
    """Makes the same task again and again."""

    def make():
        torch.manual_seed(5)
        return TASKS[request.param]()

    make.methods = METHODS[request.param]
    return make


@pytest.mark.long
def test_all_methods_start_alike_and_move_both_levels(start):
    first = start()
    for name, method in start.methods.items():
        task = start()
        for level in ("upper", "lower"):
            pairs = zip(getattr(task, level), getattr(first, level), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(task.upper_loss(), first.upper_loss())
        assert torch.equal(task.lower_loss(), first.lower_loss())
        step = method.start(task, Rates(1e-3, 0.1, method.lower_steps[-1])).step
        for _ in range(3):  # the value gap needs a second step before v and its tracker differ
            step()
        for level in ("upper", "lower"):
            pairs = zip(getattr(task, level), getattr(first, level), strict=True)
            assert all(not torch.equal(a, b) for a, b in pairs), (name, level)


def test_nothing_leaves_the_box():
    for name, method in METHODS["l2"].items():
        task = l2_task()
        step = method.start(task, Rates(0.1, 100.0, 1)).step
        for _ in range(2):  # the first multiplier is 0
            step()
        (u,), box = task.upper, task.upper_constraint
        assert u.min() >= box.low, name
        assert u.max() <= box.high, name
        assert (u == box.low).any() or (u == box.high).any(), name


@pytest.mark.parametrize("iterations", [5, 20])
def test_implicit_row_is_the_hypergradient_by_conjugate_gradients(start, iterations):
    task, ridge = start(), 1e3  # above all negative curvature of these problems
    solve = torchopt.linear_solve.solve_cg(maxiter=iterations, ridge=ridge, rtol=1e-12)
    methods.implicit(task, Rates(1e-3, 0.0, 2), lambda task: solve).step()
    u, v = (tuple(p.detach().clone() for p in level) for level in (task.upper, task.lower))
    ours = hypergradient(
        lambda u, v: task.upper_loss(v, u),
        lambda u, v: task.lower_loss(v, u),
        u,
        v,
        method="cg",
        max_iterations=iterations,
        damping=ridge,
        tolerance=1e-12,
    )[0]
    for p, expected in zip(task.upper, ours, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("which", [0, -1])
def test_unrolled_row_is_the_derivative_of_its_own_adam_steps(start, which):
    """Also in the second upper step, that is, moments (and v, unless it begins anew) are kept."""
    h, directions = 1e-8, [torch.randn_like(p) for p in start().upper]
    names = [name for name in start.methods if "unrolled" in name]
    name, method = names[which], start.methods[names[which]]
    (steps,) = method.lower_steps
    assert name.endswith(f" {steps}")

    def loss_after(shift):
        """F after two upper steps of length zero, u moved by ``shift`` in the last one."""
        task = start()
        rule = torch.optim.Adam(task.lower, lr=1e-3)
        for upper_step in range(2):
            task.begin()
            with torch.no_grad():
                for p, direction in zip(task.upper, directions, strict=True):
                    p.add_(direction, alpha=upper_step * shift)
            for inner_step in range(steps):
                task.draw()
                # higher adds eps before it corrects the bias of the second moment, torch after.
                power = upper_step * steps + inner_step + 1
                rule.param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999**power)
                rule.zero_grad()
                task.lower_loss().backward()
                rule.step()
        return task.upper_loss().item()

    task = start()
    step = method.start(task, Rates(1e-3, 0.0, steps)).step
    step()
    step()
    expected = (loss_after(h) - loss_after(-h)) / (2 * h)
    found = sum((p.grad * d).sum() for p, d in zip(task.upper, directions, strict=True)).item()
    # Central differences of a function of size 2 in float64; Adam is curved, so h is small.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
