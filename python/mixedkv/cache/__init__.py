"""The KV caches: one tier (UnifiedKVCache) and two (MixedKVCache).

A pool of cells, each one token: its position, the sequences that own it, its K and V rows of every
layer. A ubatch goes through ``find_slot``, then per layer ``store`` and ``attend``, then
``commit`` (or ``restore``, which undoes it). In a mixed cache new tokens are *hot* (f16); above a
threshold the oldest move to *cold* (Q4_0), once each, and attention reads both in one pass.
"""

from __future__ import annotations

from .config import CacheConfig
from .mixed import MixedKVCache
from .records import CacheFull, CacheStats, Slot, StateFileError, StoredRows
from .unified import UnifiedKVCache

__all__ = [
    "CacheConfig",
    "CacheFull",
    "CacheStats",
    "MixedKVCache",
    "Slot",
    "StateFileError",
    "StoredRows",
    "UnifiedKVCache",
]
