"""Sphinx's configuration; docs/README.md says how the site is built and why so."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import torch_penalty_bilevel  # noqa: E402

project = "torch_penalty_bilevel"
author = "The torch_penalty_bilevel authors"
copyright = author
release = version = torch_penalty_bilevel.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "plain_docstrings",
]
exclude_patterns = ["_build", "_ext", "README.md", "pictures"]
templates_path: list[str] = []
nitpicky = True
# Types of torch and Python that have no page here (no network at build, so no intersphinx).
nitpick_ignore_regex = [("py:.*", r"(?!torch_penalty_bilevel).*")]
suppress_warnings: list[str] = []

# Markdown. Notebooks are shown with the outputs that they hold; tests/docs runs them.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# The API from docstrings.
autodoc_typehints = "none"
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
# Not in the environment of `make docs`; what is documented of the integrations is their own.
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

html_theme = "pydata_sphinx_theme"
html_title = "torch_penalty_bilevel"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 7,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {"index": [], "gallery": [], "changelog": [], "citation": [], "stability": []}

linkcheck_timeout = 20
linkcheck_retries = 2
copybutton_exclude = ".linenos, .gp, .go"
