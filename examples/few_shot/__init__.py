"""A shared representation, learned so that one small head per task does with a few images."""
