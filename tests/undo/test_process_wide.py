"""Settings of the process under two threads that overlap."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo import eval_frame
from torch.nn import functional as F

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature.inspection import with_plain_attention


def overlapped(first: threading.Thread, second: threading.Thread) -> None:
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join(30)
        assert not thread.is_alive()


def test_overlapping_first_steps_leave_the_compiler_on() -> None:
    """The first in is the first out, so each must not put back what the other has set."""
    inside, done = threading.Event(), threading.Event()
    seen: list[str] = []

    def task(enter: threading.Event, leave: threading.Event) -> None:
        u, v = (torch.ones(2, requires_grad=True) for _ in range(2))
        optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=0.1)

        def g() -> Tensor:
            enter.set()
            assert leave.wait(20)
            seen.append(eval_frame._stance.stance)
            return (v - u).square().sum()

        optimizer.step(lambda: v.square().sum(), g)
        done.set()

    first = threading.Thread(target=task, args=(threading.Event(), inside))
    second = threading.Thread(target=task, args=(inside, done))
    overlapped(first, second)
    assert set(seen) == {"force_eager"}
    assert eval_frame._stance.stance == "default"


def test_overlapping_plain_attention_leaves_fused_attention_on() -> None:
    inside, done = threading.Event(), threading.Event()
    x = torch.ones(1, 1, 2, 2)

    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()

    def task(enter: threading.Event, leave: threading.Event) -> None:
        def loss(*_: object) -> Tensor:
            enter.set()
            assert leave.wait(20)
            assert flags() == (False, True)
            return F.scaled_dot_product_attention(x, x, x).sum()

        with_plain_attention(loss)((), ())
        done.set()

    before = flags()
    overlapped(
        threading.Thread(target=task, args=(threading.Event(), inside)),
        threading.Thread(target=task, args=(inside, done)),
    )
    assert flags() == before == (True, True)


def test_an_error_inside_puts_back() -> None:
    def fails(*_: object) -> Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        with_plain_attention(fails)((), ())
    assert torch.backends.cuda.flash_sdp_enabled()
