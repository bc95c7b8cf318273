"""Records of runs, command lines and tables, for examples and benchmarks."""
