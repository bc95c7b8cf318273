"""CUDA's kernels without a second derivative, in 16 bits and compiled: what each engine makes of
them."""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_penalty_bilevel import (
    DoubleBackwardError,
    EpsilonTest,
    PenaltyBilevelOptimizer,
    Stationarity,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
N, SIZE = 16, 32


class Attention(nn.Module):
    def __init__(self, backend, dtype):
        super().__init__()
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, 4)
        self.backend, self.dtype = backend, dtype

    def forward(self, x):
        q, k, v = self.qkv(x).to(self.dtype).reshape(N, -1, 3, 2, SIZE // 2).unbind(2)
        with sdpa_kernel(self.backend):
            mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.out(mixed.float().mean(2).reshape(N, SIZE))


class Recurrent(nn.Module):
    def __init__(self, cudnn=True):
        super().__init__()
        self.lstm, self.out = nn.LSTM(SIZE, 24, batch_first=True), nn.Linear(24, 4)
        self.cudnn = cudnn

    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=self.cudnn):
            return self.out(self.lstm(x)[0].mean(1))


def attention(backend, dtype=torch.float32):
    return lambda: Attention(backend, dtype)


# With what stands for it where a second derivative is wanted, and how far rounding (TF32, 16 bits)
# takes them apart: measured 4e-3, 4e-3, 2e-4 and 5e-4 on an H200.
KERNELS = {
    "flash": (
        attention(SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        attention(SDPBackend.MATH),
        "flash_attention",
        0.02,
    ),
    "cudnn": (
        attention(SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
        attention(SDPBackend.MATH),
        "cudnn_attention",
        0.02,
    ),
    "efficient": (
        attention(SDPBackend.EFFICIENT_ATTENTION),
        attention(SDPBackend.MATH),
        "efficient_attention",
        2e-3,
    ),
    "lstm": (Recurrent, lambda: Recurrent(cudnn=False), "cudnn_rnn", 5e-3),
}


def task(make, engine, **options):
    torch.manual_seed(0)
    net = make().to("cuda", torch.float32)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 12, SIZE, generator=draw, dtype=torch.float32).cuda()
    y = torch.randint(0, 4, (N,), generator=draw).cuda()
    u = torch.zeros(N, device="cuda", dtype=torch.float32, requires_grad=True)

    def losses():
        return F.cross_entropy(net(x), y, reduction="none")

    optimizer = PenaltyBilevelOptimizer(
        [u],
        net.parameters(),
        upper_lr=0.01,
        lower_lr=1e-3,
        curvature=engine,
        penalty=Stationarity(EpsilonTest(weight=0.5)),
        **options,
    )
    return u, net, optimizer, lambda: losses().square().mean(), lambda: (u.exp() * losses()).mean()


@pytest.mark.parametrize("kernel", KERNELS)
def test_double_backward_says_what_to_do(kernel):
    make, _, name, _ = KERNELS[kernel]
    u, net, optimizer, f, g = task(make, "double_backward")
    before = [t.detach().clone() for t in (u, *net.parameters(), torch.cuda.get_rng_state())]
    with pytest.raises(DoubleBackwardError, match=name) as caught:
        optimizer.step(f, g)
    assert 'curvature="finite_difference"' in str(caught.value)
    after = u, *net.parameters(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_differences_are_near_the_second_derivative(kernel, engine):
    make, plain, name, tolerance = KERNELS[kernel]
    u, _, optimizer, f, g = task(make, engine)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        optimizer.upper_step(f, g)
    said = [str(w.message) for w in record]
    if engine == "auto":
        assert len(said) == 1
        assert said[0].startswith("switched to finite differences")
        assert name in said[0]
        assert optimizer.curvature.takes_differences
    else:
        assert said == []
    exact, _, other, *closures = task(plain, "double_backward")
    other.upper_step(*closures)
    error = float((u.grad - exact.grad).norm() / exact.grad.norm())
    assert error < tolerance
    for _ in range(20):
        optimizer.step(f, g)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(12, 24, 3), nn.Conv1d(24, 24, 3)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        return self.out(F.silu(self.second(F.silu(self.first(x)))).mean(2))


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(12 * SIZE, 64), nn.Tanh(), nn.Linear(64, 4))


@pytest.fixture
def _matrices_in_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_matrices_in_tf32")
@pytest.mark.parametrize("make", [perceptron, Convolutional, lambda: Recurrent(cudnn=True)])
def test_differences_see_through_tf32(make):
    """Measured 1e-3 to 3e-3; with the steps of float32 a small perceptron had J q off by 0.7."""
    u, _, optimizer, f, g = task(make, "finite_difference")
    optimizer.upper_step(f, g)
    assert optimizer.curvature.product_cost == 2
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=False):
        exact, _, other, *closures = task(
            (lambda: Recurrent(cudnn=False)) if make not in (perceptron, Convolutional) else make,
            "double_backward",
        )
        other.upper_step(*closures)
    error = float((u.grad - exact.grad).norm() / exact.grad.norm())
    assert error < 0.02


