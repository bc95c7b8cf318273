"""The catalogue of mutations fits the code, and its runner catches one."""

import contextlib
import subprocess
import sys

import pytest
from covering import Covering
from forking import Nursery
from judging import copied, judged
from mutants import PACKAGE, ROOT, Mutation, bare_modules, read

MUTATIONS = read()


def test_there_are_some_for_every_module():
    here = {str(path.relative_to(ROOT / PACKAGE)) for path in (ROOT / PACKAGE).rglob("*.py")}
    assert {m.file for m in MUTATIONS} == here - bare_modules(ROOT / PACKAGE)
    assert len(MUTATIONS) >= 100


@pytest.mark.parametrize("file", sorted({m.file for m in MUTATIONS}))
def test_each_applies_once_and_compiles_to_other_code(file):
    source = (ROOT / PACKAGE / file).read_text()
    true = compile(source, file, "exec")
    for mutation in (m for m in MUTATIONS if m.file == file):
        changed = mutation.applied(source)
        assert compile(changed, file, "exec") != true, mutation.name
        assert mutation.lines(source), mutation.name
        assert mutation.why, mutation.name
        assert all((ROOT / tests).is_file() for tests in mutation.tests), mutation.name


def test_code_that_has_moved_on_is_an_error():
    mutation = Mutation("gone", "norms.py", "a + b", "a - b", "sign")
    for source, times in (("a * b", 0), ("a + b, a + b", 2)):
        with pytest.raises(ValueError, match=rf"gone: .*{times} times in norms.py"):
            mutation.applied(source)


def test_lines_are_those_of_the_statements_that_change():
    source = "def f(a, b):\n    x = (\n        a\n        + b\n    )\n    if x:\n        x = 2\n"
    source += "    return x\n"
    assert Mutation("one", "f.py", "+ b", "- b", "").lines(source) == {2, 3, 4, 5}
    assert Mutation("head", "f.py", "if x:", "if not x:", "").lines(source) == {6}
    assert Mutation("end", "f.py", "x = 2\n    return", "x = 2\n    yield", "").lines(source) == {8}


def test_a_mutation_is_caught_on_a_copy(tmp_path):
    copy = copied(tmp_path / "copy")
    (copy / "tests" / "test_here.py").write_text(
        "from torch_penalty_bilevel.errors import DoubleBackwardError\n"
        "def test_blind(): DoubleBackwardError('a')\n"
        "def test_sees(): assert DoubleBackwardError('a', 'b').reason == 'a'\n"
    )
    mutation = next(m for m in MUTATIONS if m.name == "reason-is-the-remedy")
    before = (copy / mutation.path).read_text()
    blind, sees = (f"tests/test_here.py::test_{name}" for name in ("blind", "sees"))
    with contextlib.closing(Nursery()) as nursery:
        verdict = judged(mutation, nursery, copy, [blind, sees], [], Covering())
    assert (verdict["end"], verdict["by"]) == ("caught", sees)
    assert (copy / mutation.path).read_text() == before
    assert (ROOT / mutation.path).read_text() == before


def test_the_command_explains_itself():
    command = [sys.executable, "tests/mutations/run.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--resume" in ended.stdout
