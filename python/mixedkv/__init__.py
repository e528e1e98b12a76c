"""mixedkv: attention over a mixed-precision KV cache, on CPUs.

Recent tokens are *hot* in FP16, older ones move to a *cold* tier of 3.5 to 8 bits a value, and
one flash attention, which carries its state from segment to segment, reads both in one pass.
"""

from __future__ import annotations

from . import formats, isa
from ._core import __version__, get_num_threads, set_num_threads
from .attention import AttentionState, attention, merge, merge_state, merge_states
from .cache import (
    CacheConfig,
    CacheFull,
    CacheStats,
    MixedKVCache,
    Slot,
    StateFileError,
    StoredRows,
    UnifiedKVCache,
)
from .paged import attention_paged
from .quantize import dequantize_q4_0, quantize_q4_0
from .quantized import QuantizedArray, quantize

__all__ = [
    "AttentionState",
    "CacheConfig",
    "CacheFull",
    "CacheStats",
    "MixedKVCache",
    "QuantizedArray",
    "Slot",
    "StateFileError",
    "StoredRows",
    "UnifiedKVCache",
    "__version__",
    "attention",
    "attention_paged",
    "dequantize_q4_0",
    "formats",
    "get_num_threads",
    "isa",
    "merge",
    "merge_state",
    "merge_states",
    "quantize",
    "quantize_q4_0",
    "set_num_threads",
]
