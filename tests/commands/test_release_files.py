"""The files of a release agree with each other: workflows, Makefile, versions, changelog, sdist."""

import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import torch_penalty_bilevel

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_run_what_there_is(path):
    commands = re.findall(r"^ +-? *run: (.*)$", path.read_text(), re.MULTILINE)
    made = [word.removeprefix("make ") for word in commands if word.startswith("make ")]
    scripts = [
        re.sub(r"^bash ", "", c).split()[0] for c in commands if re.match(r"bash |tests/", c)
    ]
    assert made + scripts
    assert {*made} <= {*TARGETS}
    assert all((ROOT / script).is_file() for script in scripts)


def test_ci_is_dot_ci_run():
    assert [p.name for p in WORKFLOWS] == ["ci.yml", "docs.yml", "release.yml"]
    assert "- run: bash .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()


def pairs_of_the_workflow():
    """(Python, torch) pairs of the workflow, beside the one that runs all tests."""
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    return re.findall(r'python: "(3\.\d+)", torch: "([\d.]+)"', text)


def test_the_versions_stated_are_the_versions_tested():
    pairs = pairs_of_the_workflow()
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    pythons = {python for python, _ in pairs} | {"3.11"}
    stated = PROJECT["project"]["classifiers"]
    of_python = [c.rsplit(" ", 1)[1] for c in stated if "Python :: 3." in c]
    assert {*of_python} == pythons
    oldest = min(pythons, key=Version)
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    (torch,) = (Requirement(r) for r in PROJECT["project"]["dependencies"])
    torches = {Version(version) for _, version in pairs} | {Version(pinned)}
    assert torch.name == "torch"
    assert str(torch.specifier) == f">={min(torches).major}.{min(torches).minor}"
    readme = (ROOT / "README.md").read_text()
    sentence = f"Python {oldest} to {max(pythons, key=Version)}"
    assert f"{sentence} and torch {min(torches)} to {max(torches)}" in readme


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    version, date = headings[0]
    assert version == torch_penalty_bilevel.__version__
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert [Version(v) for v, _ in headings] == sorted(
        (Version(v) for v, _ in headings), reverse=True
    )


def test_an_index_page_has_no_broken_link():
    """The substitutions that pyproject.toml makes in README.md."""
    text = (ROOT / "README.md").read_text()
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    count = text.count("](")
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert count > 5
    assert not re.findall(r"\]\((?!https?:|#)", text)
    assert "[" not in re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)  # no half of a link


def test_the_sdist_has_what_the_readme_names():
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    for path in [*named, "Makefile", "constraints.txt", ".ci/run"]:
        assert (ROOT / path).exists(), path
        assert any(f"/{path}".startswith(entry) for entry in listed), path
