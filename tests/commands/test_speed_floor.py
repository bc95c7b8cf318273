"""The floor of the speed benchmarks takes the optimizer's steps; else its ratios say nothing."""

from benchmarks.speed.test_micro import test_floor_takes_the_same_steps

__all__ = ["test_floor_takes_the_same_steps"]
