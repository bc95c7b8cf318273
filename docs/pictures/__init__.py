"""The pictures of the documentation, each drawn by a module here: ``python -m docs.pictures``."""
