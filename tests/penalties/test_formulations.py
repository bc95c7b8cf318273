"""What both other formulations promise: resuming, copies, frozen parameters, all or nothing."""

import copy

import pytest
import torch
from tasks import Net, assert_unchanged, everything

from torch_penalty_bilevel import NonFiniteError

FORMULATIONS = ["value", "fixed_point"]


class Chain(Net):
    """The same data with a map: one damped gradient step on the loss, noisy by dropout."""

    def lower(self):
        if self.optimizer.penalty.name == "value":
            return super().lower()
        hidden = self.net(self.x[self.batch])
        pull = (self.weights[self.batch].sigmoid()[:, None] * hidden).mean()
        return tuple(0.5 * p + 0.1 * pull for p in self.net.parameters())


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_resume_is_bit_equal(penalty, at, tmp_path):
    whole = Chain(penalty, lower_steps=2).run(at)
    state = {
        "net": whole.net.state_dict(),
        "weights": whole.weights.detach(),
        "optimizer": whole.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    whole.run(5)
    resumed = Chain(penalty, lower_steps=2)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.net.load_state_dict(loaded["net"])
    with torch.no_grad():
        resumed.weights.copy_(loaded["weights"])
    resumed.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    resumed.run(5)
    assert torch.equal(whole.point(), resumed.point())
    assert torch.equal(whole.optimizer.adjoint[0], resumed.optimizer.adjoint[0])


@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_deepcopy_continues_bit_equally(penalty):
    one = Chain(penalty).run(3)
    two = copy.deepcopy(one)
    state = torch.get_rng_state()
    one.run(3)
    torch.set_rng_state(state)
    assert torch.equal(two.run(3).point(), one.point())


def test_checkpoints_of_another_formulation_are_refused():
    saved = Chain("fixed_point").run(1).optimizer.state_dict()
    for penalty in ("value", "stationarity"):
        with pytest.raises(ValueError, match="made with penalty 'fixed_point', this optimizer"):
            Chain(penalty).optimizer.load_state_dict(saved)


@pytest.mark.parametrize("penalty", FORMULATIONS)
def test_groups_may_be_added_and_parameters_frozen(penalty):
    task = Chain(penalty).run(2)
    extra = torch.full((2,), 0.5, requires_grad=True)
    task.optimizer.add_param_group({"params": [extra], "level": "lower"})
    lower = task.lower

    def with_extra():
        value = lower()
        bent = 0.3 * extra + 0.1 * task.weights.sum()
        return (*value, bent) if penalty == "fixed_point" else value + (extra - bent).square().sum()

    task.lower = with_extra
    task.run(2)
    assert not torch.equal(extra.detach(), torch.full((2,), 0.5))
    frozen = task.net[0].weight
    frozen.requires_grad_(False)
    frozen.grad = None
    task.net.zero_grad()
    held = frozen.detach().clone()
    before = copy.deepcopy(task.optimizer._own_state())
    task.run(3)
    after = task.optimizer._own_state()
    assert torch.equal(frozen, held)
    assert torch.equal(before["multiplier"][0], after["multiplier"][0])
    assert not torch.equal(before["multiplier"][1], after["multiplier"][1])
    if penalty == "value":  # a frozen v is its own tracker
        assert torch.equal(after["tracker"][0], held)
        assert not torch.equal(before["tracker"][1], after["tracker"][1])
    frozen.requires_grad_(True)
    task.run(1)
    assert not torch.equal(frozen.detach(), held)


# All or nothing.


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("penalty", FORMULATIONS)
@pytest.mark.parametrize("warm", [0, 2])
def test_a_raising_closure_leaves_everything_untouched(penalty, lower_steps, warm):
    """At every call of either closure, the second call of a value evaluation included."""
    for fatal in range(1, 40):
        task = Chain(penalty, lower_steps=lower_steps).run(warm)
        before = everything(task), tracked(task)
        calls = 0

        def trap(closure, fatal=fatal):
            nonlocal calls
            calls += 1
            loss = closure()
            if calls == fatal:
                raise KeyError("stop")
            return loss

        try:
            task.optimizer.step(lambda: trap(task.upper), lambda: trap(task.lower))  # noqa: B023
        except KeyError:
            assert_unchanged(before[0], task)
            assert_same(before[1], tracked(task))
        else:
            break
    per_evaluation = 3 if penalty == "value" else 2
    # These lines of code are new to a warm optimizer, which looks once at what they use, and
    # whether g repeats at v, as z has left it.
    once = 2 + (penalty == "value")
    assert calls == per_evaluation * lower_steps + (once if warm else 0)


def tracked(task):
    own = task.optimizer._own_state()
    moments = [torch.as_tensor(x).clone() for m in own.get("moments", []) for x in m.values()]
    return [t.clone() for t in own.get("tracker", [])] + moments


def assert_same(before, after):
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lower_steps", [1, 3])
def test_a_hook_that_raises_in_the_trackers_step_undoes_it(lower_steps):
    task = Chain("value", lower_steps=lower_steps).run(2)
    before = everything(task), tracked(task)

    def stop(*_):
        raise KeyError("stop")

    handle = task.optimizer.lower.register_step_post_hook(stop)
    with pytest.raises(KeyError):
        task.optimizer.step(task.upper, task.lower)
    handle.remove()
    assert_unchanged(before[0], task)
    assert_same(before[1], tracked(task))
    task.run(1)


@pytest.mark.parametrize(
    ("penalty", "quantity", "call"),
    [
        ("value", "lower loss g", 1),
        ("value", r"lower loss g\(u, z\) at the tracker", 2),
        ("value", r"tracker residual grad_v g\(u, z\)", -2),
        ("fixed_point", "lower loss g", 1),
    ],
)
def test_a_non_finite_quantity_is_named_and_nothing_changes(penalty, quantity, call):
    task = Chain(penalty).run(3)
    before = everything(task), tracked(task)
    calls = 0

    def lower():
        nonlocal calls
        calls += 1
        value = task.lower()
        if calls != abs(call) + 1:  # the first looks at what these new lines of code use
            return value
        if call < 0:  # finite with an infinite slope at this very point
            bias = task.net[4].bias
            return value + (bias - bias.detach()).square().pow(0.25).sum()
        bad = float("nan")
        return tuple(t * bad for t in value) if isinstance(value, tuple) else value * bad

    with pytest.raises(NonFiniteError, match=f"{quantity} is not finite in step 4"):
        task.optimizer.step(task.upper, lower)
    assert_unchanged(before[0], task)
    assert_same(before[1], tracked(task))
