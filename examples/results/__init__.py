"""The results of the examples on one page."""