def network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(SIZE, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 4))
    return net.to("cuda", torch.float32)


def data():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, SIZE, generator=draw, dtype=torch.float32).cuda()
    return x, torch.randint(0, 4, (64,), generator=draw).cuda()


# bfloat16 activations keep 8 bits: single percents, and their difference a few more.
@pytest.mark.parametrize(
    ("engine", "tolerance"), [("double_backward", 0.05), ("auto", 0.05), ("finite_difference", 0.1)]
)
def test_autocast_inside_the_closures(engine, tolerance):
    (x, y), gradients = data(), []
    for enabled in (False, True):
        net, u = network(), torch.zeros(64, device="cuda", dtype=torch.float32, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u], net.parameters(), penalty="paper", curvature=engine if enabled else "auto"
        )

        def loss(net=net, enabled=enabled, **options):
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                return F.cross_entropy(net(x), y, **options)

        optimizer.upper_step(loss, lambda loss=loss, u=u: (u.exp() * loss(reduction="none")).mean())
        assert u.grad.dtype == torch.float32
        gradients.append(u.grad.clone())
        if enabled:
            for _ in range(20):
                optimizer.step(
                    loss, lambda loss=loss, u=u: (u.exp() * loss(reduction="none")).mean()
                )
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert error < tolerance


@pytest.mark.filterwarnings("ignore:the lower parameters .* have 16 bits")
@pytest.mark.parametrize(
    ("engine", "tolerance"), [("double_backward", 0.05), ("finite_difference", 0.1)]
)
def test_16_bit_parameters_have_a_multiplier_in_32(engine, tolerance):
    (x, y), gradients = data(), []
    for dtype in (torch.float32, torch.bfloat16):
        net, u = network().to(dtype), torch.zeros(64, device="cuda", requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u],
            net.parameters(),
            penalty=Stationarity(EpsilonTest(weight=0.5)),
            curvature=engine if dtype == torch.bfloat16 else "double_backward",
        )

        def losses(net=net, dtype=dtype):
            return F.cross_entropy(net(x.to(dtype)).float(), y, reduction="none")

        def g(losses=losses, u=u):
            return (u.exp() * losses()).mean()

        optimizer.upper_step(lambda losses=losses: losses().mean(), g)
        gradients.append(u.grad.double())
        assert {q.dtype for q in optimizer.adjoint} == {torch.float32}
    for _ in range(20):
        optimizer.step(lambda: losses().mean(), g)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert error < tolerance


def test_a_scaler_cannot_drive_it():
    u, net, optimizer, f, g = task(Recurrent, "finite_difference")
    scaler, before = torch.amp.GradScaler("cuda"), [p.clone() for p in (u, *net.parameters())]
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=f, lower_closure=g)
    with pytest.raises(AssertionError):  # it has scaled no loss
        scaler.step(optimizer, f, g)
    assert all(torch.equal(a, b) for a, b in zip(before, (u, *net.parameters()), strict=True))


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
def test_compiled_by_triton_once(engine):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    ends, (x, y) = [], data()
    for compiled in (False, True):
        net = network().double()
        model = torch.compile(net, backend=counter) if compiled else net
        u = torch.zeros(64, device="cuda", requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u],
            net.parameters(),
            upper_lr=0.01,
            lower_lr=1e-3,
            curvature=engine if compiled else "double_backward",
        )

        def losses(model=model):
            return F.cross_entropy(model(x.double()), y, reduction="none")

        def g(losses=losses, u=u):
            return (u.exp() * losses()).mean()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that "auto" switches
            for _ in range(25):
                optimizer.step(lambda losses=losses: losses().square().mean(), g)
        ends.append(torch.cat([u, *[p.reshape(-1) for p in net.parameters()]]).detach())
    assert counter.frame_count == 1
    # Central differences err by 1e-9, and Adam divides by small gradients.
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    torch.compiler.reset()
