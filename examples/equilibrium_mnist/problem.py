"""The model of ``equilibrium_mnist``: images, a layer that is its own fixed point, a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

RADIUS = 0.99


Parameters = dict[str, Tensor]


class Problem(NamedTuple):
    """Images as rows of 784 numbers, and their digits."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def make_problem(data: tuple[Tensor, Tensor], seed: int, train: int, test: int) -> Problem:
    """Images drawn without replacement from all 70,000."""
    images, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train : train + test]
    return Problem(images[first], labels[first], images[second], labels[second])


def make_parameters(
    seed: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    inputs: int = 784,
    device: torch.device | str = "cpu",
) -> Parameters:
    """W (width, width) of spectral norm 0.5, U, b and a read-out, all to be learned."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=source, dtype=torch.float64) / shape[-1] ** 0.5
        return values.to(dtype)

    W = normal(width, width)
    parameters = {
        "W": 0.5 * W / torch.linalg.matrix_norm(W, 2),
        "U": normal(width, inputs),
        "b": torch.zeros(width, dtype=dtype),
        "C": normal(10, width),
        "c": torch.zeros(10, dtype=dtype),
    }
    return {name: value.to(device).requires_grad_() for name, value in parameters.items()}


def layer(p: Parameters, z: Tensor, images: Tensor) -> Tensor:
    """The map, for all images: (n, width) to (n, width)."""
    return torch.tanh(z @ p["W"].T + images @ p["U"].T + p["b"])


def loss_of(p: Parameters, z: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the read-out, in nats."""
    return cross_entropy(z @ p["C"].T + p["c"], labels)


@torch.no_grad()
def equilibrium(p: Parameters, images: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Z with ||z - map(z)|| <= tolerance ||z||, by iterating the map from 0.

    Raises:
        RuntimeError: it does not get there in 10,000 iterations.
    """
    drive = images @ p["U"].T + p["b"]
    z = torch.zeros_like(drive)
    for _ in range(10_000):
        new = torch.tanh(z @ p["W"].T + drive)
        moved, z = (new - z).norm(), new
        if moved <= tolerance * z.norm():
            return z
    raise RuntimeError(f"no equilibrium: the last iteration moved z by {float(moved):.1e}")


@torch.no_grad()
def project(W: Tensor, radius: float = RADIUS) -> None:
    """The nearest matrix with spectral norm <= radius: singular values clipped, in place."""
    left, values, right = torch.linalg.svd(W)
    if float(values[0]) > radius:
        W.copy_((left * values.clamp(max=radius)) @ right)
