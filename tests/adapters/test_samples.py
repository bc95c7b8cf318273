"""Samples outside of the batch, sparse weights of samples, and samples on several workers."""

import threading

import pytest
import torch
from classifying import classification, network
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import EpsilonTest, PenaltyBilevelOptimizer, Stationarity


@pytest.mark.parametrize("shape", [(10,), (10, 3)])
def test_rows_outside_the_batch_keep_value_and_moments(shape):
    """Equal to one Adam per row, stepping (with the common step count) only when its row is in."""
    torch.manual_seed(3)
    u = torch.randn(shape, requires_grad=True)
    v = torch.zeros(shape[1:] or (1,), requires_grad=True)
    target = torch.randn(shape)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, penalty="paper")
    value, m, s = u.detach().clone(), torch.zeros(shape), torch.zeros(shape)
    for step in range(1, 8):
        batch = torch.randperm(10)[:4]
        optimizer.upper_step(
            lambda batch=batch: (u[batch] - target[batch]).square().sum() + v.square().sum(),
            lambda batch=batch: ((v - u[batch].mean(0)) ** 2).sum(),
        )
        gradient = u.grad[batch]
        m[batch] = 0.9 * m[batch] + 0.1 * gradient
        s[batch] = 0.999 * s[batch] + 0.001 * gradient**2
        move = (m[batch] / (1 - 0.9**step)) / ((s[batch] / (1 - 0.999**step)).sqrt() + 1e-8)
        value[batch] -= 0.1 * move
        torch.testing.assert_close(u.detach(), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[u]["exp_avg"], m, rtol=1e-12, atol=1e-15)


def test_sparse_weights_with_sparse_adam_equal_dense_rows():
    x, y = classification()
    table = nn.Embedding(24, 1, sparse=True)
    nn.init.zeros_(table.weight)
    dense = torch.zeros(24, 1, requires_grad=True)
    for curvature in ("double_backward", "finite_difference"):
        ends = []
        for weights, sparse in ((table.weight, True), (dense, False)):
            with torch.no_grad():
                weights.zero_()
            net = network()
            rule = torch.optim.SparseAdam if sparse else torch.optim.Adam
            optimizer = PenaltyBilevelOptimizer(
                rule([weights], lr=0.1, eps=1e-15), net.parameters(), curvature=curvature
            )
            for batch in torch.arange(24).split(6) * 2:

                def lower(batch=batch, net=net, sparse=sparse):
                    raw = table(batch) if sparse else dense[batch]
                    losses = F.cross_entropy(net(x[batch]), y[batch], reduction="none")
                    return (raw.squeeze(1).sigmoid() * losses).mean()

                optimizer.step(lambda net=net: F.cross_entropy(net(x[:8]), y[:8]), lower)
            assert weights.grad.is_sparse == sparse
            ends.append(weights.detach().clone())
        # The two rules put eps in different places, so it is made negligible; sums run in another
        # order.
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-9)
        assert float(ends[0].abs().max()) > 0.1


# Shards.


@pytest.mark.parametrize(
    "penalty", [Stationarity(), Stationarity(EpsilonTest(weight=2.0, tolerance=10.0))]
)
def test_reduce_makes_two_shards_one_batch(penalty):
    """Two workers in lock step, simulated: each sees half the data and the other's tensors."""
    x, y = classification()
    u0 = torch.zeros(5)

    def build(reduce=None):
        net = network()
        u = u0.clone().requires_grad_()
        optimizer = PenaltyBilevelOptimizer(
            [u], net.parameters(), penalty=penalty, reduce=reduce, upper_lr=0.05, lower_lr=0.05
        )
        return u, net, optimizer

    def closures(u, net, part):
        half = slice(12 * part, 12 * part + 12) if part is not None else slice(None)
        a, b = x[half], y[half]
        decay = lambda: (u.exp() * net[0].weight.square()).sum()  # noqa: E731
        return (
            lambda: F.cross_entropy(net(a), b, label_smoothing=0.1),
            lambda: F.cross_entropy(net(a), b) + 0.01 * decay(),
        )

    whole = build()
    for _ in range(4):
        whole[2].step(*closures(whole[0], whole[1], None))

    barrier, mailbox, errors = threading.Barrier(2), {}, []

    def worker(rank, results):
        def average(tensors):
            mailbox[rank] = tensors
            barrier.wait()
            other = mailbox[1 - rank]
            mean = tuple((a + b) / 2 for a, b in zip(tensors, other, strict=True))
            barrier.wait()
            return mean

        try:
            u, net, optimizer = built[rank]
            optimizer.reduce = average
            for _ in range(4):
                optimizer.step(*closures(u, net, rank))
            results[rank] = u.detach()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    torch.set_default_dtype(torch.float64)
    built, results = [build(), build()], {}
    threads = [threading.Thread(target=worker, args=(r, results)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], whole[0].detach(), rtol=1e-10, atol=1e-12)
