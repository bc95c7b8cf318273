"""The public names, their signatures, and imports that point one way."""

import ast
import inspect
import pathlib
import re

import pytest
from layers import FLOORS, LAYERS

import torch_penalty_bilevel as tpb
from torch_penalty_bilevel import functional

TESTS = pathlib.Path(__file__).resolve().parent
PACKAGE = pathlib.Path(tpb.__file__).parent
DOORS = {"__init__", "__main__"}


def test_public_names():
    assert sorted(tpb.__all__) == [
        "AdjointError",
        "BilevelError",
        "BilevelWarning",
        "DoubleBackward",
        "DoubleBackwardError",
        "EpsilonTest",
        "FiniteDifference",
        "FixedPoint",
        "HypergradientOptimizer",
        "HypergradientReport",
        "LeastSquares",
        "Metrics",
        "MinimizeResult",
        "NonFiniteError",
        "NondeterministicClosureError",
        "PenaltyBilevelOptimizer",
        "Stationarity",
        "UnusedParameterError",
        "ValueGap",
        "WorkerError",
        "constraints",
        "functional",
        "minimize",
        "nn",
    ]
    assert all(hasattr(tpb, name) for name in tpb.__all__)
    assert (PACKAGE / "py.typed").exists()


def parameters(function):
    return {
        name: (p.kind is p.KEYWORD_ONLY, p.default)
        for name, p in inspect.signature(function).parameters.items()
    }


def test_optimizer_signature():
    found = parameters(tpb.PenaltyBilevelOptimizer)
    assert list(found)[:2] == ["upper", "lower"]
    options = {k: default for k, (keyword, default) in found.items() if keyword}
    assert options == {
        "upper_lr": None,
        "lower_lr": None,
        "lower_steps": 1,
        "certificate_tolerance": 0.05,
        "max_lower_steps": 100,
        "warmup_steps": 0,
        "penalty": "stationarity",
        "curvature": "auto",
        "reduce": None,
        "process_group": None,
        "allow_unused": False,
        "upper_constraint": None,
        "lower_constraint": None,
    }
    options = parameters(tpb.PenaltyBilevelOptimizer.check_hypergradient)
    assert list(options)[1:3] == ["upper_closure", "lower_closure"]
    assert {k: default for k, (keyword, default) in options.items() if keyword} == {
        "tolerance": None,
        "max_iterations": None,
        "damping": 0.0,
        "resolve": None,
    }
    for half in ("step", "lower_step", "upper_step"):
        signature = inspect.signature(getattr(tpb.PenaltyBilevelOptimizer, half))
        both = ["upper_closure", "lower_closure"]
        assert list(signature.parameters)[1:] == both + ["closure"] * (half == "step")


def test_hypergradient_optimizer_signature():
    found = parameters(tpb.HypergradientOptimizer)
    assert list(found)[:2] == ["upper", "lower"]
    options = {k: default for k, (keyword, default) in found.items() if keyword}
    defaults = {"method": "cg", "lower_steps": 1, "warm_start": True, "lower_is_map": False}
    defaults |= {"curvature": "auto", "allow_unused": False}
    assert {k: v for k, v in options.items() if v is not None} == defaults
    signature = inspect.signature(tpb.HypergradientOptimizer.step)
    assert list(signature.parameters)[1:] == ["upper_closure", "lower_closure", "closure"]


def test_functional_signatures():
    gradient = parameters(functional.penalty_gradient)
    assert list(gradient)[:4] == ["upper_loss", "lower_loss", "upper", "lower"]
    assert gradient["weight"] == (True, inspect.Parameter.empty)
    assert gradient["multiplier"] == (True, None)
    assert gradient["damping"] == (True, 0.0)
    assert parameters(functional.hypergradient)["method"] == (True, "cg")
    assert functional.PenaltyGradient._fields == (
        "upper_grad",
        "lower_grad",
        "residual",
        "upper_loss",
        "lower_loss",
    )


def test_minimize_signature():
    found = parameters(tpb.minimize)
    assert list(found)[:4] == ["upper_loss", "lower_loss", "upper", "lower"]
    assert {k: default for k, (keyword, default) in found.items() if keyword} == {
        "upper_constraint": None,
        "lower_constraint": None,
        "tolerance": 1e-8,
        "max_evaluations": 20000,
        "restarts": 0,
        "seed": 0,
        "callback": None,
    }


def imported(path):
    """First-level module names of the package that a file imports."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names}
    return found


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path):
    module = module_of(path)
    if module in DOORS:
        return
    assert imported(path) <= LAYERS[module]


def test_there_are_few_rooms_on_few_floors():
    rooms = {module_of(path) for path in PACKAGE.rglob("*.py")} - DOORS
    assert rooms == {*LAYERS}
    assert len(rooms) <= 25
    assert len(FLOORS) <= 9


def test_modules_stay_small():
    files = {str(p.relative_to(PACKAGE)): p for p in PACKAGE.rglob("*.py")}
    lengths = {name: len(p.read_text().splitlines()) for name, p in files.items()}
    # The optimizers hold the manual in their docstrings.
    assert lengths.pop("optimizers/penalty.py") <= 400
    assert lengths.pop("optimizers/hypergradient.py") <= 400
    assert max(lengths.values()) <= 310, lengths


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_other_files_stay_small(folder):
    files = (TESTS.parent / folder).rglob("*.py")
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert max(lengths.values()) <= 310, lengths


def test_tests_lie_in_the_folders_of_what_they_test():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")} - {"tests"}
    assert folders <= rooms | {"commands", "docs", "stress"}
    here = {path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")}
    assert here == {"conftest.py"}, "what test files share is in tests/helpers"


def test_a_class_has_a_name_of_its_own():
    found = [
        match
        for path in PACKAGE.rglob("*.py")
        for match in re.findall(r"^class ([A-Za-z]\w*)", path.read_text(), re.MULTILINE)
    ]
    assert len(found) > 50
    assert len(set(found)) == len(found)
