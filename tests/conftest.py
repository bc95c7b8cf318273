"""Float64, a fixed seed and one thread for every test; a test that wants another dtype says so."""

import pytest
import torch
from hypothesis import settings

# The tensors are tiny: on a busy machine a thread pool costs up to twenty times what it gives.
torch.set_num_threads(1)

# The same examples in every run: a failure can be repeated, and a change is what broke it.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _reproducible_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(config, items):
    """Coverage takes half as long again, and long runs cross lines that others have covered. Who
    asks which test covers what (``--cov-context``) gets all of them."""
    if config.getoption("cov_context", None):
        return
    for item in items:
        if "stress" in item.path.parts or item.get_closest_marker("long"):
            item.add_marker("no_cover")
