"""What the tests of a step share: problems of one vector in each level, and an optimizer."""

import torch
from problems import normal

from torch_penalty_bilevel import PenaltyBilevelOptimizer

N_U, N_V = 3, 4
A = torch.tensor([[3.0, 0.5, 0, 0.2], [0.5, 2, 0.1, 0], [0, 0.1, 1.5, 0.3], [0.2, 0, 0.3, 1.0]])
A = A.double()
C = torch.linspace(-1, 1, N_U * N_V, dtype=torch.float64).reshape(N_U, N_V)


def quadratic_f(u, v):
    return (u - 1) @ (u - 1) + (v - 0.5) @ A @ (v - 0.5) + u.sum() * v.sum()


def quadratic_g(u, v):
    return 0.5 * v @ A @ v + u @ C @ v


def curved_f(u, v):
    return ((v - u.sum()) ** 2).sum() + torch.cosh(u).sum()


def curved_g(u, v):
    return torch.logsumexp(v * (u @ C), 0) + torch.cosh(v).sum() + 0.5 * v @ A @ v


PROBLEMS = {"quadratic": (quadratic_f, quadratic_g), "curved": (curved_f, curved_g)}


def start():
    return torch.tensor([0.3, -0.2, 0.9]), torch.tensor([0.5, -1.0, 0.7, 0.1])


def build(u, v, **options):
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    return u, v, PenaltyBilevelOptimizer([u], [v], **options)


def closures(name, u, v, curvature):
    f, g = PROBLEMS[name]
    if curvature == "functional":
        return (lambda upper, lower: f(upper[0], lower[0])), (
            lambda upper, lower: g(upper[0], lower[0])
        )
    return (lambda: f(u, v)), (lambda: g(u, v))


LIVE = ["auto", "double_backward"]
W = normal(4, 4, seed=31)
W = 0.8 * W / torch.linalg.matrix_norm(W, 2)


def curved_phi(u, v):
    return torch.tanh(W @ v + u @ C)


def target_f(u, v):
    return ((v - 0.2) ** 2).sum() + 0.1 * u @ u + 0.3 * u.sum() * v[0]


def wrap(f, phi, u, v, curvature):
    """Two callables for ``step``."""
    if curvature == "functional":
        return (lambda a, b: f(a[0], b[0])), (lambda a, b: (phi(a[0], b[0]),))
    return (lambda: f(u, v)), (lambda: (phi(u, v),))


def close(mine, theirs, tolerance=1e-11):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
