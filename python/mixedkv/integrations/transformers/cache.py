"""MixedCache: transformers' `Cache` over mixedkv's mixed cache.

How a step goes
---------------
A *step* is one forward of the model: `width` new columns for each of `rows` rows.

1. The model's mask code asks `get_mask_sizes` and `get_seq_length`. A step that a broken-off
   forward left behind is given up here, before anyone counts its columns.
2. Each layer calls `update`, which only wraps the new rows in a handle (see rows.py).
3. The attention function hands the layer's handle, queries and mask to `attend`. At the first
   layer the padding is known, and `find_slot` reserves cells for the columns that are not padding:
   padded ones are never stored. Then: store the layer's rows, attend.
4. After the last layer the slot is committed. Where layers reuse the keys of earlier ones, the end
   of the forward can't be told from here, and the commit waits for the next question or step.

Row b of the batch is sequence b of the native cache. A token's position is its column minus the
first unpadded column of its row, so distances are distances in columns, as in transformers'
masks, and the cache's pinned first positions are the row's first real tokens.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

import mixedkv as mkv
from mixedkv._arrays import boolean
from mixedkv._options import ComputeType
from mixedkv.cache.config import shows

from .attending import LayerAttention
from .batch import Batch
from .config import read_config
from .groups import Group
from .layers import MixedLayer
from .masks import MaskPlan
from .options import TAKEN, given_options, read_options, with_preset
from .records import Observation, Occupancy, added_up
from .rows import CachedRows, Handle
from .steps import Step

logger = logging.getLogger("mixedkv.transformers")


class MixedCache(Cache):
    """A KV cache of two tiers for a transformers model: newest tokens in f16, older ones in 4 bits.

    Give it to ``generate(past_key_values=...)`` or to the model's forward, of a model loaded with
    ``attn_implementation="mixedkv"``. It can be used over several turns, cropped and reset.

    Parameters
    ----------
    config
        The model's config (``model.config``).
    preset
        "near_lossless", "balanced", "small" or "tiny": options to begin with, for each row, made
        to fit those given and the model's sliding windows (`preset_options`); docs/fidelity.md has
        what each costs. None: the defaults of `mixedkv.CacheConfig`. Without `quantize` there is
        nothing to choose, and it stands for nothing.
    options
        Those of `mixedkv.CacheConfig` that the model and its batch don't say: not the geometry
        (num_layers, num_kv_heads, head_dim, head_dim_v, layer_filter), n_seq_max, window_left and
        rope. hot_size, cold_size and group_size are *for each row of the batch*: they are
        multiplied by the number of rows when the first rows come; layers with a sliding window
        have them too. ``quantize=False`` gives a standard cache of one tier, where `hot_size` is
        the whole size.
    max_batch_size
        Rows to make room for, where the batch grows after the first rows have come
        (`batch_repeat_interleave`). Default: the first batch.
    threads
        Threads of attention; default: `mixedkv.get_num_threads()`, and one where a step has so
        little to attend that waking others does not pay. The result has the same bits.
    compute_type
        "f32", or "bf16" to let a prefill's products be in bfloat16, or "auto" to do so where that
        is faster, as in `mixedkv.attention`.
    record_history
        Keep the occupancy after each step in `history`.

    Attributes
    ----------
    history
        list of `Occupancy`, one for each committed step, if `record_history`.
    observer
        None, or what to call with an `Observation` after each layer's attention.

    Notes
    -----
    `mixedkv.CacheFull` is raised in a forward that finds no room; the cache is then as it was
    before that forward.

    Verifying several drafted tokens and cropping the refused ones (assisted generation) keeps
    every token, but what such a step pushed into the cold tier stays there.
    """

    layers: list[Any]

    @shows(TAKEN)
    def __init__(
        self,
        config: Any,
        *,
        preset: str | None = "balanced",
        max_batch_size: int | None = None,
        threads: int | None = None,
        compute_type: ComputeType = "f32",
        record_history: bool = False,
        **options: Any,
    ) -> None:
        self._batch = Batch(max_batch_size)
        keeps = boolean(record_history, "record_history")
        plan = read_config(config)
        # The real cache is made when the batch is known; a wrong option should be told now.
        self._row_config = read_options(with_preset(plan.window, preset, options))

        self._config = config
        super().__init__(
            layers=[
                MixedLayer(self, index, layer.window) for index, layer in enumerate(plan.layers)
            ]
        )
        self._order = [index for index, (has_keys, _) in enumerate(plan.layers) if has_keys]
        self._keys_are_reused = plan.keys_are_reused
        self._groups = [Group(layers, self._row_config) for layers in plan.geometries]
        windows = [layer.window for layer in plan.layers]
        self._attention = LayerAttention(self._groups, windows, threads, compute_type)
        self._step: Step | None = None
        self.history: list[Occupancy] | None = [] if keeps else None
        self.observer: Callable[[Observation], None] | None = None

    # What a user looks at

    @property
    def natives(self) -> tuple[mkv.MixedKVCache, ...]:
        """The native caches, one for each geometry of layers; empty before the first use."""
        self._settle()
        return tuple(group.native for group in self._groups if group.native is not None)

    @property
    def native(self) -> mkv.MixedKVCache:
        """The native cache, where there is exactly one."""
        natives = self.natives
        if len(natives) != 1:
            raise ValueError(f"this MixedCache has {len(natives)} native caches; see `natives`")
        return natives[0]

    def stats(self) -> mkv.CacheStats:
        """Tokens, moves and bytes of the whole cache.

        Bytes and seconds are added up over the native caches. Tokens and moves are those of one
        of them: all hold the same tokens.
        """
        all_stats = [native.stats() for native in self.natives]
        if not all_stats:
            raise ValueError("the MixedCache has not been used yet: it has no bytes and no tokens")
        return added_up(all_stats)

    def __repr__(self) -> str:
        batch = self._batch
        state = f"rows={batch.rows}, columns={batch.columns}" if batch.rows else "empty"
        return f"MixedCache(layers={len(self._order)}, {state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedCache:
        if self._batch.rows is not None or self._step is not None:
            raise NotImplementedError(
                "a MixedCache that holds tokens can't be copied: prefill another one, or make one "
                "with max_batch_size and batch_repeat_interleave() it"
            )
        return MixedCache(
            self._config,
            preset=None,
            max_batch_size=self._batch.max_rows,
            threads=self._attention.threads,
            compute_type=self._attention.compute_type,
            record_history=self.history is not None,
            **given_options(self._row_config),
        )

    # What transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, padded ones too, without those of a step under way."""
        step = self._step
        if step is not None and not self._settle() and layer_idx in step.updated:
            self._give_up("a new forward began")
        return self._batch.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key columns of the next step, and where they begin (0: also for a sliding window)."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values, [batch, kv heads, width, head_dim] each.

        Returns handles that mixedkv's attention function knows; see `CachedRows`.
        """
        step = self._step_for(key_states, layer_idx)
        handle = Handle(self, step, layer_idx, key_states, value_states)
        step.updated.add(layer_idx)
        return CachedRows.wrap(key_states, handle), CachedRows.wrap(value_states, handle)

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self._drop_step()
        for native in self.natives:
            native.clear()
        self._batch.forget()
        if self.history is not None:
            self.history.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; a positive number says how many stay."""
        self._settle_or_give_up("crop() was called")
        keep = tokens_to_remove if tokens_to_remove > 0 else self._batch.columns + tokens_to_remove
        keep = max(keep, 0)
        if keep >= self._batch.columns:
            return
        for row, base in enumerate(self._batch.bases):
            if base is not None:
                for native in self.natives:
                    native.seq_rm(row, max(keep - base, 0), -1)
        self._batch.crop(keep)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was. Rows share cells; nothing is copied."""
        self._take_rows([int(row) for row in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; see `max_batch_size`."""
        rows = self._batch.rows or 0
        self._take_rows([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers or a boolean mask), in that order."""
        rows = torch.arange(self._batch.rows or 0)[indices]
        self._take_rows([int(row) for row in rows])

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: that is for exporting a model."""
        raise NotImplementedError("a MixedCache can't be exported or compiled")

    # What mixedkv's attention function calls

    def attend(
        self,
        handle: Handle,
        query: torch.Tensor,
        plan: MaskPlan | None,
        *,
        for_layer: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Store the handle's rows, if they are not yet, and attend over the whole cache.

        Parameters
        ----------
        handle
            From `update` of this cache.
        query
            [batch, query heads, width, head_dim].
        plan
            The model's mask; None for plain causal.
        for_layer
            The model's layer that asks, where it is not the handle's own; for the observer.
        options
            Of `mixedkv.MixedKVCache.attend`; the window is this method's business.

        Returns
        -------
        torch.Tensor
            [batch, width, query heads, head_dim of V], contiguous; zeros in padded columns.
        """
        step = self._step
        if step is None or handle.step is not step:
            raise RuntimeError(
                f"the keys of layer {handle.layer} belong to a forward that was given up: another "
                "forward used this MixedCache, or the model asked for the cache's length in the "
                "middle of its layers, which can't be served"
            )
        try:
            layer = handle.layer if for_layer is None else for_layer
            out = self._attention(
                step, self._batch, handle, query, plan, options, layer, self.observer
            )
        except BaseException:
            # Whatever it was, this forward is over: leave the cache as it was before it.
            self._drop_step()
            raise
        if len(step.attended) == len(self._order) and not self._keys_are_reused:
            self._commit(step)
        return out

    # Steps

    def _step_for(self, key: torch.Tensor, layer: int) -> Step:
        """Give the step that `layer`'s rows belong to; begin one with the first layer."""
        rows, _, width, _ = key.shape
        if layer not in self._order:
            raise ValueError(f"layer {layer} has no keys of its own in this MixedCache")
        self._settle()
        step = self._step
        if step is not None and layer in step.updated:
            self._give_up(f"layer {layer} brought keys a second time")
            step = None
        if step is None:
            if layer != self._order[0]:
                raise RuntimeError(
                    f"a forward must begin with layer {self._order[0]}, got keys of layer {layer}"
                )
            if self._batch.rows is not None and rows != self._batch.rows:
                raise ValueError(
                    f"the MixedCache holds {self._batch.rows} rows, got keys of {rows}: reset() "
                    "it, or make one for each batch"
                )
            if self._batch.rows is None:
                self._make_room(rows)
            self._step = step = Step(first=self._batch.columns, width=width, rows=rows)
            return step

        due = self._order[len(step.updated)]
        before = self._order[len(step.updated) - 1]
        if before not in step.attended:
            self._give_up("a layer's attention was missing")
            raise RuntimeError(
                f"the attention of layer {before} never reached mixedkv: load the model with "
                'attn_implementation="mixedkv"'
            )
        if layer != due or (rows, width) != (step.rows, step.width):
            self._give_up("the layers came in another order")
            raise RuntimeError(
                f"expected {step.rows} rows of {step.width} keys of layer {due}, got {rows} of "
                f"{width} of layer {layer}: a MixedCache takes every layer once, in order"
            )
        return step

    def _commit(self, step: Step) -> None:
        for group in self._groups:
            group.commit()
        self._step = None
        self._batch.add(step)
        if self.history is not None:
            stats = self.stats()
            self.history.append(
                Occupancy(stats.tokens_seen, stats.hot_tokens, stats.cold_tokens, stats.moved)
            )

    def _settle(self) -> bool:
        """Commit a step that is complete; tell whether none is under way now."""
        step = self._step
        if step is not None and len(step.attended) == len(self._order):
            self._commit(step)
        return self._step is None

    def _settle_or_give_up(self, why: str) -> None:
        if not self._settle():
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        logger.warning("a forward broke off and its tokens are dropped from the cache: %s", why)
        self._drop_step()

    def _drop_step(self) -> None:
        for group in self._groups:
            group.drop()
        self._step = None

    # Rows and native caches

    def _take_rows(self, sources: list[int]) -> None:
        """Make row i what row sources[i] was."""
        self._settle_or_give_up("the rows of the cache were rearranged")
        if self._batch.rows is None:
            return
        self._batch.check_rows(sources)
        if sources == list(range(self._batch.rows)):
            return
        for native in self.natives:
            native.seq_gather(sources)
        self._batch.take(sources)

    def _make_room(self, rows: int) -> None:
        """Give an empty cache room for this many rows: its native caches are made anew."""
        if self._batch.make_room(rows):
            for group in self._groups:
                group.native = None
