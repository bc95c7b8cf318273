"""Buffers move once, by the right evaluation, or not at all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torch_penalty_bilevel.undo.buffers import BufferGuard
from torch_penalty_bilevel.undo.scope import Scope

X = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)  # mean 2, 4
MOVED = torch.tensor([0.2, 0.4], dtype=torch.float64)  # momentum 0.1 from zero


def norm() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(2, dtype=torch.float64)


def test_moves_once_and_in_place() -> None:
    module = norm()
    mean, count = module.running_mean, module.num_batches_tracked
    guard = BufferGuard(Scope())
    for _ in range(3):
        with guard.evaluation("lower", lambda: module):
            module(X)
        assert module.running_mean is mean  # after every evaluation as before the step
        assert_close(mean, torch.zeros_like(MOVED))
        assert int(count) == 0
    guard.commit()
    assert module.running_mean is mean
    assert_close(mean, MOVED)
    assert int(count) == 1


def test_works_on_clones() -> None:
    module = norm()
    guard = BufferGuard(Scope())
    before = module.running_mean
    with guard.evaluation("lower", lambda: module):
        module(X)
        inside = module.running_mean
        assert inside is not before  # the originals are not in the module while it runs
        assert_close(inside, MOVED)
        module(X)  # a second call in one evaluation goes on from the first
        assert module.running_mean is inside
        assert_close(inside, 1.9 * MOVED)
    guard.commit()
    assert int(module.num_batches_tracked) == 2


def test_pending_graph_keeps_its_buffers() -> None:
    """Written back by copy_, the statistics would change under the first evaluation's graph."""
    module = nn.Sequential(norm(), norm())
    module[0].eval()
    reference = X.clone().requires_grad_()
    with BufferGuard(Scope()).evaluation("lower", lambda: module):
        loss = (module(reference) ** 3).sum()
    (expected,) = torch.autograd.grad(loss, reference)

    x = X.clone().requires_grad_()
    guard = BufferGuard(Scope())
    with guard.evaluation("lower", lambda: module):
        pending = (module(x) ** 3).sum()
    module[0].train()
    with guard.evaluation("lower", lambda: module):
        module(X * 7)
    (actual,) = torch.autograd.grad(pending, x)
    assert_close(actual, expected, rtol=0, atol=0)


def test_without_commit_nothing_moves() -> None:
    module = norm()
    with BufferGuard(Scope()).evaluation("lower", lambda: module):
        module(X)
    assert_close(module.running_mean, torch.zeros_like(MOVED))


def test_exception_leaves_everything_untouched() -> None:
    module = norm()
    mean = module.running_mean
    guard = BufferGuard(Scope())
    with pytest.raises(KeyError), guard.evaluation("lower", lambda: module):
        _fail_after(lambda: module(X))
    assert module.running_mean is mean
    assert_close(mean, torch.zeros_like(MOVED))
    guard.commit()  # the failed evaluation was not kept either
    assert_close(mean, torch.zeros_like(MOVED))
    module(X)  # and the hook is gone
    assert module.running_mean is mean
    assert_close(mean, MOVED)


@pytest.mark.parametrize(
    ("order", "winner"),
    [
        (["upper", "lower"], "lower"),
        (["lower", "upper"], "lower"),
        (["upper"], "upper"),
        (["upper", "lower", "lower", "upper"], "lower"),
    ],
)
def test_lower_wins_over_upper(order: list[str], winner: str) -> None:
    inputs = {"upper": 10 * X, "lower": X}
    module = norm()
    guard = BufferGuard(Scope())
    for i, level in enumerate(order):
        with guard.evaluation(level, lambda: module):  # type: ignore[arg-type]
            module(inputs[level] if i < 2 else 100 * X)  # repetitions do not count
    guard.commit()
    assert_close(module.running_mean, MOVED * (10 if winner == "upper" else 1))


def test_each_level_moves_its_own_modules() -> None:
    first, second = norm(), norm()
    guard = BufferGuard(Scope())
    with guard.evaluation("upper", lambda: (first, second)):
        first(10 * X)
    with guard.evaluation("lower", lambda: (first, second)):
        second(X)
    guard.commit()
    assert_close(first.running_mean, 10 * MOVED)
    assert_close(second.running_mean, MOVED)


def test_lower_wins_also_where_what_it_wrote_is_what_was_there() -> None:
    module = norm()
    guard = BufferGuard(Scope())
    for level in ("upper", "lower"):
        with guard.evaluation(level, lambda: module):  # type: ignore[arg-type]
            module.running_mean.fill_(1.0 if level == "upper" else 0.0)
    guard.commit()
    assert_close(module.running_mean, torch.zeros_like(MOVED))


