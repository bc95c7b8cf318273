"""Nothing is imported before it is asked for, and what is missing is named."""

import importlib
import subprocess
import sys

import pytest

LIBRARIES = ("accelerate", "lightning", "transformers")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named(library, monkeypatch):
    name = f"torch_penalty_bilevel.integrations.{library}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for each in [each for each in sys.modules if each.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install {library}, .*\[train"):
        importlib.import_module(name)


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, torch_penalty_bilevel.integrations as i; i.log_metrics; "
    code += f"print({{*{LIBRARIES!r}, 'tensorboard', 'wandb'}} & {{*sys.modules}})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"
