"""The two levels as torch optimizers: their groups, and single steps of their rules."""

from __future__ import annotations

from .groups import Level as Level
from .groups import Parameters as Parameters
from .groups import are_named as are_named
from .groups import build as build
from .groups import check_disjoint as check_disjoint
from .groups import check_memory as check_memory
from .groups import give as give
from .groups import mark as mark
from .groups import named as named
from .groups import names as names
from .groups import parameters as parameters
from .groups import release as release
from .joined import Joined as Joined
from .joined import Together as Together
from .joined import owner as owner
from .joined import parts as parts
