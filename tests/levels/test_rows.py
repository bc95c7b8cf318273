"""Upper rows outside the batch, under every rule of torch.optim: they and their moments stay."""

import pytest
import torch
from torch import optim

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.levels.rows import step_touched_rows

DECAY = {"lr": 0.01, "weight_decay": 0.1}
BY_ENTRY = {
    "SGD": lambda p: optim.SGD(p, **DECAY),
    "SGD momentum": lambda p: optim.SGD(p, momentum=0.9, foreach=True, **DECAY),
    "SGD Nesterov": lambda p: optim.SGD(p, momentum=0.9, nesterov=True, foreach=False, **DECAY),
    "SGD fused": lambda p: optim.SGD(p, momentum=0.9, fused=True, **DECAY),
    "Adam": lambda p: optim.Adam(p, **DECAY),
    "Adam AMSGrad": lambda p: optim.Adam(p, amsgrad=True, foreach=True, **DECAY),
    "Adam fused": lambda p: optim.Adam(p, fused=True, **DECAY),
    "Adam ascent": lambda p: optim.Adam(p, maximize=True, **DECAY),
    "AdamW": lambda p: optim.AdamW(p, foreach=False, **DECAY),
    "NAdam": lambda p: optim.NAdam(p, **DECAY),
    "NAdam decoupled": lambda p: optim.NAdam(p, decoupled_weight_decay=True, **DECAY),
    "RAdam": lambda p: optim.RAdam(p, **DECAY),
    "Adamax": lambda p: optim.Adamax(p, **DECAY),
    "Adadelta": lambda p: optim.Adadelta(p, **DECAY),
    "Adagrad": lambda p: optim.Adagrad(p, lr_decay=0.1, initial_accumulator_value=0.2, **DECAY),
    "RMSprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.9, **DECAY),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lambd=0.1, t0=3, **DECAY),
}
MIXING = {
    "Adafactor": lambda p: optim.Adafactor(p, **DECAY),
    "Muon": lambda p: optim.Muon(p, **DECAY),
}
# What they keep once per tensor begins with the first step; the others forget nothing of it.
COUNTING = ("Adam", "NAdam", "RAdam", "Adagrad", "ASGD", "Adafactor")
N, WIDTH = 6, 3


def gradients(rows, shape=(N, WIDTH)):
    return torch.zeros(shape).index_copy(0, rows, torch.randn(len(rows), *shape[1:]))


def leaf(value):
    return value.detach().clone().requires_grad_()


def tensors(rule, p):
    return {k: torch.as_tensor(x).clone() for k, x in rule.state.get(p, {}).items()}


@pytest.mark.parametrize("first", [[0, 2, 3], [2]])
@pytest.mark.parametrize("name", [*BY_ENTRY, *MIXING])
def test_equal_to_a_rule_over_the_rows_in_the_batch(name, first):
    """Bit-equal to it; then rows that were never in begin as if there had been no steps before."""
    make = (BY_ENTRY | MIXING)[name]
    u, first, second = torch.randn(N, WIDTH), torch.tensor(first), torch.tensor([1, 4])
    whole, start = leaf(u), u.clone()
    rule = make([whole])
    for rows in (first, second):
        alone = leaf(u[rows])
        twin = make([alone])
        others = torch.tensor([i for i in range(N) if i not in rows])
        stay = whole.detach()[others].clone()
        for _ in range(5):
            whole.grad = gradients(rows)
            alone.grad = whole.grad[rows].clone()
            step_touched_rows(rule)
            twin.step()
            assert torch.equal(whole.detach()[others], stay)
            assert whole.shape == whole.grad.shape == u.shape
            if rows is first or not name.startswith(COUNTING):
                assert torch.equal(whole.detach()[rows], alone.detach())
                for key, x in tensors(twin, alone).items():
                    mine = torch.as_tensor(rule.state[whole][key])
                    by_row = x.dim() > 0 and key != "col_var"
                    if by_row or rows is first:
                        assert torch.equal(mine[rows] if by_row else mine, x), key
    assert torch.equal(whole.detach()[5], start[5])


@pytest.mark.parametrize("shape", [(N, WIDTH), (N,)])
@pytest.mark.parametrize("name", BY_ENTRY)
def test_equal_to_one_rule_per_row_that_in_absence_only_counts(name, shape):
    make = BY_ENTRY[name]
    whole = torch.randn(shape, requires_grad=True)
    alone = [leaf(whole[i : i + 1]) for i in range(N)]
    rule, twins = make([whole]), [make([p]) for p in alone]
    for count in (3, 1, 6, 0, 2, 1, 4, 3, 2, 5):
        rows = torch.randperm(N)[:count]
        whole.grad = gradients(rows, shape)
        for i, (p, twin) in enumerate(zip(alone, twins, strict=True)):
            p.grad = whole.grad[i : i + 1].clone()
            before, memory = p.detach().clone(), tensors(twin, p)
            twin.step()
            if i in rows:
                continue
            p.data.copy_(before)
            for key, x in twin.state[p].items():
                if key in memory and x.dim() > 0:
                    x.copy_(memory[key])
                elif x.dim() > 0:  # what a rule that has not stepped knows
                    x.copy_(
                        {"ax": before, "step_size": torch.tensor(0.01)}.get(key, torch.zeros(1))
                    )
        step_touched_rows(rule)
        torch.testing.assert_close(whole.detach(), torch.cat(alone).detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(), (N,), (N, WIDTH)])
