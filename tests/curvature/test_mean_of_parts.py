"""The mean of micro-batches by itself: its precision, what it keeps, what it adds once."""

import gc

import pytest
import torch

from torch_penalty_bilevel.curvature.micro_batches import (
    MeanLoss,
    bare,
    each,
    mean_gradient,
    parts_of,
    plus,
    value_of,
)
from torch_penalty_bilevel.tensors import OptionalPair, Pair

COARSE = [256.0] + 64 * [0.25]  # whose running sum in bfloat16 is 256
EMPTY = Pair((), ())


def constant(value):
    return lambda upper, lower: torch.as_tensor(value)


def gradients(*pairs):
    """A loss with one part for each (value, upper, lower), and what takes these for gradients."""
    parts = [lambda upper, lower, pair=pair: pair for pair in pairs]

    def one(part):
        value, upper, lower = part((), ())
        return torch.tensor(value), OptionalPair(upper, lower)

    return one, MeanLoss(parts)


def test_values_of_16_bits_are_summed_in_float32():
    values = torch.tensor(COARSE, dtype=torch.bfloat16)
    loss = MeanLoss([constant(v) for v in values])
    expected = values.double().mean().to(torch.bfloat16)
    for found in (loss((), ()), value_of(loss, EMPTY)):
        assert found.dtype == torch.bfloat16
        assert found == expected
    running = values[0]
    for value in values[1:]:
        running = running + value
    assert running / len(values) != expected


def test_gradients_of_16_bits_are_summed_in_float32():
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in COARSE]
    one, loss = gradients(*((0.0, (p,), (2 * p,)) for p in parts))
    _, (upper, lower) = mean_gradient(one, loss)
    expected = (torch.tensor(COARSE).double().mean()).to(torch.bfloat16)
    assert upper[0].dtype == lower[0].dtype == torch.bfloat16
    assert upper[0] == expected
    assert lower[0] == 2 * expected


def test_what_no_part_has_is_none_and_the_rest_counts_as_zero():
    a, b = torch.tensor([3.0, 6.0]), torch.tensor([9.0, -3.0])
    one, loss = gradients(
        (3.0, (None, None, a), (b,)), (6.0, (a, None, b), (None,)), (0.0, (None,) * 3, (None,))
    )
    value, (upper, lower) = mean_gradient(one, loss)
    assert value == 3.0
    assert upper[1] is None
    torch.testing.assert_close(upper[0], a / 3)
    torch.testing.assert_close(upper[2], (a + b) / 3)
    torch.testing.assert_close(lower[0], b / 3)
    torch.testing.assert_close(a, torch.tensor([3.0, 6.0]))  # what autograd returns is not ours
    torch.testing.assert_close(b, torch.tensor([9.0, -3.0]))


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 0], [1, 1, 0]])
def test_sparse_and_dense_parts(order):
    forms = [torch.tensor([0.0, 4.0, 2.0]).to_sparse(), torch.tensor([1.0, 0.0, 5.0])]
    one, loss = gradients(*((0.0, (forms[k],), ()) for k in order))
    _, (upper, _) = mean_gradient(one, loss)
    dense = [f.to_dense() if f.is_sparse else f for f in forms]
    found = upper[0].to_dense() if upper[0].is_sparse else upper[0]
    torch.testing.assert_close(found, torch.stack([dense[k] for k in order]).mean(0))


def test_parts_are_evaluated_in_their_order_and_a_map_entry_by_entry():
    called = []

    def part(k):
        return lambda upper, lower: called.append(k) or (torch.tensor(k), torch.tensor([2 * k]))

    first, second = MeanLoss([part(k) for k in (1.0, 2.0, 6.0)])((), ())
    assert called == [1.0, 2.0, 6.0]
    assert first == 3.0
    assert second.tolist() == [6.0]


def test_terms_see_the_mean_and_are_added_once():
    u = torch.tensor(2.0, requires_grad=True)
    plain = []

    def terms(upper, lower, value):
        plain.append(float(value))
        assert torch.is_grad_enabled()
        return [upper[0].square(), 3 * upper[0]]

    whole = plus(constant(5.0), terms)
    loss = plus(MeanLoss([constant(4.0), constant(6.0), constant(5.0)]), terms)
    for each_loss in (whole, loss):
        with torch.no_grad():  # as where f is only looked at
            assert value_of(each_loss, Pair((u,), ())) == 15.0
        (slope,) = torch.autograd.grad(each_loss((u,), ()), u)
        assert slope == 7.0
    assert plain == [5.0] * 4
    # A part that raised leaves the numbers of those before it, which the next mean has not.
    broken = [constant(100.0), lambda upper, lower: 1 / 0, constant(0.0)]
    loss = plus(MeanLoss(broken), terms)
    with pytest.raises(ZeroDivisionError):
        loss((u,), ())
    broken_parts = parts_of(plus(MeanLoss([constant(4.0), constant(8.0)]), terms))
    broken_parts[0]((u,), ())  # evaluated and given up
    broken_parts[0]((u,), ())
    broken_parts[1]((u,), ())
    assert plain[-1] == 6.0


def test_nothing_is_kept_from_call_to_call():
    u = torch.ones(3, requires_grad=True)
    parts = [lambda upper, lower: upper[0].sum(), lambda upper, lower: upper[0].prod()]
    loss = plus(MeanLoss(parts), lambda upper, lower, value: [upper[0][0]])

    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    loss((u,), ())
    before = tensors()
    for _ in range(20):
        loss((u,), ())
    assert tensors() <= before  # fewer where something of another test went meanwhile


def test_wrapping_is_part_by_part():
    doubled = lambda part: lambda upper, lower: 2 * part(upper, lower)  # noqa: E731
    loss = each(doubled, MeanLoss([constant(1.0), constant(3.0)]))
    assert len(parts_of(loss)) == 2
    assert loss((), ()) == 4.0
    assert each(doubled, constant(2.0))((), ()) == 4.0


def test_numbers_alone_inside_a_transform():
    seen = []

    def function(x):
        seen.append(bare(x.square()))
        return x.square()

    assert torch.func.grad(function)(torch.tensor(3.0)) == 6.0
    assert type(seen[0]) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(seen[0])
    assert float(seen[0]) == 9.0
