"""An index has one meaning, and a parameter a gradient, in every block."""

import pytest
import torch

from torch_penalty_bilevel.nn import (
    BoundedPerturbation,
    Regularizers,
    SampleWeights,
    SourceWeights,
    StackedHeads,
)

BLOCKS = {
    "samples": lambda: SampleWeights(3, torch.tensor([0.2, 0.4, 0.6])),
    "sources": lambda: SourceWeights(3),
    "sources, floor": lambda: SourceWeights(3, 0.9),
    "rows": lambda: BoundedPerturbation(torch.arange(6.0).reshape(3, 2), radius=1.0),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    made = BLOCKS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.rand_like(parameter)
    return made


def test_numbers_in_any_form_pick_entries(block):
    everything = block()
    for index in ([2, 0], 1, torch.tensor([[2, 2]], dtype=torch.int32), torch.tensor(0)):
        torch.testing.assert_close(block(index), everything[index])
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(block(mask.nonzero().squeeze(1)), everything[mask])


def test_numbers_from_the_end_and_beyond_are_refused(block):
    for index in (-1, [0, -3], torch.tensor([0, 3]), torch.tensor([-4])):
        with pytest.raises(IndexError, match=r"index must lie in \[0, 3\), the numbers of the "):
            block(index)


def test_masks_and_other_things_are_refused(block):
    mask = torch.tensor([True, False, True])
    for index in (mask, mask.tolist(), mask.byte(), mask.double(), "all", slice(2)):
        with pytest.raises(TypeError, match="index must be a tensor of integers, got"):
            block(index)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "float32"])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: SampleWeights(3, dtype=dtype),
        lambda dtype: SourceWeights(3, dtype=dtype),
        lambda dtype: StackedHeads(2, 3, 4, dtype=dtype),
        lambda dtype: StackedHeads(2, 3, 4, cosine=True, dtype=dtype),
        lambda dtype: Regularizers(["l1"], dtype=dtype),
    ],
)
def test_what_is_learned_is_a_floating_point_number(make, dtype):
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, such as .*, got "):
        make(dtype)