def test_commit_starts_afresh() -> None:
    module = norm()
    guard = BufferGuard(Scope())
    for expected in (MOVED, 1.9 * MOVED):
        with guard.evaluation("lower", lambda: module):
            module(X)
        guard.commit()
        assert_close(module.running_mean, expected)
    guard.commit()
    assert_close(module.running_mean, 1.9 * MOVED)


def test_evaluation_mode_is_left_alone() -> None:
    module = nn.Sequential(norm(), norm())
    module[0].eval()
    frozen, moving = (m.running_mean for m in module)
    with BufferGuard(Scope()).evaluation("lower", lambda: module):
        module(X)
        assert module[0].running_mean is frozen
        assert module[1].running_mean is not moving


@pytest.mark.parametrize("search", [False, True])
def test_other_threads_are_left_alone(search: bool) -> None:
    module = norm()
    mean = module.running_mean
    scope = Scope()
    with (
        scope.searching() if search else contextlib.nullcontext(),
        BufferGuard(scope).evaluation("lower", lambda: None),
    ):
        thread = threading.Thread(target=module, args=(X,))
        thread.start()
        thread.join()
        assert module.running_mean is mean
    assert_close(mean, MOVED)


def _fail_after(action: Callable[[], object]) -> None:
    action()
    raise KeyError


class Counter(nn.Module):
    """Replaces its buffer instead of writing into it; has an empty one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x


def test_replaced_buffers_move_too() -> None:
    module = Counter()
    count = module.count
    guard = BufferGuard(Scope())
    for _ in range(2):
        with guard.evaluation("lower", lambda: module):
            module(X)
        assert module.count is count
    guard.commit()
    assert module.count is count
    assert float(count) == 1
    assert module.nothing is None


def nested(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(inner))


@pytest.mark.parametrize("wrap", [lambda m: m, nested])
def test_found_at_any_depth(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = norm()
    guard = BufferGuard(Scope())
    with guard.evaluation("lower", lambda: module):
        wrap(module)(X)
    assert_close(module.running_mean, torch.zeros_like(MOVED))
    guard.commit()
    assert_close(module.running_mean, MOVED)


def test_what_the_lower_loss_reaches_but_does_not_run_is_moved_by_the_upper() -> None:
    """Both closures hold one object with both networks, as methods of a trainer do."""
    first, second = norm(), norm()
    guard = BufferGuard(Scope())
    with guard.evaluation("upper", lambda: (first, second)):
        first(10 * X)
        second(10 * X)
    with guard.evaluation("lower", lambda: (first, second)):
        second(X)
    guard.commit()
    assert_close(first.running_mean, 10 * MOVED)
    assert_close(second.running_mean, MOVED)
    assert int(first.num_batches_tracked) == int(second.num_batches_tracked) == 1


def test_kernels_that_do_not_tell_autograd_move_buffers_too() -> None:
    """Statistics without a counter: no version says that the lower loss has moved them."""
    module = nn.Module()
    module.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
    module.register_buffer("variance", torch.ones(2, dtype=torch.float64))
    guard = BufferGuard(Scope())
    for level, factor in (("upper", 10), ("lower", 1)):
        with guard.evaluation(level, lambda: module):  # type: ignore[arg-type]
            nn.functional.batch_norm(factor * X, module.mean, module.variance, training=True)
            assert module.mean._version == 0
    guard.commit()
    assert_close(module.mean, MOVED)


class Bank(nn.Module):
    """Remembers all rows; ``embed`` is not forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 2, dtype=torch.float64))

    def embed(self, x: Tensor) -> Tensor:
        self.rows = torch.cat([self.rows, x])
        return x


def test_a_buffer_may_grow() -> None:
    module = Bank()
    guard = BufferGuard(Scope())
    for rows in (2, 4):
        for _ in range(3):
            with guard.evaluation("lower", lambda: module):
                module.embed(X)
        guard.commit()
        assert_close(module.rows, X.repeat(rows // 2, 1))


def test_a_buffer_that_the_upper_loss_alone_grows() -> None:
    module = Bank()
    guard = BufferGuard(Scope())
    with guard.evaluation("lower", lambda: module):
        pass
    with guard.evaluation("upper", lambda: module):
        module.embed(X)
    guard.commit()
    assert_close(module.rows, X)


def test_layers_that_come_and_change_mode_between_evaluations() -> None:
    module = nn.Sequential(norm())
    guard = BufferGuard(Scope())

    def closure() -> nn.Module:
        return module

    with guard.evaluation("lower", closure):
        module(X)
    module.append(norm())
    module[0].eval()
    with guard.evaluation("upper", closure):
        module(X)
    assert_close(module[1].running_mean, torch.zeros_like(MOVED))
    guard.commit()
    assert_close(module[0].running_mean, MOVED)
    assert int(module[1].num_batches_tracked) == 1
