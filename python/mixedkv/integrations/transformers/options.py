"""Which options of mixedkv's caches a MixedCache takes, and what it makes of them."""

from __future__ import annotations

import math
from typing import Any

import mixedkv as mkv
from mixedkv._arrays import boolean
from mixedkv.cache import presets
from mixedkv.cache.config import OPTIONS, refuse_unknown

from .config import read_config

FROM_MODEL = {
    *("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "layer_filter"),
    *("n_seq_max", "window_left", "rope"),
}
"""What the model and its batch say: nobody else is asked."""

PER_ROW = ("hot_size", "cold_size", "group_size")
"""What a user gives for each row of the batch."""

TAKEN = [name for name in OPTIONS if name not in FROM_MODEL]
"""All others."""


_ANY_WIDTH = math.lcm(*(mkv.formats.info(name).block_values for name in mkv.formats.available()))
"""A head_dim that goes with every format, where the model's is not known yet."""


def read_options(options: dict[str, Any]) -> mkv.CacheConfig:
    """Return options as the configuration of one small layer and one row.

    Raises
    ------
    TypeError, ValueError
        An option is unknown, the model's to say, or wrong, also beside the others.
    """
    for name in options:
        if name in FROM_MODEL:
            raise TypeError(f"a MixedCache takes {name} from the model: it is no option of its own")
    refuse_unknown(options, "MixedCache", TAKEN)
    return mkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=_ANY_WIDTH, **options)


def preset_options(config: Any, preset: str | None = "balanced", **options: Any) -> dict[str, Any]:
    """Return what a MixedCache of a model makes of a preset and the options given beside it.

    Parameters
    ----------
    config
        The model's config (``model.config``).
    preset, options
        As `MixedCache` takes them.

    Raises
    ------
    ValueError
        There is no such preset, or a MixedCache can't serve the model.
    """
    return with_preset(read_config(config).window, preset, options)


def with_preset(window: int | None, preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Likewise for a model whose largest sliding window is known."""
    if preset is None:
        return options
    presets.check(preset)
    if not boolean(options.get("quantize", True), "quantize"):
        return options
    return presets.options(preset, window=window, **options)


def given_options(config: mkv.CacheConfig) -> dict[str, Any]:
    """Return what `read_options` was given, defaults filled in."""
    return {name: getattr(config, name) for name in TAKEN}


def for_rows(
    config: mkv.CacheConfig, rows: int, num_layers: int, shape: tuple[int, int, int]
) -> mkv.CacheConfig:
    """Return the configuration for the rows of a batch and a model's layers.

    Parameters
    ----------
    config
        From `read_options`.
    rows, num_layers
        Rows of the batch to make room for, and layers of this shape.
    shape
        (kv heads, head_dim of K, head_dim of V).
    """
    return config.replace(
        num_layers=num_layers,
        num_kv_heads=shape[0],
        head_dim=shape[1],
        head_dim_v=shape[2],
        n_seq_max=rows,
        **{name: getattr(config, name) * rows for name in PER_ROW},
    )
