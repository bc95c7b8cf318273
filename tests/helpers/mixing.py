"""A tiny mixture of sources for the steps and the runs of ``mix_sources``."""

import torch

from examples.mix_sources.formulation import Mixing
from examples.mix_sources.problem import Mixture
from examples.mix_sources.transformer import Size

SIZE = Size(width=8, layers=1, context=6)


def mixing(windows=9):
    """Three sources of random letters, and two texts of other ones."""
    torch.manual_seed(0)
    sources, clean, test = (torch.randint(96, shape) for shape in ((3, 60), (50,), (50,)))
    mixture = Mixture(["a", "b", "c"], ["wanted", "other", "corrupted"], sources, clean, test, 0)
    return Mixing(mixture, SIZE, windows)
