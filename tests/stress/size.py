"""How much stress: the short form runs with all tests, the long one by ``make stress``."""

from __future__ import annotations

import os
from typing import TypeVar

LONG = os.environ.get("STRESS") == "long"

T = TypeVar("T")


def sized(short: T, long: T) -> T:
    """``long`` under ``make stress``, otherwise ``short``."""
    return long if LONG else short
