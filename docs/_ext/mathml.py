"""Formulas as MathML, which browsers draw themselves: no script, no fonts from a network."""

from __future__ import annotations

from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _mathml(latex: str, display: str) -> str:
    known = latex.replace(r"\arg", r"\text{arg}\,")
    # latex2mathml leaves the backslash of an underscore in text, and of what it does not know.
    result = convert(known, display=display).replace(r"\_", "_")
    if "\\" in result:
        logger.warning("a command that latex2mathml does not know: %s", latex)
    return result


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(_mathml(node.astext(), "inline"))
    raise SkipNode


def _block(writer: Any, node: Any) -> None:
    # A blank line in a docstring's formula parts two formulas.
    for formula in filter(None, map(str.strip, node.astext().split("\n\n"))):
        writer.body.append(f'<div class="formula">{_mathml(formula, "block")}</div>\n')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Take over HTML's formulas: Sphinx prefers a renderer that an extension adds."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"version": "1", "parallel_read_safe": True}
