"""Poisoned training data: attacks that audit how robust a model is, and the matching defence."""
