"""The commands ``mixedkv trace``, ``mixedkv verify`` and ``mixedkv compare``."""

from .comparing import compare
from .recording import trace
from .verifying import verify

__all__ = ["compare", "trace", "verify"]
