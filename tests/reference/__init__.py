"""What mixedkv should compute, written to be read: numpy in float64 and plain Python, no more.

Nothing here imports the package, so that each can judge the other. Three parts: formats by their
formulas, attention with carried state, and ``MixedCacheModel``, the mixed cache as plain lists.
"""

from .attention import State, attention, logits_of, merge, merge_states
from .formats import (
    IQ4_NL_LEVELS,
    PACKED,
    QK4_0,
    dequantize_q4_0,
    fit_scales,
    quantize_q4_0,
    search_levels,
    stored_as,
)
from .mixed_cache import COLD, HOT, MixedCacheModel, NoRoomError, Plan, Token

__all__ = [
    "COLD",
    "HOT",
    "IQ4_NL_LEVELS",
    "PACKED",
    "QK4_0",
    "MixedCacheModel",
    "NoRoomError",
    "Plan",
    "State",
    "Token",
    "attention",
    "dequantize_q4_0",
    "fit_scales",
    "logits_of",
    "merge",
    "merge_states",
    "quantize_q4_0",
    "search_levels",
    "stored_as",
]
