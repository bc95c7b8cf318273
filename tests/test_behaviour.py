"""What users meet: BatchNorm, dropout, absent samples, shards, dtypes, sparse weights."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import EpsilonTest, PenaltyBilevelOptimizer, Stationarity


def classification(seed=0, n=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def network(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), *extra, nn.Tanh(), nn.Linear(6, 3))


# Buffers and random numbers.


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("lower_steps", [1, 4])
def test_batch_norm_moves_once_per_step_and_by_the_training_batch(lower_steps, curvature):
    x, y = classification()
    net = network(nn.BatchNorm1d(6))
    norm = net[1]
    u = torch.zeros(16, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], net.parameters(), lower_steps=lower_steps, curvature=curvature
    )
    mean_tensor = norm.running_mean
    for step in range(1, 4):
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        with torch.no_grad():
            hidden = net[0](x[:16])
        optimizer.step(
            lambda: F.cross_entropy(net(x[16:]), y[16:]),
            lambda: (u.sigmoid() * F.cross_entropy(net(x[:16]), y[:16], reduction="none")).mean(),
        )
        assert int(norm.num_batches_tracked) == step
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * hidden.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 * variance + 0.1 * hidden.var(0))
    assert norm.running_mean is mean_tensor  # the module's own tensor, not a replacement


def test_evaluation_mode_batch_norm_is_left_alone():
    x, y = classification()
    net = network(nn.BatchNorm1d(6)).eval()
    u = torch.zeros(24, requires_grad=True)
    before = net[1].running_mean.clone()
    optimizer = PenaltyBilevelOptimizer([u], net.parameters())
    optimizer.step(
        lambda: F.cross_entropy(net(x), y),
        lambda: (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean(),
    )
    assert torch.equal(net[1].running_mean, before)


def test_dropout_masks_replay_in_differences_and_change_between_steps():
    """Same seed: differences and double backward then agree although masks are random."""
    x, y = classification()
    ends = []
    for curvature in ("double_backward", "finite_difference"):
        net = network(nn.Dropout(0.5))
        u = torch.zeros(24, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u], net.parameters(), curvature=curvature, upper_lr=0.1, lower_lr=0.01
        )
        losses = []

        def upper(net=net):
            return F.cross_entropy(net(x), y)

        def lower(net=net, u=u):
            return (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()

        optimizer.step(upper, lower)  # the engines' one-time checks draw differently
        torch.manual_seed(5)
        for _ in range(3):
            losses.append(float(optimizer.step(upper, lower)))
        assert len(set(losses)) == 3
        ends.append((u.detach().clone(), torch.rand(1)))
    # Adam's first steps are signs: entries with a gradient near the difference's error may differ
    # by a step, so compare what is random, the generator, bitwise and the point loosely.
    assert torch.equal(ends[0][1], ends[1][1])


class Drifting(nn.Module):
    """Its output depends on how often it was called, through a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x):
        self.gain *= 1.5
        return x * self.gain


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
def test_every_evaluation_starts_from_the_same_buffers(curvature):
    """Otherwise a difference would compare two different functions."""
    x, y = classification()
    net, fixed = network(Drifting()), network(nn.Identity())
    gradients = []
    for model, engine in ((net, curvature), (fixed, "double_backward")):
        u = torch.zeros(24, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u], model.parameters(), curvature=engine, penalty="paper"
        )
        gain = 1.0 if model is net else 1.5  # the identity, times what one call gains

        def logits(model=model, gain=gain):
            hidden = model[1](model[0](x)) * gain
            return model[3](model[2](hidden))

        optimizer.upper_step(
            lambda logits=logits: F.cross_entropy(logits(), y),
            lambda logits=logits, u=u: (
                u.exp() * F.cross_entropy(logits(), y, reduction="none")
            ).mean(),
        )
        gradients.append(u.grad)
    assert net[1].gain == 1.5
    # Central differences in float64 err by about 1e-9 relative.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-12)


# Samples outside the batch.


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

    import threading

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


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference", "functional"])
def test_lower_precision_follows_float64(dtype, curvature):
    """One hypergradient after a few lower steps, against float64 at the same point."""
    u0, v0 = torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.75, -0.5, 0.125])

    def f(u, v):
        return ((v - u) ** 2).sum() + v.prod()

    def g(u, v):
        return (torch.cosh(v) - u.tanh() * v).sum() + (v.sum() - 0.5) ** 2

    gradients = []
    for kind in (torch.float64, dtype):
        u = u0.clone().to(kind).requires_grad_()
        v = v0.clone().to(kind).requires_grad_()
        engine = curvature if kind is dtype else "double_backward"
        optimizer = PenaltyBilevelOptimizer(
            [u],
            torch.optim.SGD([v], lr=0.0),
            curvature=engine,
            penalty=Stationarity(EpsilonTest(weight=0.5, damping=0.0)),
        )
        if engine == "functional":
            optimizer.upper_step(lambda a, b: f(a[0], b[0]), lambda a, b: g(a[0], b[0]))
        else:
            optimizer.upper_step(lambda u=u, v=v: f(u, v), lambda u=u, v=v: g(u, v))
        gradients.append(u.grad)
        assert u.grad.dtype == u.dtype
        assert optimizer.adjoint[0].dtype == torch.promote_types(kind, torch.float32)
    # A difference at the default step: about 3e-4 (forward, 32 bits) and 3e-2 (central, 16 bits).
    exact = curvature != "finite_difference"
    tolerance = {torch.float32: 1e-5 if exact else 3e-3, torch.bfloat16: 0.05 if exact else 0.1}
    error = (gradients[1].double() - gradients[0]).norm() / gradients[0].norm()
    assert float(error) < tolerance[dtype]


