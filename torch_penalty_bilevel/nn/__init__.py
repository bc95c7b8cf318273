"""Building blocks of bilevel problems, each an ordinary ``torch.nn.Module``.

What an upper level often is: weights of samples and of sources, strengths of regularisation,
perturbations of data. And what a lower level often is: heads of several tasks.
"""

from __future__ import annotations

from .bounded_perturbation import BoundedPerturbation as BoundedPerturbation
from .regularizers import Regularizers as Regularizers
from .sample_weights import SampleWeights as SampleWeights
from .source_weights import SourceWeights as SourceWeights
from .stacked_heads import StackedHeads as StackedHeads
from .weight_decay import WeightDecay as WeightDecay
