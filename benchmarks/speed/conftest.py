"""One thread, failures as rows, and what a reader of the numbers must know in their file."""

import contextlib
import importlib.metadata

import pytest
import torch

from benchmarks.speed import methods

torch.set_num_threads(1)
FAILURES = pytest.StashKey[list]()
PACKAGES = ("torch", "torchopt", "higher", "pytest-benchmark")


def pytest_configure(config):
    config.stash[FAILURES] = []


@pytest.fixture
def failing_is_a_row(request):
    """A context: what fails inside is written to the results by its first line, then skipped."""

    @contextlib.contextmanager
    def context(group, name):
        try:
            yield
        except Exception as error:
            line = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            row = {"group": group, "name": name, "error": line}
            request.config.stash[FAILURES].append(row)
            pytest.skip(line)

    return context


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {p: importlib.metadata.version(p) for p in PACKAGES}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["failures"] = config.stash[FAILURES]
    output_json["absent"] = methods.ABSENT
