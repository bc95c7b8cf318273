"""Several processes that share one problem: averages, and errors that all of them hear of."""

from .mean import Mean as Mean
from .mean import Reduce as Reduce
from .mean import one_worker as one_worker
from .mean import resolve as resolve
from .parts import Averaged as Averaged
from .parts import averaged as averaged
from .parts import scalar as scalar
from .parts import without_unused as without_unused
from .together import ALONE as ALONE
from .together import Workers as Workers