@pytest.mark.parametrize("name", [*BY_ENTRY, *MIXING])
def test_without_any_gradient_the_rule_only_counts(name, shape):
    """In the first step, and in one after others."""
    if name == "Muon" and len(shape) != 2:
        pytest.skip("torch's Muon takes matrices only")
    u = torch.randn(shape, requires_grad=True)
    rule, start = (BY_ENTRY | MIXING)[name]([u]), u.detach().clone()
    known = {"ax": start, "step_size": torch.tensor(0.01), "sum": torch.tensor(0.2)}
    u.grad = torch.zeros(shape)
    step_touched_rows(rule)
    assert torch.equal(u.detach(), start)
    counters = ("step", "mu", "eta", "mu_product")
    for key, x in tensors(rule, u).items():
        if key not in counters:
            assert torch.equal(x, known.get(key, torch.zeros(())).expand(x.shape)), key
    u.grad = torch.randn(shape)
    step_touched_rows(rule)
    before, memory = u.detach().clone(), tensors(rule, u)
    u.grad = torch.zeros(shape)
    step_touched_rows(rule)
    assert torch.equal(u.detach(), before)
    assert all(torch.equal(tensors(rule, u)[k], x) for k, x in memory.items() if k not in counters)
    if "step" in memory:
        assert tensors(rule, u)["step"] == 3


@pytest.mark.parametrize("sparse", [False, True])
def test_momentum_of_sgd_on_an_embedding(sparse):
    table = torch.nn.Embedding(N, WIDTH, sparse=sparse)
    dense = leaf(table.weight)
    rule, twin = (optim.SGD([p], lr=0.1, momentum=0.9) for p in (table.weight, dense))
    for rows in ([0, 2], [1, 2], [2, 3]):
        rows = torch.tensor(rows)
        factor = torch.randn(2, WIDTH)
        table.weight.grad, dense.grad = None, None
        (table(rows) * factor).sum().backward()
        (dense[rows] * factor).sum().backward()
        step_touched_rows(rule)
        step_touched_rows(twin)
        assert table.weight.grad.is_sparse == sparse
        torch.testing.assert_close(table.weight.detach(), dense.detach(), rtol=1e-14, atol=0)
        assert torch.equal(dense.detach()[5], table.weight.detach()[5])


def test_hooks_see_whole_tensors_and_what_they_change_counts():
    u = torch.randn(N, WIDTH, requires_grad=True)
    before, seen = u.detach().clone(), []
    rule = optim.SGD([u], lr=0.1, momentum=0.9)

    def halve(*_):
        seen.append((u.shape, u.grad.shape, u.detach().clone()))
        u.grad.mul_(0.5)

    rule.register_step_pre_hook(halve)
    rule.register_step_post_hook(
        lambda *_: seen.append((u.shape, u.grad.shape, u.detach().clone()))
    )
    u.grad = gradients(torch.tensor([1, 2]))
    full, storage = u.grad.clone(), u.data_ptr()
    step_touched_rows(rule)
    assert [s[:2] for s in seen] == [(u.shape, u.shape)] * 2
    assert torch.equal(seen[0][2], before)
    assert torch.equal(seen[1][2], u.detach())
    torch.testing.assert_close(u.detach(), before - 0.05 * full, rtol=1e-14, atol=0)
    assert u.data_ptr() == storage
    assert len(rule._optimizer_step_pre_hooks) == len(rule._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_that_fails_leaves_whole_tensors(steps):
    class Failing(optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            if len(self.state) and self.fails:
                raise RuntimeError("stop")

    u = torch.randn(N, WIDTH, requires_grad=True)
    rule = Failing([u], lr=0.1)
    for rule.fails in [False] * steps + [True]:
        before, memory = u.detach().clone(), tensors(rule, u)
        u.grad = gradients(torch.tensor([1, 2]))
        if rule.fails:
            with pytest.raises(RuntimeError, match="stop"):
                step_touched_rows(rule)
        else:
            step_touched_rows(rule)
    assert torch.equal(u.detach(), before)
    assert u.grad.shape == u.shape
    assert {k: x.shape for k, x in tensors(rule, u).items()} == {
        k: x.shape for k, x in memory.items()
    }


def test_an_upper_parameter_that_is_not_used_stays_with_its_momentum():
    """allow_unused: neither decay nor momentum, under engines that say None or zero."""
    for curvature in ("double_backward", "finite_difference", "functional", "auto"):
        for shape in ((), (2,)):
            u = [torch.full(shape, 0.3, requires_grad=True) for _ in range(2)]
            v = torch.zeros(2, requires_grad=True)
            optimizer = PenaltyBilevelOptimizer(
                torch.optim.SGD(u, lr=0.1, momentum=0.9, weight_decay=0.1),
                [v],
                curvature=curvature,
                allow_unused=True,
            )
            used = 0

            def f(upper=None, lower=None, u=u, v=v):
                return ((lower or (v,))[0] - 1).square().sum() + (upper or u)[used].square().sum()  # noqa: B023

            def g(upper=None, lower=None, u=u, v=v):
                return ((lower or (v,))[0] - (upper or u)[used]).square().sum()  # noqa: B023

            for used in (0, 1, 0):
                other = u[1 - used].detach().clone()
                optimizer.step(f, g)
                assert torch.equal(u[1 - used], other), (curvature, shape)
            assert not torch.equal(u[0], torch.full(shape, 0.3))
