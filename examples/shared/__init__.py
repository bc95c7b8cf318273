"""Data sets, records of runs and tables, for examples and benchmarks."""
