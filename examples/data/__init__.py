"""Data sets of examples and benchmarks, one a file; each is read from a folder or downloaded."""
