"""Whole configurations of a mixed cache, by name: how much memory for how little loss.

One table; what each costs is measured in docs/fidelity.md by ``mixedkv eval``.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

from .._arrays import shown
from .config import OPTIONS, CacheConfig

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
    "balanced": {"cold_k_type": "iq4_nl", "cold_v_type": "iq4_nl", "fit_scales": True},
    "small": {"cold_k_type": "nl4", "cold_v_type": "nl4"},
    "tiny": {"cold_k_type": "nl3", "cold_v_type": "nl3"},
}

NAMES = tuple(_PRESETS)
"""From the largest and most exact to the smallest."""

_PER_SEQUENCE = ("hot_size", "group_size")

MOST_SEQUENCES = 2**16
"""The largest n_seq_max that there can be."""

MOST_WINDOW = 1024
"""The largest sliding window that hot is made to hold, see `options`."""


def check(name: str) -> None:
    """Raise ValueError or TypeError where there is no preset of this name."""
    if not isinstance(name, str):
        raise TypeError(f"preset must be a str, got {shown(name)}")
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(NAMES)}, got {name!r}")


def options(
    name: str, *, sequences: int = 1, window: int | None = None, **given: Any
) -> dict[str, Any]:
    """Return the options of a preset, and those given, which come before the preset's.

    Parameters
    ----------
    sequences
        The preset's hot_size and group_size are multiplied by it.
    window
        Keys that the layers with a sliding window see. Up to `MOST_WINDOW` of them stay hot: such a
        layer sees nothing else, so that each of its keys counts for more, and it never reads cold.
    given
        Options of :class:`CacheConfig`. Where hot_size, threshold or n_pad are among them, the
        preset's other sizes are made to fit: at most a quarter of hot moves at once, and where less
        than the preset's is held before a move is due, half of that is kept and an eighth pinned,
        as far as that is less than the preset's own.

    Raises
    ------
    ValueError
        There is no preset of this name.
    """
    check(name)
    own = {**_COMMON, **_PRESETS[name]}
    if window is not None and own["hot_keep"] < window <= MOST_WINDOW:
        hot_size = own["hot_size"] - own["hot_keep"] + window
        own |= {"hot_size": _padded(hot_size, OPTIONS["n_pad"].default), "hot_keep": window}
    own |= {size: own[size] * sequences for size in _PER_SEQUENCE}
    # What is given and can't be is for CacheConfig to refuse.
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):
        own |= _fitted(own, given, sequences)
    return {**own, **given}


def _padded(size: int, n_pad: int) -> int:
    """Return the smallest multiple of n_pad that is not below size."""
    return -(-size // n_pad) * n_pad


def _fitted(own: dict[str, Any], given: dict[str, Any], sequences: int) -> dict[str, int]:
    """Return the sizes of a preset as they fit beside those given."""
    n_pad = operator.index(given.get("n_pad", 1))
    if not 1 <= n_pad < 2**31:
        return {}
    hot_size = operator.index(given.get("hot_size", _padded(own["hot_size"], n_pad)))
    level = math.floor(given.get("threshold", own["threshold"]) * hot_size) // sequences
    keep, sinks = own["hot_keep"], own["sink_tokens"]
    if level < math.floor(own["threshold"] * own["hot_size"]) // sequences:
        keep, sinks = min(keep, level // 2), min(sinks, level // 8)
    if "sink_tokens" in given:
        keep = max(min(keep, level - 1 - operator.index(given["sink_tokens"])), 0)
    if "hot_keep" in given:
        sinks = max(min(sinks, level - 1 - operator.index(given["hot_keep"])), 0)
    return {
        "hot_size": hot_size,
        "group_size": max(min(own["group_size"], hot_size // 4), 1),
        "hot_keep": keep,
        "sink_tokens": sinks,
    }


def config(name: str, **given: Any) -> CacheConfig:
    """Return the configuration of a preset.

    Parameters
    ----------
    name
        One of `NAMES`.
    given
        Options of :class:`CacheConfig`: the geometry and cold_size, which no preset knows, and any
        that are to differ from the preset's; see `options`. Sizes of the preset are multiplied by
        n_seq_max, sizes given here are not.
    """
    sequences = given.get("n_seq_max", 1)
    if not isinstance(sequences, int) or not 1 <= sequences <= MOST_SEQUENCES:
        sequences = 1  # for CacheConfig to refuse, or to read
    return CacheConfig(**options(name, sequences=sequences, **given))
