"""The cache of two tiers."""

from __future__ import annotations

from typing import Any, overload

from .._arrays import shown
from . import presets
from .config import OPTIONS, CacheConfig, refuse_unknown, shows, takes
from .verbs import KVCache


class MixedKVCache(KVCache):
    """A hot tier for new tokens and a cold one that older tokens move to.

    Parameters
    ----------
    config
        What the cache is to be; or, in its place,
    options
        those of :class:`CacheConfig`, as keywords.

    Raises
    ------
    ValueError
        Naming the option and its value; also where the pins of all sequences
        ((sink_tokens + hot_keep) * n_seq_max) reach the trigger's level.
    """

    @overload
    def __init__(self, config: CacheConfig, /) -> None: ...
    @overload
    @takes(CacheConfig)
    def __init__(self, **options: Any) -> None: ...
    @shows(OPTIONS)
    def __init__(self, config: object = None, /, **options: Any) -> None:
        if config is None:
            refuse_unknown(options, "MixedKVCache", OPTIONS)
            config = CacheConfig(**options)
        elif options:
            raise TypeError("give a CacheConfig or options, not both: CacheConfig.replace changes")
        elif not isinstance(config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig, got {shown(config)}")
        super().__init__(config)

    @classmethod
    def preset(cls, name: str, **options: Any) -> MixedKVCache:
        """Return a cache made of a preset: "near_lossless", "balanced", "small" or "tiny".

        Parameters
        ----------
        name
            The four differ in how much of the memory they save, and what that costs: see
            docs/fidelity.md.
        options
            Those of :class:`CacheConfig`: the geometry and cold_size, which no preset knows, and
            any that are to differ from the preset's. The sizes of a preset are for one sequence
            and are multiplied by n_seq_max; sizes given here are taken as they are.

        Raises
        ------
        ValueError
            There is no such preset, or an option is wrong.
        """
        refuse_unknown(options, "MixedKVCache", OPTIONS)
        return cls(presets.config(name, **options))

    def __repr__(self) -> str:
        config, stats = self.config, self.stats()
        return (
            f"MixedKVCache(num_layers={config.num_layers}, num_kv_heads={config.num_kv_heads}, "
            f"head_dim={config.head_dim}, hot={stats.hot_tokens}/{stats.hot_size}, "
            f"cold={stats.cold_tokens}/{stats.cold_size})"
        )
