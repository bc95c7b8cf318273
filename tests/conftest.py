"""Float64 and a fixed seed for every test; a test that wants another dtype says so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
