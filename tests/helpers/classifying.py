"""Random classification data and a small network for them."""

import torch
from torch import nn


def classification(seed=0, n=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def network(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), *extra, nn.Tanh(), nn.Linear(6, 3))
