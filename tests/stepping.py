"""What the tests of a step share: two problems of one vector in each level, and an optimizer."""

import torch

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
