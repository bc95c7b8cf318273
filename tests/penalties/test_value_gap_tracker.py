"""The value gap's tracker z: it sees what v sees and moves as v moves."""

import pytest
import torch
from oracles import ValueGapTwin
from problems import normal
from stepping import A, C, build, close, closures, quadratic_f, quadratic_g, start
from tasks import Net
from torch import nn

from torch_penalty_bilevel import NondeterministicClosureError, PenaltyBilevelOptimizer, ValueGap


def test_both_points_see_the_same_batch_mask_and_statistics():
    task = Net().run(3)
    task.seen.clear()
    running = [b.clone() for b in task.net.buffers()]
    task.run(1)
    (mask, at_v), (mask_again, at_z) = task.seen
    assert torch.equal(mask, mask_again)  # the same units dropped
    assert 0 < int(mask.sum()) < mask.numel()
    assert not torch.equal(at_v, at_z)
    # BatchNorm moved once, by v's forward pass: num_batches_tracked counts it.
    assert int(list(task.net.buffers())[2] - running[2]) == 1


def test_masks_change_between_steps_and_the_stream_is_that_of_one_evaluation():
    """The second evaluation draws nothing: the next random number is as with one fewer call."""
    drawn = []
    for penalty in ("value", "stationarity"):
        task = Net(penalty, curvature="double_backward").run(2)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    task = Net().run(4)
    masks = [mask for mask, _ in task.seen]
    assert not torch.equal(masks[-1], masks[-3])


def test_a_closure_that_draws_other_data_is_refused():
    u, v, optimizer = build(*start(), penalty="value")
    numbers = iter(range(100))
    with pytest.raises(NondeterministicClosureError, match="draw the batch outside"):
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v) * (1 + next(numbers)))


def test_value_reduces_two_shards_to_one_batch():
    """Every term is linear in the data: averaged shards are the whole batch."""
    x, y = normal(8, 4, seed=61), normal(8, seed=62)

    def losses(rows):
        def f(u, v):
            return (x[rows] @ v - y[rows]).square().mean() + u @ u

        def g(u, v):
            return (x[rows] @ v - u.sum()).square().mean() + 0.1 * v @ v

        return f, g

    whole = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    f, g = losses(slice(None))
    for _ in range(5):
        whole[2].step(lambda: f(*whole[:2]), lambda: g(*whole[:2]))
    tape = []
    for shard in (slice(0, 4), slice(4, 8)):
        u, v, optimizer = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
        recorded = []
        optimizer.reduce = lambda tensors: recorded.append(tensors) or tensors  # noqa: B023
        f, g = losses(shard)
        optimizer.step(lambda: f(u, v), lambda: g(u, v))  # noqa: B023
        tape.append(recorded)
    # The first step asks what depends on what; then one reduction per evaluation, whose average is
    # the whole batch's; and one number at the end: did the rules' own steps fail anywhere?
    assert [len(t) for t in tape] == [3, 3]
    u, v, optimizer = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    pairs = zip(*tape, strict=True)
    optimizer.reduce = lambda _: tuple((a + b) / 2 for a, b in zip(*next(pairs), strict=True))
    optimizer.step(lambda: f(u, v), lambda: g(u, v))
    one = build(*start(), penalty="value", upper_lr=0.05, lower_lr=0.05)
    f, g = losses(slice(None))
    one[2].step(lambda: f(*one[:2]), lambda: g(*one[:2]))
    close(u.detach(), one[0].detach())
    close(v.detach(), one[1].detach())


def test_autocast_copies_do_not_survive_the_swap():
    """Inside a caller's autocast block z must not be evaluated with cached copies of v."""
    u = torch.zeros(1, requires_grad=True)
    net = nn.Linear(2, 1, bias=False).float()
    optimizer = PenaltyBilevelOptimizer(
        [u], torch.optim.SGD(net.parameters(), lr=0.5), penalty=ValueGap(1.0, relative=False)
    )
    x = torch.ones(4, 2)
    seen = []

    def lower():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x.float())
        seen.append(float(out.detach()[0, 0]))
        return (out.float() - u.float()).square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            optimizer.step(lambda: (net(x.float()).float() + 2).square().mean(), lower)
    assert abs(seen[-2] - seen[-1]) > 0.1  # v was pulled away from z


# It moves by the lower level's rule.


def test_tracker_starts_where_v_is_at_the_first_step():
    """Weights loaded after construction count."""
    u, v, optimizer = build(*start(), penalty="value")
    with torch.no_grad():
        v += 1.0
    moved = v.detach().clone()
    optimizer.step(*closures("curved", u, v, "auto"))
    tracker = optimizer._own_state()["tracker"][0]
    assert float((tracker - moved).norm()) < 0.1


def test_tracker_moves_by_the_lower_rule_with_its_options_and_hooks():
    """SGD with momentum under a clipping hook, by hand."""
    u, v = (t.requires_grad_() for t in start())
    rule = torch.optim.SGD([v], lr=0.1, momentum=0.5)
    optimizer = PenaltyBilevelOptimizer([u], rule, penalty="value", upper_lr=0.01)
    rule.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_([v], 0.5) and None)
    z, velocity = v.detach().clone(), torch.zeros(4)
    for _ in range(5):
        t = A @ z + C.T @ u.detach()
        velocity = 0.5 * velocity + t * min(1.0, float(0.5 / (t.norm() + 1e-6)))
        z = z - 0.1 * velocity
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v))
        close(optimizer._own_state()["tracker"][0], z, 1e-12)
    assert list(rule.state) == [v]


def test_a_rule_that_counts_in_its_groups_counts_each_step_once():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    u, v = (t.requires_grad_() for t in start())
    optimizer = PenaltyBilevelOptimizer([u], Counting([v], lr=0.1), penalty="value")
    for _ in range(3):
        optimizer.step(lambda: quadratic_f(u, v), lambda: quadratic_g(u, v))
    assert optimizer.lower.param_groups[0]["count"] == 3


@pytest.mark.parametrize("curvature", ["auto", "functional"])
def test_value_freezes_in_functional_mode_too(curvature):
    """With a frozen tensor both modes make the same step."""
    u, v = (t.requires_grad_() for t in start())
    held = torch.ones(4)
    optimizer = PenaltyBilevelOptimizer(
        [u], [held.requires_grad_(), v], penalty="value", curvature=curvature, lower_lr=0.05
    )
    held.requires_grad_(False)
    f = lambda a, b: quadratic_f(a[0], b[1] + 0.1 * b[0])  # noqa: E731
    g = lambda a, b: quadratic_g(a[0], b[1] + 0.1 * b[0])  # noqa: E731
    twin = ValueGapTwin(
        lambda a, b: quadratic_f(a, b + 0.1), lambda a, b: quadratic_g(a, b + 0.1), *start(), 0.05
    )
    twin.upper.lr = 1e-3
    for _ in range(4):
        if curvature == "functional":
            optimizer.step(f, g)
        else:
            optimizer.step(lambda: f((u,), (held, v)), lambda: g((u,), (held, v)))
        twin.step()
    close(v.detach(), twin.v)
    close(u.detach(), twin.u)
    assert torch.equal(held, torch.ones(4))
