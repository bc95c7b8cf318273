"""Measured errors under their bounds, for every way to a hypergradient."""
