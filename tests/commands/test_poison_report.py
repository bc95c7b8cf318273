"""Numbers of the table of ``python -m examples.poison``."""

import pytest
from scipy import stats

from examples.poison.report import student_interval, wilson_interval, with_increase


def test_intervals_by_other_code():
    expected = stats.binomtest(17, 20).proportion_ci(method="wilson")
    assert wilson_interval(17, 20) == pytest.approx((expected.low, expected.high), rel=1e-6)
    values = [0.2, 0.5, 0.3, 0.9]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_increase_is_in_points_above_the_clean_victim_of_the_seed():
    runs = {"clean": [{"error": 0.1}, {"error": 0.2}], "flip": [{"error": 0.15}, {"error": 0.3}]}
    found = with_increase(runs)["flip"]
    assert [run["increase"] for run in found] == pytest.approx([5, 10])
