"""What a graph depends on and what in it cannot be trusted twice."""

from __future__ import annotations

import pytest
import torch
from networks import CustomCube, OnceCube
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_penalty_bilevel.curvature import autograd_graph as graph


def leaf(value: float = 1.0) -> torch.Tensor:
    return torch.tensor([value], requires_grad=True)


def test_nodes_visits_each_once() -> None:
    x = leaf()
    y = x * x
    z = y + y
    names = sorted(node.name() for node in graph.nodes(z.sum(), z))
    assert names == [
        "AddBackward0",
        "MulBackward0",
        "SumBackward0",
        "torch::autograd::AccumulateGrad",
    ]


def test_nodes_of_a_constant() -> None:
    assert list(graph.nodes(torch.ones(1))) == []


def test_deep_graphs_do_not_recurse() -> None:
    x = y = leaf()
    for _ in range(5000):
        y = y + 1
    assert graph.reached([y], [x]) == [True]


def test_reached() -> None:
    a, b, c, unused = leaf(), leaf(), leaf(), leaf()
    outputs = [a * 2, (b * 3).sin() + a]
    assert graph.reached(outputs, [a, b, c, unused]) == [True, True, False, False]
    assert graph.reached([c], [c, a]) == [True, False]  # an output that is a leaf itself
    assert graph.reached([(a * b).detach() + c], [a, b, c]) == [False, False, True]
    assert graph.reached([], [a]) == [False]


def test_reached_through_a_first_derivative() -> None:
    u, v, w = leaf(2.0), leaf(3.0), leaf(4.0)
    (slope,) = torch.autograd.grad((u * v**2 + w * v).sum(), v, create_graph=True)
    assert graph.reached([slope], [u, v, w]) == [True, True, True]
    (slope,) = torch.autograd.grad((u + v**2).sum(), v, create_graph=True)
    assert graph.reached([slope], [u, v]) == [False, True]


@pytest.mark.parametrize(
    ("function", "wrong", "custom"),
    [
        (lambda x: x.sin(), None, None),
        (CustomCube.apply, None, "autograd.Function CustomCube"),
        (
            OnceCube.apply,
            "autograd.Function OnceCube (marked once_differentiable)",
            "autograd.Function OnceCube",
        ),
        (
            lambda x: torch._weight_norm(x[:, None], torch.ones(1, 1), 0),
            "torch.nn.utils weight_norm",
            None,
        ),
    ],
)
def test_suspects(function, wrong, custom) -> None:
    output = function(leaf() * 2).exp().sum()
    assert graph.silently_wrong(output) == wrong
    assert graph.custom_function(output) == custom
    assert not graph.has_reentrant_checkpoint(output)


@pytest.mark.parametrize("form", ["parametrizations", "old"])
def test_both_weight_norms(form: str) -> None:
    if form == "old":
        with pytest.warns(FutureWarning):
            layer = nn.utils.weight_norm(nn.Linear(2, 2))
    else:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert graph.silently_wrong(layer(torch.ones(1, 2)).sum()) == "torch.nn.utils weight_norm"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    output = checkpoint(torch.sin, leaf(), use_reentrant=reentrant).sum()
    assert graph.has_reentrant_checkpoint(output) is reentrant


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "Relu"),
        (torch.abs, "Abs"),
        (lambda x: torch.maximum(x, x.sin()), "Maximum"),
        (lambda x: torch.minimum(x, x.sin()), "Minimum"),
        (lambda x: x.clamp(min=0.5), "Clamp"),
        (lambda x: torch.where(x > 0, x, 2 * x), "Where"),
        (lambda x: F.elu(x, alpha=2.0), "Elu"),
        (F.selu, "Elu"),
        (F.elu, None),
        (lambda x: torch.ops.aten.elu(x, 2.0, 1.0, 0.5), None),  # slopes 1 and 2 * 0.5
        (lambda x: F.celu(x, alpha=2.0), None),  # both slopes at 0 are 1, whatever alpha
        (lambda x: torch.linalg.vector_norm(x, float("inf")), "LinalgVectorNorm"),
        (lambda x: torch.linalg.vector_norm(x, 1), "LinalgVectorNorm"),
        (torch.linalg.vector_norm, None),
        (F.gelu, None),
        (lambda x: F.huber_loss(x, x.sin()), None),  # its gradient is continuous
    ],
)
def test_kinks_are_jumps_of_the_derivative(function, name) -> None:
    assert graph.kink(function(leaf() * 2).sum()) == name
