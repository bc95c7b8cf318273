"""Preconditioners that work in place, keep a buffer, are singular or return something else."""

import numpy as np
import pytest
import torch

from torch_penalty_bilevel import (
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
)

N = 6
ENTRIES = torch.logspace(-1, 1, N, dtype=torch.float64)
SCALES = torch.logspace(-1, 2, N, dtype=torch.float64)


def plain(vectors, power):
    return tuple(ENTRIES.to(t) ** power * t for t in vectors)


def in_place(vectors, power):
    for vector in vectors:
        vector.mul_(ENTRIES**power)
    return vectors


class OneBuffer:
    """Writes every answer where the one before was."""

    def __init__(self):
        self.buffer = torch.zeros(N)

    def __call__(self, vectors, power):
        torch.mul(vectors[0], ENTRIES**power, out=self.buffer)
        return (self.buffer,)


def built(preconditioner, dtype=None, slope=None, **options):
    """v stands still; (optimizer, step)."""
    u, v = torch.zeros(1, requires_grad=True), torch.ones(N, dtype=dtype, requires_grad=True)
    rule = Stationarity(LeastSquares(preconditioner=preconditioner, **options))
    optimizer = PenaltyBilevelOptimizer([u], [v], lower_lr=0.0, penalty=rule)
    slope = torch.linspace(-1, 2, N) if slope is None else slope

    def step():
        optimizer.lower_step(
            lambda: slope.to(v) @ v + 0 * u.sum(),
            lambda: (SCALES.to(v) * v.square()).sum() / 2 + u.sum() * v.sum(),
        )

    return optimizer, step


def bits(optimizer):
    state = optimizer._dual
    return [t.clone() for name in state.lists() for t in getattr(state, name)]


@pytest.mark.parametrize("make", [lambda: in_place, OneBuffer])
@pytest.mark.parametrize("subspace", [True, False])
def test_one_that_overwrites_is_bit_equal_to_one_that_does_not(make, subspace):
    (first, step), (second, other) = (built(p, subspace=subspace) for p in (plain, make()))
    for _ in range(40):
        step()
        other()
    for found, expected in zip(bits(second), bits(first), strict=True):
        assert torch.equal(found, expected)
    assert first.adjoint[0].any()


def test_one_that_raises_halfway_leaves_the_state_as_it_was():
    """Whichever of its calls it is, and although it has written into what it was given."""
    calls, last = 0, 10**9

    def careless(vectors, power):
        nonlocal calls
        calls += 1
        result = in_place(vectors, power)
        if calls > last:
            raise RuntimeError("out of memory")
        return result

    optimizer, step = built(careless)
    for _ in range(12):
        step()
    before = bits(optimizer)
    for more in range(6):
        last = calls + more
        with pytest.raises(RuntimeError, match="out of memory"):
            step()
        for found, expected in zip(bits(optimizer), before, strict=True):
            assert torch.equal(found, expected)
    last = 10**9
    step()
    assert not torch.equal(optimizer.adjoint[0], before[0])


def shares(entries):
    """P^power with a pseudo-inverse, as of one who has heard of division by zero."""
    root = torch.tensor(entries).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return lambda vectors, power: ((root if power > 0 else inverse) * vectors[0],)


@pytest.mark.parametrize("entries", [[0.0] * N, [0.0] + [1.0] * (N - 1)])
def test_a_singular_one_is_refused(entries):
    """0 = 0 is true of <P^1/2 q, P^-1/2 H q> and <q, H q>, as q never leaves the range of P."""
    optimizer, step = built(shares(entries))
    with pytest.raises(ValueError, match=r"symmetric positive definite P.* is lost.* damping"):
        step()
    assert not optimizer.adjoint[0].any()


def test_one_that_turns_singular_is_refused():
    entries = torch.ones(N)
    optimizer, step = built(lambda vectors, power: (entries * vectors[0],))
    for _ in range(15):
        step()
    entries, before = torch.zeros(N), bits(optimizer)
    with pytest.raises(ValueError, match="do not belong to one symmetric P"):
        step()
    for found, expected in zip(bits(optimizer), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("condition", "least", "most"), [(1e10, 1e-9, 0.1), (1e4, 0.0, 1e-3), (1.0, 0.0, 1e-5)]
)
def test_a_rounded_one_is_not_singular(condition, least, most):
    """Float32 factors, not diagonal: 1e-2 may be lost on the way at condition 1e10."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, N, generator=generator)).Q.float()
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), N).float()

    def power_of(vectors, power):
        return (basis * values**power @ basis.T @ vectors[0],)

    slope = torch.randn(N, generator=generator)
    there_and_back = power_of(power_of((slope.float(),), -0.5), 0.5)[0]
    lost = float((there_and_back - slope).norm() / slope.norm())
    assert least <= lost < most
    _, step = built(power_of, dtype=torch.float32, slope=slope)
    step()


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_roots_that_differ_by_a_twentieth_are_told(factor):
    """Rounding is far below a hundredth; 0.5 of it would let a wrong unit pass."""

    def preconditioner(vectors, power):
        return tuple((factor if power > 0 else 1.0) * t for t in plain(vectors, power))

    optimizer, step = built(preconditioner)
    step()  # q = 0
    with pytest.raises(ValueError, match="do not belong to one symmetric P: <q, H q> is"):
        step()
    assert optimizer._dual.steps == 1
    # A factor of both that cancels is none.
    _, step = built(lambda vectors, power: tuple(factor ** (2 * power) * t for t in vectors))
    for _ in range(3):
        step()


WRONG = [
    (lambda v, power: (np.asarray(v[0]),), "a tuple with ndarray in it; return tensors"),
    (lambda v, power: v[0].tolist(), r"returned tensors of shapes"),
    (lambda v, power: [None], r"returned tensors of shapes"),
    (lambda v, power: (v[0].long(),), r"torch\.int64.* return a dense one of torch\.float64"),
    (lambda v, power: (v[0] > 0,), r"a tensor of torch\.bool"),
    (lambda v, power: (v[0].bfloat16(),), r"torch\.bfloat16.* rounded to that"),
    (lambda v, power: (v[0].float(),), r"torch\.float32.* return a dense one of torch\.float64"),
    (lambda v, power: (v[0].to_sparse(),), r"torch\.sparse_coo .* return a dense one"),
    (lambda v, power: (v[0] + 0j,), r"complex128 for a real vector"),
]


@pytest.mark.parametrize(("preconditioner", "message"), WRONG)
def test_what_is_no_tuple_of_such_tensors_is_named(preconditioner, message):
    optimizer, step = built(preconditioner)
    before = bits(optimizer)
    with pytest.raises((TypeError, ValueError), match=f"^preconditioner .*{message}"):
        step()
    for found, expected in zip(bits(optimizer), before, strict=True):
        assert torch.equal(found, expected)


def test_more_digits_than_asked_for_are_welcome():
    optimizer, step = built(
        lambda vectors, power: plain(tuple(t.double() for t in vectors), power),
        dtype=torch.float32,
    )
    for _ in range(200):
        step()
    exact = -torch.linspace(-1, 2, N) / SCALES
    torch.testing.assert_close(optimizer.adjoint[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_losses_that_are_not_finite_are_not_its_fault():
    _, step = built(plain, slope=torch.full((N,), float("nan")))
    with pytest.raises(NonFiniteError):
        step()
