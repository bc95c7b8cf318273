"""Data and performance profiles of the package's solvers."""
