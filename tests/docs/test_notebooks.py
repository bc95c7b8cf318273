"""The notebooks are those of their pages, run from top to bottom, and stay small."""

import importlib.util
import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need pip install '.[docs]'")
pytest.importorskip("nbclient", reason="notebooks need pip install '.[docs]'")
FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "notebooks"
spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "run.py")
make_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebooks)

each = pytest.mark.parametrize("name", make_notebooks.SOURCES)


def printed(notebook):
    return [
        "".join(o["text"] for o in cell.get("outputs", ()) if o["output_type"] == "stream")
        for cell in notebook.cells
    ]


@each
def test_a_notebook_is_that_of_its_page(name):
    kept = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    wanted = make_notebooks.made(name)
    assert [(c.cell_type, c.source) for c in kept.cells] == [
        (c.cell_type, c.source) for c in wanted.cells
    ], "make notebooks"
    assert any(printed(kept)), "it has no outputs: make notebooks"


@each
def test_outputs_are_small_and_hold_no_error(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 120_000
    for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells:
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]


@each
@pytest.mark.filterwarnings("default")  # of the Jupyter client, not of the cells
def test_a_notebook_runs(name):
    done = make_notebooks.run(make_notebooks.made(name))
    assert [c.execution_count for c in done.cells if c.cell_type == "code"] == list(
        range(1, 1 + sum(c.cell_type == "code" for c in done.cells))
    )
    kept = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert [bool(text) for text in printed(done)] == [bool(text) for text in printed(kept)]
