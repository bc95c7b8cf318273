"""Numbers of others, with where they were read and how far they can be trusted.

"secondary": read at a third party that lists results by paper, not in the paper, whose tables could
not be had; it does not say which method's column a number is from, so "probably" this one's.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A number of somebody else's."""

    of: str
    value: str
    source: str


WIZWAND = "Mehra & Hamm 2021, secondary (wizwand.com), probably their penalty method"
DENOISE = {
    ("mnist", 0.25): Published("test accuracy, 59,000 / 1,000, CNN", "98.89 %", WIZWAND),
    ("mnist", 0.5): Published("test accuracy, 59,000 / 1,000, CNN", "97.51 %", WIZWAND),
    ("cifar10", 0.25): Published("test accuracy, 40,000 / 10,000, CNN", "79.67 %", WIZWAND),
    ("cifar10", 0.5): Published("test accuracy, 40,000 / 10,000, CNN", "79.03 %", WIZWAND),
    ("svhn", 0.25): Published("test accuracy, 72,257 / 1,000, CNN", "88.12 %", WIZWAND),
}


def sentences(numbers: list[Published]) -> str:
    """As lines under a table."""
    return "\n".join(f"Published: {n.of}: {n.value} ({n.source})." for n in numbers)
