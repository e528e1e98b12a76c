"""A mixed cache in plain torch: what the real one is held against. No kernel of mixedkv runs.

Rows are kept in f32. Those that the real cache would have moved to its cold tier are replaced by
what their quantised bytes stand for, in the model's own basis: attention over rotated rows with
rotated queries, and over centred keys with the mean's logit added, comes to that. Attention is
PyTorch's own.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import mixedkv as mkv

from .codes import hadamard, quantised

PAGE = 128
"""Cold cells whose keys share a center."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What of a cache's configuration decides which values attention sees.

    The fields are options of `mixedkv.CacheConfig`; None in `hot_size`: nothing ever moves;
    None in `cold_size`: there is always room.
    """

    hot_size: int | None = None
    cold_size: int | None = None
    group_size: int = 256
    threshold: float = 0.8
    hot_k_type: str = "f16"
    hot_v_type: str = "f16"
    cold_k_type: str = "q4_0"
    cold_v_type: str = "q4_0"
    sink_tokens: int = 0
    hot_keep: int = 0
    rotate: bool = False
    center_keys: bool = False
    fit_scales: bool = False

    @staticmethod
    def of(config: mkv.CacheConfig) -> Rules:
        """Take what counts here out of a configuration."""
        names = {field.name for field in dataclasses.fields(config)}
        known = [field.name for field in dataclasses.fields(Rules) if field.name in names]
        rules = Rules(**{name: getattr(config, name) for name in known})
        return rules if config.quantize else dataclasses.replace(rules, hot_size=None)

    @property
    def level(self) -> int | None:
        """Most tokens in hot that no move is due for; None: any number."""
        return None if self.hot_size is None else math.floor(self.threshold * self.hot_size)


class SimulatedCache(Cache):
    """A cache for one sequence, decoded token by token or in chunks with no move inside.

    After each forward, `commit` moves what is due.
    """

    layers: list[Any]

    def __init__(self, num_layers: int, rules: Rules) -> None:
        super().__init__(layers=[SimulatedLayer(rules) for _ in range(num_layers)])
        self.rules = rules
        self.seen = 0
        self.moved = 0
        self.events = 0

    @property
    def cache(self) -> SimulatedCache:
        """Itself: see `runs.StepCache`."""
        return self

    @property
    def hot_tokens(self) -> int:
        """Tokens in hot, the first ones that stay there included."""
        return self.seen - self.moved

    def until_move(self) -> int | None:
        """Tokens that a forward may bring before the next move is due; None: any number."""
        level = self.rules.level
        return None if level is None else max(1, level + 1 - self.hot_tokens)

    def commit(self) -> None:
        """Count the forward's tokens, and move what is due."""
        self.seen = self.layers[0].get_seq_length()
        level = self.rules.level
        while level is not None and self.hot_tokens > level:
            pinned = min(self.seen, self.rules.sink_tokens)
            movable = self.hot_tokens - pinned - self.rules.hot_keep
            if self.rules.cold_size is not None:
                movable = min(movable, self.rules.cold_size - self.moved)
            count = min(max(self.hot_tokens // 4, 1), self.rules.group_size, movable)
            if count <= 0:
                return
            first = self.rules.sink_tokens + self.moved
            for layer in self.layers:
                layer.quantise(slice(first, first + count))
            self.moved += count
            self.events += 1


class SimulatedLayer(CacheLayerMixin):
    """One layer's keys and values; columns count from the start, the model's mask windows them."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.length = 0
        self.num_cold = 0
        self.centers: list[torch.Tensor] = []
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for some tokens."""
        self.keys = key_states.new_empty((*key_states.shape[:2], 256, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 256, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new rows, in the hot types, and give all."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        stop = self.length + key_states.shape[2]
        while stop > self.keys.shape[2]:
            self.keys = torch.cat([self.keys, torch.empty_like(self.keys)], 2)
            self.values = torch.cat([self.values, torch.empty_like(self.values)], 2)
        rules = self.rules
        fit = rules.fit_scales
        keys = quantised(self._turned(key_states), rules.hot_k_type, least_error=fit)
        values = quantised(self._turned(value_states), rules.hot_v_type, least_error=fit)
        self.keys[:, :, self.length : stop] = self._turned(keys)
        self.values[:, :, self.length : stop] = self._turned(values)
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def quantise(self, columns: slice) -> None:
        """Replace the rows of some columns by what the cold tier would hold of them."""
        assert self.keys is not None
        assert self.values is not None
        rules = self.rules
        keys, values = self.keys[:, :, columns], self.values[:, :, columns]
        keys, values = self._turned(keys), self._turned(values)
        centers = self._centers(keys) if rules.center_keys else torch.zeros(())
        keys = centers + quantised(keys - centers, rules.cold_k_type, least_error=rules.fit_scales)
        values = quantised(values, rules.cold_v_type, least_error=rules.fit_scales)
        self.num_cold += keys.shape[2]
        self.keys[:, :, columns] = self._turned(keys)
        self.values[:, :, columns] = self._turned(values)

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Rotate rows, or back: the rotation is its own inverse."""
        return rows @ _rotation(rows.shape[3]) if self.rules.rotate else rows

    def _centers(self, keys: torch.Tensor) -> torch.Tensor:
        """Give what each key is stored less of: its page's mean over the keys that came first."""
        pages = torch.arange(self.num_cold, self.num_cold + keys.shape[2]) // PAGE
        for page in range(len(self.centers), int(pages[-1]) + 1):
            mean = keys[:, :, pages == page].mean(2)
            self.centers.append(mean.half().float())
        return torch.stack(self.centers, 2)[:, :, pages]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key columns of the next forward, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.length

    def get_max_length(self) -> int:
        """Give -1: any number."""
        return -1


@cache
def _rotation(size: int) -> torch.Tensor:
    return hadamard(size)
