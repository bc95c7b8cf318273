"""The page of symptoms has every error and warning of the package, in the package's words."""

import ast
import pathlib
import re

import pytest
import said

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "symptoms.md"
# Short ends of messages whose beginnings are elsewhere on the page.
PARTS = {"curvature/inspection.py"}


def squeezed(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def page():
    return squeezed(PAGE.read_text())


@pytest.mark.parametrize(("place", "text"), said.messages().items(), ids=lambda v: str(v)[:40])
def test_every_error_and_warning_is_on_the_page(page, place, text):
    if place.split(":")[0] in PARTS and len(text) < 5:
        pytest.skip("joined from a message and a remedy, both of which are looked for")
    assert squeezed(text) in page


def constants():
    """All strings of the package, with the fixed parts of f-strings apart."""
    for path in said.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield squeezed(node.value.replace("{spread:.1g}", "\n"))


def quoted():
    text = PAGE.read_text()
    blocks = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    table = re.findall(r"^\| `([^`|]+)` \|", text[text.index("## Errors of use") :], re.MULTILINE)
    return [b for b in (*blocks, *table) if not b.startswith(("print(", "GradScaler"))]


# Where the package joins two strings that are one sentence on the page.
JOINTS = ("depends^ on", "depend^ on", ". ^Use curvature", ". ^A finite difference", ". ^To")


def pieces(block):
    """What stands between the "..." of a quotation, as the package has it."""
    for kept in ("checkpoint(..., use", "check_hypergradient(...)"):
        block = block.replace(kept, kept.replace("...", "\1"))
    for joint in JOINTS:
        block = block.replace(joint.replace("^", ""), joint.replace("^", "..."))
    for part in block.replace("adjoint: ", "...").split("..."):
        part = squeezed(part).replace("\1", "...").strip(" .;,")
        if part not in ("", "on"):
            yield part


def test_every_text_on_the_page_is_one_of_the_package():
    known = "\n".join(constants())
    assert len(quoted()) > 30
    assert [part for block in quoted() for part in pieces(block) if part not in known] == []
