"""A real browser shows every page of the site without a complaint, on a desk and on a phone."""

import importlib.util
import pathlib

import pytest

pytest.importorskip("playwright", reason="looking at pages needs pip install '.[docs]'")
SCRIPT = pathlib.Path(__file__).parents[2] / "docs" / "check_pages.py"
spec = importlib.util.spec_from_file_location("check_pages", SCRIPT)
check_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_pages)

pytestmark = pytest.mark.skipif(
    check_pages.browser() is None, reason="no Chromium here (Debian: apt-get install chromium)"
)


def test_no_page_has_a_complaint(folder):
    assert check_pages.complaints(folder, check_pages.all_pages(folder)) == []


HEAD = "<!doctype html><link rel=icon href=data:,><meta name=viewport content='width=device-width'>"
BAD = {
    "logged": ("<script>console.error('oh')</script>", "console: oh"),
    "thrown": ("<script>undefined.x</script>", "script: "),
    "missing": ("<img src='none.png'>", "404 from "),
    "blank": ("<img src='none.png'>", "none.png did not load"),
    "abroad": ("<img src='http://192.0.2.1/x.png'>", "asks http://192.0.2.1/x.png"),
    "silent": ("<img src='http://127.0.0.1:1/x.png'>", "no answer from http://127.0.0.1:1/x.png"),
    "wide": ("<article><p style='width: 500px'>x</p></article>", "wide, the screen 390"),
    "flat": ("<math></math>", "formulas have no width"),
}


def test_bad_pages_are_complained_of_and_good_ones_are_not(tmp_path):
    good = "<article><pre style='overflow-x: auto'><p style='width: 500px'>x</p></pre></article>"
    for name, (body, _) in (BAD | {"good": (good, "")}).items():
        (tmp_path / f"{name}.html").write_text(HEAD + body)
    found = check_pages.complaints(tmp_path, check_pages.all_pages(tmp_path))
    for name, (_, said) in BAD.items():
        lines = [line for line in found if line.startswith(f"{name}.html")]
        assert any(said in line for line in lines), (name, lines)
    assert not [line for line in found if line.startswith("good")]
