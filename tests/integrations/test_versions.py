"""The README's table of versions, the extra [trainers] and what is installed agree."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## Integrations")[1].split("\n## ")[0]
TESTED = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", SECTION, re.MULTILINE))


def test_the_extra_asks_for_what_was_tested():
    extras = re.search(r"trainers = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert dict(re.findall(r'"(\w+)>=([\d.]+)"', extras[1])) == TESTED
    assert len(TESTED) == 8


@pytest.mark.parametrize("library", TESTED)
def test_what_is_installed_is_not_older(library):
    try:
        installed = Version(metadata.version(library))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    assert installed >= Version(TESTED[library])


def test_the_table_names_every_integration():
    folder = ROOT / "torch_penalty_bilevel" / "integrations"
    modules = {path.stem for path in folder.glob("*.py")}
    assert modules - {"__init__", "missing", "logs"} <= set(TESTED)
