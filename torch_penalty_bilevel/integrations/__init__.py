"""What other libraries must be told; whatever is not here works as with any optimizer.

``log_metrics`` needs no library. The rest is imported by name, and asks for its library then:
``integrations.lightning``, ``integrations.accelerate``, ``integrations.transformers``.
"""

from .logs import log_metrics

__all__ = ["log_metrics"]