def test_mixed_dtypes_in_one_level():
    a = torch.ones(2, dtype=torch.float32, requires_grad=True)
    b = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [a, b], lower_lr=0.1, upper_lr=0.1)
    for _ in range(3):
        optimizer.step(
            lambda: a.square().sum() + b.float().square().sum() + u.square().sum(),
            lambda: ((a - u) ** 2).sum() + ((b - u.to(torch.bfloat16)) ** 2).sum().float(),
        )
    assert a.dtype == torch.float32
    assert b.dtype == torch.bfloat16
    assert a.grad.dtype == torch.float32


def test_autocast_inside_the_closures():
    x, y = classification()
    x = x.float()
    norms = []
    for enabled in (False, True):
        net = network().float()
        u = torch.zeros(24, dtype=torch.float32, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer([u], net.parameters(), penalty="paper")

        def loss(net=net, enabled=enabled, **options):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = net(x)
            return F.cross_entropy(logits.float(), y, **options)

        optimizer.upper_step(
            lambda loss=loss: loss(),
            lambda loss=loss, u=u: (u.exp() * loss(reduction="none")).mean(),
        )
        assert u.grad.dtype == torch.float32
        norms.append(u.grad)
    # bfloat16 activations keep 8 bits: single percents.
    assert float((norms[0] - norms[1]).norm() / norms[0].norm()) < 0.05


# Pure functions.


def test_functional_mode_takes_dicts_by_name_and_freezes():
    x, y = classification()
    net, twin = network(), network()
    net[0].bias.requires_grad_(False)
    twin[0].bias.requires_grad_(False)
    u = torch.zeros(24, requires_grad=True)
    w = torch.zeros(24, requires_grad=True)
    pure = PenaltyBilevelOptimizer(
        [("weights", u)], net.named_parameters(), curvature="functional", lower_steps=2
    )
    live = PenaltyBilevelOptimizer(
        [w], twin.parameters(), curvature="double_backward", lower_steps=2
    )

    def pure_loss(upper, lower, **options):
        logits = torch.func.functional_call(net, lower, (x,))
        return F.cross_entropy(logits, y, **options)

    for _ in range(4):
        pure.step(
            lambda upper, lower: pure_loss(upper, lower),
            lambda upper, lower: (
                upper["weights"].exp() * pure_loss(upper, lower, reduction="none")
            ).mean(),
        )
        live.step(
            lambda: F.cross_entropy(twin(x), y),
            lambda: (w.exp() * F.cross_entropy(twin(x), y, reduction="none")).mean(),
        )
    torch.testing.assert_close(u.detach(), w.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Memory.


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
def test_graphs_die_with_their_step(curvature):
    """Without the garbage collector: a reference cycle would hold a graph per step."""
    x, y = classification()
    net = network()
    u = torch.zeros(24, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), curvature=curvature)
    alive = []

    def keep(loss):
        alive.append(weakref.ref(loss))
        return loss

    if curvature == "functional":
        names = [n for n, _ in net.named_parameters()]

        def logits(lower):
            return torch.func.functional_call(net, dict(zip(names, lower, strict=True)), (x,))

        pair = (
            lambda upper, lower: keep(F.cross_entropy(logits(lower), y)),
            lambda upper, lower: keep(
                (upper[0].exp() * F.cross_entropy(logits(lower), y, reduction="none")).mean()
            ),
        )
    else:
        pair = (
            lambda: keep(F.cross_entropy(net(x), y)),
            lambda: keep((u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()),
        )
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            optimizer.step(*pair)
        assert alive
        assert not [ref for ref in alive if ref() is not None and ref().grad_fn is not None]
        assert all(p.grad.grad_fn is None for p in (u, *net.parameters()))
    finally:
        gc.enable()


def test_memory_of_state_is_two_copies_of_the_lower_level():
    """The multiplier and the curvature probe; nothing grows with the steps."""
    net = network()
    x, y = classification()
    u = torch.zeros(24, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), lower_steps=3)
    sizes = []
    for _ in range(3):
        optimizer.step(
            lambda: F.cross_entropy(net(x), y),
            lambda: (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean(),
        )
        own = optimizer.state_dict()["bilevel"]
        tensors = [*own["multiplier"], *own["probe"], *own["adjoint"]]
        sizes.append(sum({t.data_ptr(): t.numel() for t in tensors}.values()))
    assert sizes == [2 * sum(p.numel() for p in net.parameters())] * 3
