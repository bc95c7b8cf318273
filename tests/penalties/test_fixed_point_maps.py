"""What the closure of a map may return and need not have, and what is refused with which words."""

import pytest
import torch
from stepping import C, W, build, close, curved_phi, start, target_f

from torch_penalty_bilevel import (
    BilevelWarning,
    FiniteDifference,
    PenaltyBilevelOptimizer,
    UnusedParameterError,
)


def test_maps_of_several_tensors_in_every_spelling():
    """Tuple, list and dict by name give the same step; a lone tensor serves one parameter."""
    results = []
    for spelling in ("tuple", "list", "dict", "functional"):
        u = torch.tensor([0.3], requires_grad=True)
        a = torch.tensor([0.1, 0.2], requires_grad=True)
        b = torch.tensor(0.4, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u],
            [("a", a), ("b", b)],
            penalty="fixed_point",
            curvature="functional" if spelling == "functional" else "auto",
        )

        def image(u, a, b):
            return {"a": 0.3 * a + u, "b": 0.2 * b + 0.1 * a.sum()}

        def f(u, a, b):
            return (a - 1).square().sum() + b.square() + u.square().sum()

        for _ in range(5):
            if spelling == "functional":
                optimizer.step(
                    lambda up, low, f=f: f(up[0], low["a"], low["b"]),
                    lambda up, low, image=image: image(up[0], low["a"], low["b"]),
                )
                continue

            def phi(u=u, a=a, b=b, image=image, spelling=spelling):
                found = image(u, a, b)
                return {"tuple": tuple, "list": list, "dict": lambda _: found}[spelling](
                    found.values()
                )

            optimizer.step(lambda u=u, a=a, b=b, f=f: f(u, a, b), phi)
        results.append(torch.cat([u.detach(), a.detach(), b.detach()[None]]))
    for other in results[1:]:
        close(other, results[0], 1e-14)


def test_a_lone_tensor_is_a_map_of_one_parameter():
    ends = []
    for spelling in (lambda image: image, lambda image: (image,)):
        u, v, optimizer = build(*start(), penalty="fixed_point")
        for _ in range(3):
            optimizer.step(lambda: target_f(u, v), lambda: spelling(curved_phi(u, v)))  # noqa: B023
        ends.append(torch.cat([u.detach(), v.detach()]))
    assert torch.equal(*ends)


def test_frozen_parameters_are_left_out_of_a_map():
    frozen = torch.ones(2)
    u, v = (t.requires_grad_() for t in start())
    both = PenaltyBilevelOptimizer([u], [frozen.requires_grad_(), v], penalty="fixed_point")
    frozen.requires_grad_(False)
    both.step(lambda: target_f(u, v) + frozen.sum(), lambda: (frozen.detach(), curved_phi(u, v)))
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(v.detach(), start()[1])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda u, v: v.sum(), ValueError, "0-d tensor, a loss.*shaped like the lower"),
        (lambda u, v: (v[:2],), ValueError, r"entry 0 has shape \(2,\).*\(4,\)"),
        (lambda u, v: (v, v), ValueError, "returned 2 tensors; .*tuple of 1 tensor"),
        (lambda u, v: (curved_phi(u, v).detach(),), ValueError, "does not depend on any parameter"),
        (lambda u, v: ([1.0] * 4,), TypeError, "entry 0 is list, not a tensor"),
        (lambda u, v: (torch.ones(4, dtype=torch.int64),), TypeError, "dtype torch.int64"),
        (lambda u, v: None, TypeError, "returned NoneType; penalty="),
        (lambda u, v: {"v": v}, ValueError, r"dict with keys \['v'\]"),
    ],
)
def test_what_a_map_may_not_return(bad, error, message):
    u, v, optimizer = build(*start(), penalty="fixed_point")
    with pytest.raises(error, match=message):
        optimizer.step(lambda: target_f(u, v), lambda: bad(u, v))


@pytest.mark.parametrize("penalty", ["stationarity", "value"])
def test_a_tuple_where_a_loss_belongs_hints_at_the_fixed_point(penalty):
    u, v, optimizer = build(*start(), penalty=penalty)
    with pytest.raises(TypeError, match='pass penalty="fixed_point"'):
        optimizer.step(lambda: target_f(u, v), lambda: (curved_phi(u, v),))


def test_finite_differences_are_refused_at_construction():
    for curvature in ("finite_difference", FiniteDifference()):
        with pytest.raises(ValueError, match='use curvature="auto", "double_backward" or "func'):
            build(*start(), penalty="fixed_point", curvature=curvature)


def test_dependence_of_maps_is_checked():
    u, v, optimizer = build(*start(), penalty="fixed_point")
    with pytest.raises(UnusedParameterError, match=r"upper\[0\]"):
        optimizer.step(lambda: v.square().sum(), lambda: W @ v)
    with pytest.warns(BilevelWarning, match="Phi does not depend on any upper parameter"):
        optimizer.step(lambda: target_f(u, v), lambda: W @ v)


def test_maps_need_no_second_derivative():
    """A custom function without one, which other penalties switch engines for or refuse."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    results = []
    for tanh in (torch.tanh, Once.apply):
        u, v, optimizer = build(*start(), penalty="fixed_point")
        for _ in range(3):
            optimizer.step(lambda: target_f(u, v), lambda: tanh(W @ v + u @ C))  # noqa: B023
        results.append(u.detach().clone())
    close(*results, 1e-14)
