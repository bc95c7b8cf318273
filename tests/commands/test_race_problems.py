"""The race's problems: their losses and scores against slower ways to compute them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

for library in ("PIL", "pooch", "requests", "sklearn", "higher", "tqdm", "matplotlib", "torchopt"):
    pytest.importorskip(library)

from racing import l2_problem, l2_task, omniglot_task  # noqa: E402

from benchmarks.race import l2, omniglot  # noqa: E402


def test_omniglot_losses_task_by_task():
    task = omniglot_task()
    before = task.support
    task.lower[0].data.normal_()
    task.begin()
    assert not torch.equal(task.support, before)
    assert not task.lower[0].any()
    heads = task.lower[0].data.normal_()
    upper, lower = torch.zeros(()), torch.zeros(())
    for number, head in enumerate(heads):
        for character in range(omniglot.WAYS):
            place = number * omniglot.WAYS + character
            for count, image in enumerate([task.support[place], *task.query.split(5)[place]]):
                phi = task.network(image[None])[0]
                phi = omniglot.SCALE * phi / phi.norm()
                loss = -(head @ phi).log_softmax(0)[character] / omniglot.WAYS
                if count:
                    upper = upper + loss / omniglot.QUERIES / omniglot.TASKS
                else:
                    lower = lower + loss / omniglot.TASKS
        lower = lower + omniglot.DECAY / 2 * head.square().sum() / omniglot.TASKS
    # Sums in another order: rounding.
    torch.testing.assert_close(task.upper_loss(), upper, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.lower_loss(), lower, rtol=1e-12, atol=0)


def test_holding_the_upper_level_changes_cost_only():
    task = omniglot_task()
    with torch.no_grad():
        task.lower[0].normal_()
    free = task.upper_loss(), task.lower_loss()
    with task.held_upper(graph=True):
        held = task.upper_loss(), task.lower_loss()
    for loss, other in zip(free, held, strict=True):
        pairs = (torch.autograd.grad(value, [*task.upper, *task.lower]) for value in (loss, other))
        for expected, found in zip(*pairs, strict=True):
            assert torch.equal(expected, found)
    with task.held_upper():
        assert task.upper_loss() == free[0]
        assert task.lower_loss().requires_grad
        grads = torch.autograd.grad(task.lower_loss(), task.upper, allow_unused=True)
        assert grads == (None,) * len(task.upper)
    assert task.held is None


def test_test_accuracy_is_that_of_heads_fitted_to_the_end():
    problem = omniglot_task().problem
    features = torch.randn(9, 6, 20)
    features = omniglot.SCALE * torch.nn.functional.normalize(features, dim=2)
    right = 0
    for task in problem.tasks:
        support, queries = features[task, 0], features[task, 1:]
        head = torch.zeros(5, 20, requires_grad=True)
        rule = torch.optim.LBFGS([head], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def loss(head=head, support=support, rule=rule):
            rule.zero_grad()
            value = cross_entropy(support @ head.T, torch.arange(5))
            value = value + omniglot.DECAY / 2 * head.square().sum()
            value.backward()
            return value

        rule.step(loss)
        kernel = (support @ support.T)[None]
        found = omniglot.solved(kernel)[0].T @ support
        # 200 steps that contract by (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)) = 2/3.
        torch.testing.assert_close(found, head.detach(), rtol=1e-6, atol=1e-8)
        right += ((queries @ head.T).argmax(-1) == torch.arange(5)[:, None]).sum().item()
    assert omniglot.accuracy(features, problem.tasks) == pytest.approx(right / (7 * 25))


def test_no_character_is_both_learnt_and_asked():
    names = torch.arange(1100.0)[:, None, None, None, None].expand(1100, 20, 1, 14, 14)
    data = names, torch.arange(1100) % 8 == 1
    seen = {}
    for tuning in (False, True):
        problem = omniglot.make_problem(data, 0, tuning)
        assert problem.test.shape[1] == 1 + omniglot.QUERIES
        seen[tuning] = [{*images.flatten().tolist()} for images in (problem.train, problem.test)]
        assert all(len({*task.tolist()}) == 5 for task in problem.tasks)
    assert seen[False][0] == seen[True][0]
    assert not seen[False][0] & seen[False][1]
    assert not seen[True][0] & seen[True][1]
    assert not seen[True][1] & seen[False][1]


def test_gain_is_of_u_alone():
    task = l2_task()
    assert l2.look(task)["gain"] == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        task.upper[0].fill_(1.0)
    seen = []
    for scale in (0.0, 3.0):  # v stopped early or anywhere else
        with torch.no_grad():
            task.lower[0].normal_().mul_(scale)
        seen.append(l2.look(task))
    assert seen[0]["running"] != seen[1]["running"]
    # L-BFGS ends when a step gains less than 1e-7 of the loss; there may have been many more.
    assert seen[0]["gain"] == pytest.approx(seen[1]["gain"], abs=1e-4)
    problem = l2_problem()
    u, v = torch.ones(12), torch.zeros(12, 3)
    loss = problem.validation.loss(problem.solved(u, v)).item()
    assert seen[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert seen[0]["gain"] == pytest.approx(task.first - loss, abs=1e-4)
