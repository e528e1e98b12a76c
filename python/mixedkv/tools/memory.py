"""How much memory there is, so that what can't fit is refused before it is tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_MEMINFO = Path("/proc/meminfo")


def available() -> float:
    """Return the bytes that can be allocated now without swapping, as far as the system says."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def padded(tokens: int, pad: int = 32) -> int:
    """Return a size for so many tokens: cells of a tier are a multiple of `pad`."""
    return -(-tokens // pad) * pad


def in_words(size: float) -> str:
    """Return a number of bytes in GiB, with three digits where it is small."""
    gib = size / 2**30
    return f"{gib:,.0f} GiB" if gib >= 10 else f"{gib:.3g} GiB"


def cache_bytes(config: Any, hot_size: int, cold_size: int) -> float:
    """Return what the tiers of a model's mixed cache take at least.

    Parameters
    ----------
    config
        The model's, of transformers; None: the smallest model that there is. What the config
        does not tell in one number for all layers counts as little as it can be.
    hot_size, cold_size
        Tokens in f16 and in Q4_0, for one row of a batch.
    """
    text = None if config is None else config.get_text_config(decoder=True)

    def number(name: str, least: int) -> int:
        value = getattr(text, name, None)
        return value if isinstance(value, int) and value > 0 else least

    heads = number("num_attention_heads", 1)
    width = number("head_dim", max(number("hidden_size", 32) // heads, 32))
    kv_heads = number("num_key_value_heads", heads)
    values = 2.0 * number("num_hidden_layers", 1) * kv_heads * width
    return values * (2 * hot_size + 18 / 32 * cold_size)


def check_cache(config: Any, hot_size: int, cold_size: int) -> None:
    """Refuse a model's mixed cache that this machine has no memory for; arguments as above.

    Raises
    ------
    MemoryError
        Its tiers alone would take more than there is.
    """
    needed, free = cache_bytes(config, hot_size, cold_size), available()
    if needed > free:
        raise MemoryError(
            f"a cache with hot_size={hot_size} and cold_size={cold_size} would take at least "
            f"{in_words(needed)} of memory, {in_words(free)} are free"
        )
