"""The cache of one tier."""

from __future__ import annotations

import re
from typing import Any

from .config import OPTIONS, CacheConfig, refuse_unknown, shows
from .verbs import KVCache

# Its own words for the one tier's options, and the options that mean nothing without a second one.
_OWN = {"size": "hot_size", "k_type": "hot_k_type", "v_type": "hot_v_type"}
_OF_TWO_TIERS = {
    *("cold_size", "group_size", "threshold", "cold_k_type", "cold_v_type"),
    *("sink_tokens", "hot_keep", "center_keys", "quantize"),
}
_SHARED = [name for name in OPTIONS if name not in _OF_TWO_TIERS and name not in _OWN.values()]


def _in_own_words(message: str) -> str:
    """Return a refusal of options with the names that they have here."""
    for own, name in _OWN.items():
        message = re.sub(rf"\b{name}\b", own, message)
    return message


class UnifiedKVCache(KVCache):
    """One tier, the same verbs: a standard cache to compare with.

    Parameters
    ----------
    size
        Cells (tokens) of all sequences together, a multiple of n_pad.
    k_type, v_type
        Any of :mod:`mixedkv.formats`; a token's rows are converted as they are stored.
    options
        num_layers, num_kv_heads, head_dim, head_dim_v, n_pad, n_seq_max, rotate, window_left,
        rope and layer_filter, as in :class:`CacheConfig`.
    """

    @shows(_SHARED)
    def __init__(
        self, *, size: int = 1024, k_type: str = "f16", v_type: str = "f16", **options: Any
    ) -> None:
        refuse_unknown(options, "UnifiedKVCache", _SHARED)
        own = {"size": size, "k_type": k_type, "v_type": v_type}
        for name, value in own.items():
            # Under its own name, should it be wrong.
            options[_OWN[name]] = OPTIONS[_OWN[name]].check(value, name)
        try:
            # Cold is never allocated; any width goes with f16.
            config = CacheConfig(**options, quantize=False, cold_k_type="f16", cold_v_type="f16")
            super().__init__(config)
        except (ValueError, TypeError, MemoryError) as error:
            raise type(error)(_in_own_words(str(error))) from None

    def __repr__(self) -> str:
        config, stats = self.config, self.stats()
        return (
            f"UnifiedKVCache(num_layers={config.num_layers}, num_kv_heads={config.num_kv_heads}, "
            f"head_dim={config.head_dim}, cells={stats.hot_tokens}/{stats.hot_size})"
        )
