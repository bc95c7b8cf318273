"""Every error and warning says where the documentation has it."""

import inspect
import pathlib
import pickle
import re

import pytest

from torch_penalty_bilevel import errors

ROOT = pathlib.Path(__file__).resolve().parents[1]


def classes():
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if hasattr(c, "page")]
    return [c for c in found if c.__module__ == errors.__name__ and not c.__name__.startswith("_")]


def test_all_have_a_page_of_their_own():
    wanted = {c for c in errors.BilevelError.__subclasses__()}
    assert {*classes()} >= wanted | {errors.BilevelError, errors.BilevelWarning}
    assert len({c.page for c in classes()}) == len(classes()) == 8


@pytest.mark.parametrize("kind", classes())
def test_the_message_ends_with_it(kind):
    parts = {errors.AdjointError: ("diverged", "no end", "in step 3")}
    error = kind(*parts.get(kind, ("what happened",)))
    assert str(error) == f"{error.message()} (see {kind.page})"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_messages_of_several_parts():
    adjoint = errors.AdjointError("diverged", "no end in sight", "in step 3")
    assert adjoint.message() == "adjoint: no end in sight; in step 3"
    assert adjoint.status == "diverged"
    assert errors.DoubleBackwardError("a", "b").message() == "a. b"
    assert str(errors.BilevelError()) == "(see docs/symptoms.md)"


def test_warnings_too():
    with pytest.warns(errors.BilevelWarning, match=r"^look again \(see docs/.*#warnings\)$"):
        errors.warn("look again")


@pytest.mark.parametrize("kind", classes())
def test_the_page_is_there(kind):
    page, _, anchor = kind.page.partition("#")
    lines = (ROOT / page).read_text().split("\n")
    headings = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    slugs = {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    targets = {line[1:-2] for line in lines if re.fullmatch(r"\([\w-]+\)=", line)}
    assert headings
    assert not anchor or anchor in slugs | targets
