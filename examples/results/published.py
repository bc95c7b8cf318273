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
COMLN = "as tabulated in the COMLN paper, conv4 of 64 channels"
REPTILE = "Nichol et al. 2018, Reptile"
FEW_SHOT = {
    ("omniglot", 5, 1): [
        Published("without statistics of query images, 5-way 1-shot", "95.39 %", REPTILE),
        Published("with them", "97.68 %", REPTILE),
        Published("a reproduction of MAML", "97.13 ± 1.25 %", "secondary"),
    ],
    ("omniglot", 5, 5): [
        Published("without statistics of query images, 5-way 5-shot", "98.90 %", REPTILE),
        Published("with them", "99.48 %", REPTILE),
        Published("a reproduction of MAML", "99.23 ± 0.40 %", "secondary"),
    ],
    ("miniimagenet", 5, 1): [
        Published("MAML, 600 images per class, 5-way 1-shot", "48.70 ± 1.84 %", COMLN),
        Published("ANIL", "46.30 %", COMLN),
        Published("ProtoNet", "49.42 ± 0.78 %", COMLN),
    ],
    ("miniimagenet", 5, 5): [
        Published("MAML, 600 images per class, 5-way 5-shot", "63.11 %", COMLN),
        Published("ANIL", "61.00 %", COMLN),
        Published("ProtoNet", "68.20 ± 0.66 %", COMLN),
    ],
}
OMNIGLOT = Published("accuracy on Omniglot, ways and shots not stated", "99.45 %", WIZWAND)
INFERRED = "secondary, inferred: a page of wizwand.com of an older method that the paper compares"
POISON = {
    "untargeted": Published("accuracy of the poisoned victim, of an older method", "85", INFERRED),
    "targeted": Published("success of an older method, in percent", "35", INFERRED),
    "clean_label": Published(
        "success on a frozen InceptionV3, by collision of features", "100 %", "Poison Frogs"
    ),
}


def sentences(numbers: list[Published]) -> str:
    """As lines under a table."""
    return "\n".join(f"Published: {n.of}: {n.value} ({n.source})." for n in numbers)
