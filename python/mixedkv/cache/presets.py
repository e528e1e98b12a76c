"""Whole configurations of a mixed cache, by name: how much memory for how little loss.

One table; what each costs is measured in docs/fidelity.md by ``mixedkv eval``.
"""

from __future__ import annotations

from typing import Any

from .config import CacheConfig

_COMMON: dict[str, Any] = {
    "rotate": True,
    "center_keys": True,
    "sink_tokens": 4,
    "hot_keep": 128,
    "hot_size": 320,
    "group_size": 64,
    "threshold": 0.99,
}
"""Sizes are for one sequence. Hot fills up to 316 tokens, then 64 move, half a page of those that
share a center: the newest 248 tokens and more are exact at any step of plain decoding, and hot_keep
of them whatever else happens."""

_PRESETS: dict[str, dict[str, Any]] = {
    "near_lossless": {"cold_k_type": "q8_0", "cold_v_type": "q8_0"},
    "balanced": {"cold_k_type": "iq4_nl", "cold_v_type": "iq4_nl"},
    "small": {"cold_k_type": "nl4", "cold_v_type": "nl4"},
    "tiny": {"cold_k_type": "nl3", "cold_v_type": "nl3"},
}

NAMES = tuple(_PRESETS)
"""From the largest and most exact to the smallest."""

_PER_SEQUENCE = ("hot_size", "group_size")


def options(name: str) -> dict[str, Any]:
    """Return the options of a preset, for one sequence.

    Raises
    ------
    ValueError
        There is no preset of this name.
    """
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(NAMES)}, got {name!r}")
    return {**_COMMON, **_PRESETS[name]}


def config(name: str, **given: Any) -> CacheConfig:
    """Return the configuration of a preset.

    Parameters
    ----------
    name
        One of `NAMES`.
    given
        Options of :class:`CacheConfig`: the geometry and cold_size, which no preset knows, and any
        that are to differ from the preset's. Sizes of the preset are multiplied by n_seq_max,
        sizes given here are not.
    """
    chosen = options(name)
    sequences = given.get("n_seq_max", 1)
    if isinstance(sequences, int):
        chosen |= {size: chosen[size] * sequences for size in _PER_SEQUENCE}
    return CacheConfig(**{**chosen, **given})
