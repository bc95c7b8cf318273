"""The error where a library is not there."""

from __future__ import annotations


def missing(library: str) -> ImportError:
    """For ``integrations.<library>``, to be raised from the error of the import."""
    return ImportError(
        f"torch_penalty_bilevel.integrations.{library} needs {library}: pip install {library}, or "
        "this package with its extra [trainers]",
        name=library,
    )
