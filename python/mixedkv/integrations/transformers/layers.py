"""The layers of a MixedCache, as transformers sees them."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class MixedLayer(CacheLayerMixin):
    """One layer of a MixedCache: a name for it; the cache itself does the work.

    Layers without keys of their own have one too: they hold nothing, and their `update` refuses.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # columns are counted from the start; the kernel applies the window
    supports_early_init = False

    def __init__(self, owner: Cache, index: int, window: int | None) -> None:
        super().__init__()
        self.owner = owner
        self.index = index
        self.window = window
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the native cache is made when the first rows come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MixedCache.update`."""
        rows: tuple[torch.Tensor, torch.Tensor]
        rows = self.owner.update(key_states, value_states, self.index)
        return rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `MixedCache.get_mask_sizes`."""
        sizes: tuple[int, int] = self.owner.get_mask_sizes(query_length, self.index)
        return sizes

    def get_seq_length(self) -> int:
        """See `MixedCache.get_seq_length`."""
        return int(self.owner.get_seq_length(self.index))

    def get_max_length(self) -> int:
        """Give -1: what fits depends on padding and shared rows; `CacheFull` tells."""
        return -1

    def _whole_cache_only(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "the layers of a MixedCache change together: call the method of the cache"
        )

    offload = prefetch = reset = reorder_cache = crop = _whole_cache_only
    batch_repeat_interleave = batch_select_indices = _whole_cache_only
