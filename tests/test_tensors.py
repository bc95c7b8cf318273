"""Vector algebra on tuples, with numbers small enough to check by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from torch_penalty_bilevel import tensors as T
from torch_penalty_bilevel.undo.rule_memory import relocated

F64 = torch.float64
A = (torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([[12.0]], dtype=F64))
B = (torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([[2.0]], dtype=F64))
# Entry 2 appears twice and holds 5.
SPARSE = torch.sparse_coo_tensor(
    [[0, 2, 2]], [1.0, 2.0, 3.0], (4,), dtype=F64, check_invariants=True
)


def same(actual, expected) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.to_dense(), torch.as_tensor(e, dtype=a.dtype), rtol=0, atol=0)


def test_algebra() -> None:
    same(T.add(A, B), ([4, 3], [[14]]))
    same(T.scale(A, 2.0), ([6, 8], [[24]]))
    same(T.scale(A, torch.tensor(-1.0)), ([-3, -4], [[-12]]))
    same(T.axpy(2.0, A, B), ([7, 7], [[26]]))
    same(T.axpy(torch.tensor(-1.0), A, B), ([-2, -5], [[-10]]))
    assert float(T.norm(A)) == 13
    same(T.norms(A), (5, 12))
    assert float(T.dot(A, B)) == 3 - 4 + 24
    assert T.norm(A).dim() == T.dot(A, B).dim() == 0


def test_nothing_is_modified() -> None:
    a, b = T.clones(A), T.clones(B)
    T.add(a, b), T.scale(a, 3.0), T.axpy(2.0, a, b), T.norm(a), T.dot(a, b)
    same(a, [x.tolist() for x in A])
    same(b, [x.tolist() for x in B])


def test_empty() -> None:
    assert T.add((), ()) == ()
    assert T.scale((), 2.0) == ()
    assert T.norms(()) == ()
    assert float(T.norm(())) == float(T.dot((), ())) == 0


@pytest.mark.parametrize("function", [T.add, T.dot, lambda a, b: T.axpy(1.0, a, b)])
def test_lengths_must_agree(function) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        function(A, B[:1])


def test_sixteen_bits_are_accumulated_in_float32() -> None:
    """4096 ones: bfloat16 sums stall at 256, and 1.5^2 * 3 needs more than 8 bits."""
    ones = (torch.ones(4096, dtype=torch.bfloat16),)
    assert T.norm(ones).dtype == torch.float32
    assert float(T.norm(ones)) == 64
    assert T.dot(ones, ones).dtype == torch.float32
    assert float(T.dot(ones, ones)) == 4096
    wide = (torch.full((3,), 300.0, dtype=torch.float16),)  # its square overflows float16
    assert float(T.norm(wide)) == pytest.approx(300 * math.sqrt(3), rel=1e-6)
    assert float(T.dot(wide, wide)) == 270_000


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16,), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32,), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
)
def test_accumulation_dtype(dtypes, expected) -> None:
    mixed = tuple(torch.ones(1, dtype=d) for d in dtypes)
    assert T.accumulation_dtype(mixed) == expected
    assert T.norm(mixed).dtype == expected
    assert T.dot(mixed, mixed).dtype == expected
    assert float(T.dot(mixed, mixed)) == len(dtypes)


def test_scale_keeps_the_dtype_of_tensors() -> None:
    low = (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    for factor in (2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)):
        assert [t.dtype for t in T.scale(low, factor)] == [torch.bfloat16, torch.float64]


def test_scale_over_several_devices() -> None:
    meta = (torch.ones(2, device="meta"), torch.ones(3))
    # A 0-d factor on the CPU serves the CPU tensor, and is carried to the other device.
    scaled = T.scale(meta, torch.tensor(2.0))
    assert scaled[0].device.type == "meta"
    same(scaled[1:], ([2, 2, 2],))


@pytest.mark.parametrize("left", ["sparse", "dense"])
@pytest.mark.parametrize("right", ["sparse", "dense"])
def test_sparse_sums(left: str, right: str) -> None:
    pick = {"sparse": SPARSE, "dense": SPARSE.to_dense() * 10}
    dense = {"sparse": SPARSE.to_dense(), "dense": SPARSE.to_dense() * 10}
    expected = (dense[left] + dense[right]).tolist()
    assert_close(T.sum_of(pick[left], pick[right]).to_dense(), torch.tensor(expected, dtype=F64))
    same(T.add((pick[left], A[0]), (pick[right], B[0])), (expected, [4, 3]))
    expected = (3 * dense[left] + dense[right]).tolist()
    same(T.axpy(3.0, (pick[left],), (pick[right],)), (expected,))


def test_norm_of_sparse_adds_repeated_entries_first() -> None:
    assert float(T.norm((SPARSE,))) == pytest.approx(math.sqrt(1 + 25), rel=1e-6)
    assert float(T.norm((SPARSE, torch.tensor([2.0])))) == pytest.approx(math.sqrt(30), rel=1e-6)


def test_zeros_for() -> None:
    parameters = (
        torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        torch.ones(2, 3, dtype=torch.float64).t().requires_grad_(),
    )
    zeros = T.zeros_for(parameters)
    assert [z.dtype for z in zeros] == [torch.float32, torch.float64]
    assert [z.stride() for z in zeros] == [p.stride() for p in parameters]
    assert not any(z.requires_grad for z in zeros)
    same(zeros, ([0, 0], torch.zeros(3, 2).tolist()))


def test_clones_are_detached_copies() -> None:
    p = torch.ones(2, requires_grad=True)
    (copy,) = T.clones((p,))
    assert not copy.requires_grad
    copy += 1
    assert p.tolist() == [1, 1]


def test_filled() -> None:
    parameters = (torch.ones(2, requires_grad=True), torch.ones(1))
    gradient = torch.tensor([5.0])
    result = T.filled((None, gradient), parameters)
    same(result, ([0, 0], [5]))
    assert result[1] is gradient
    assert not result[0].requires_grad


def test_cast_like() -> None:
    targets = (torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64))
    assert [t.dtype for t in T.cast_like(B, targets)] == [torch.bfloat16, torch.float64]


def test_dense_is_strided_and_at_least_float32() -> None:
    assert T.dense(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert T.dense(A[0]).dtype == F64
    assert_close(T.dense(SPARSE), torch.tensor([1.0, 0, 5, 0], dtype=F64))


def test_the_coarsest_dtype_sets_the_rounding() -> None:
    half = torch.ones(1, dtype=torch.bfloat16)
    assert T.coarsest_eps((A[0], half, A[1])) == torch.finfo(torch.bfloat16).eps


def test_what_is_placed_or_relocated_is_a_copy() -> None:
    (placed,) = T.placed(A[:1], A[:1])
    moments = relocated({"exp_avg": A[0], "step": torch.tensor(3.0), "name": "x"}, A[0])
    assert_close(moments["exp_avg"], A[0])
    assert moments["name"] == "x"
    for copy in (placed, moments["exp_avg"]):
        assert copy.data_ptr() != A[0].data_ptr()


@pytest.mark.parametrize("sizes", [(3, 5), (40_000, 7), (70_001,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_holds_all_inner_products(sizes, dtype):
    """Small vectors as one piece, large ones cut; against inner products in float64."""
    generator = torch.Generator().manual_seed(0)
    vectors = [
        tuple(torch.randn(n, generator=generator).to(dtype).reshape(-1, 1) for n in sizes)
        for _ in range(3)
    ]
    whole = [torch.cat([t.reshape(-1).double() for t in v]) for v in vectors]
    expected = torch.tensor([[float(a @ b) for b in whole] for a in whole], dtype=F64)
    found = T.gram(vectors).double()
    atol = 1e-2 if dtype == torch.float32 else 1e-9  # rounding of sums of 70,001 products
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol, check_dtype=False)
    assert T.gram([(), ()]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
