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

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import mixedkv as mkv

from .config import read_config
from .masks import MaskPlan
from .rows import CachedRows, Handle

logger = logging.getLogger("mixedkv.transformers")


class Occupancy(NamedTuple):
    """One point of a cache's history, taken when a step is committed."""

    tokens_seen: int
    hot: int
    cold: int
    moved: int


class Observation(NamedTuple):
    """One attention of one layer, as it was computed; for `MixedCache.observer`.

    The tensors are the model's own: copy what is to be kept. `native` is in the midst of the step,
    so that ``native.export_rows(place, row)`` gives the very keys and values that were attended.

    Attributes
    ----------
    layer
        The model's layer.
    first, width, rows
        The step's columns are [first, first + width) of each of `rows` rows.
    query
        [rows, query heads, queries, head_dim]: the last `queries` columns.
    out
        [rows, queries, query heads, head_dim of V].
    native, place
        The native cache, and the index that the keys' layer has there.
    kept
        Which of the rows * width columns are stored (the others are padding); None for all.
    options
        Of `mixedkv.MixedKVCache.attend`.
    """

    layer: int
    first: int
    width: int
    rows: int
    query: torch.Tensor
    out: torch.Tensor
    native: mkv.MixedKVCache
    place: int
    kept: torch.Tensor | None
    options: dict[str, Any]


class Placement(NamedTuple):
    """Where a step's columns go.

    Attributes
    ----------
    kept
        Which of the rows * width columns (row-major) are stored, in order; None for all.
    num_tokens
        How many that are.
    """

    kept: torch.Tensor | None
    num_tokens: int


@dataclasses.dataclass(eq=False)
class Step:
    """One forward of the model, from its first `update` to its commit.

    Attributes
    ----------
    first, width, rows
        The new columns are [first, first + width) of each of `rows` rows.
    updated, attended
        Model layers whose rows came in, and those whose attention ran.
    validity
        Padding of the columns [0, first + width), None where nothing is padded.
    placement
        None until the first layer attends.
    """

    first: int
    width: int
    rows: int
    updated: set[int] = dataclasses.field(default_factory=set)
    attended: set[int] = dataclasses.field(default_factory=set)
    validity: torch.Tensor | None = None
    bases: list[int | None] = dataclasses.field(default_factory=list)
    placement: Placement | None = None


class Group:
    """Layers of one geometry, which share a native cache.

    Attributes
    ----------
    layers
        Their indices in the model; a layer's index in the native cache is its place here.
    shape
        (kv heads, head_dim of K, head_dim of V), known from the first rows on.
    slot
        What the step under way has reserved in the native cache.
    in_scratch
        The layer that stored last in this step: where tokens go straight to the cold tier, they
        can be attended in the hot type until another layer stores.
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.place = {layer: place for place, layer in enumerate(layers)}
        self.shape: tuple[int, int, int] | None = None
        self.native: mkv.MixedKVCache | None = None
        self.slot: mkv.Slot | None = None
        self.in_scratch: int | None = None


class MixedLayer(CacheLayerMixin):
    """One layer of a MixedCache: a name for it; the cache itself does the work.

    Layers without keys of their own have one too: they hold nothing, and their `update` refuses.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # columns are counted from the start; the kernel applies the window
    supports_early_init = False

    def __init__(self, owner: MixedCache, index: int, window: int | None) -> None:
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
        return self.owner.update(key_states, value_states, self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `MixedCache.get_mask_sizes`."""
        return self.owner.get_mask_sizes(query_length, self.index)

    def get_seq_length(self) -> int:
        """See `MixedCache.get_seq_length`."""
        return self.owner.get_seq_length(self.index)

    def get_max_length(self) -> int:
        """Give -1: what fits depends on padding and shared rows; `CacheFull` tells."""
        return -1

    def _whole_cache_only(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "the layers of a MixedCache change together: call the method of the cache"
        )

    offload = prefetch = reset = reorder_cache = crop = _whole_cache_only
    batch_repeat_interleave = batch_select_indices = _whole_cache_only


class MixedCache(Cache):
    """A KV cache of two tiers for a transformers model: newest tokens in f16, older ones in Q4_0.

    Give it to ``generate(past_key_values=...)`` or to the model's forward, of a model loaded with
    ``attn_implementation="mixedkv"``. It can be used over several turns, cropped and reset.

    Parameters
    ----------
    config
        The model's config (``model.config``).
    hot_size, cold_size, group_size
        Cells of each tier and most tokens of one move, *for each row of the batch*: they are
        multiplied by the number of rows when the first rows come. All layers have the same sizes,
        those with a sliding window too.
    threshold, n_pad, sinks, hot_keep, rotate, quantize
    hot_k_type, hot_v_type, cold_k_type, cold_v_type
        As in `mixedkv.MixedKVCache`. ``quantize=False`` gives a standard cache of one tier, where
        `hot_size` is the whole size.
    max_batch_size
        Rows to make room for, where the batch grows after the first rows have come
        (`batch_repeat_interleave`). Default: the first batch.
    threads
        Threads of attention; default: `mixedkv.get_num_threads()`.
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

    def __init__(
        self,
        config: Any,
        *,
        hot_size: int = 1024,
        cold_size: int = 4096,
        group_size: int = 256,
        threshold: float = 0.8,
        n_pad: int = 32,
        sinks: int = 0,
        hot_keep: int = 0,
        rotate: bool = False,
        hot_k_type: str = "f16",
        hot_v_type: str = "f16",
        cold_k_type: str = "q4_0",
        cold_v_type: str = "q4_0",
        quantize: bool = True,
        max_batch_size: int | None = None,
        threads: int | None = None,
        record_history: bool = False,
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self._sizes: dict[str, Any] = {
            "hot_size": hot_size,
            "cold_size": cold_size,
            "group_size": group_size,
        }
        self._options: dict[str, Any] = {
            "threshold": threshold,
            "n_pad": n_pad,
            "sinks": sinks,
            "hot_keep": hot_keep,
            "rotate": rotate,
            "hot_k_type": hot_k_type,
            "hot_v_type": hot_v_type,
            "cold_k_type": cold_k_type,
            "cold_v_type": cold_v_type,
            "quantize": quantize,
        }
        self._max_batch_size = max_batch_size
        self._threads = threads
        # The real cache is made when the batch is known; a wrong option should be told now.
        mkv.MixedKVCache(
            num_layers=1, num_kv_heads=1, head_dim=32, n_seq_max=1, **self._sizes, **self._options
        )

        self._config = config
        plan = read_config(config)
        super().__init__(
            layers=[
                MixedLayer(self, index, layer.window) for index, layer in enumerate(plan.layers)
            ]
        )
        self._order = [index for index, (has_keys, _) in enumerate(plan.layers) if has_keys]
        self._keys_are_reused = plan.keys_are_reused
        self._groups = [Group(layers) for layers in plan.geometries]
        self._group_of = {layer: group for group in self._groups for layer in group.layers}

        self._room_for = 0  # rows that the native caches were made for
        self._step: Step | None = None
        self._rows: int | None = None
        self._columns = 0
        # Padding of the columns so far, and each row's first unpadded column. None: no padding
        # so far, no unpadded column so far.
        self._validity: torch.Tensor | None = None
        self._bases: list[int | None] = []
        self.history: list[Occupancy] | None = [] if record_history else None
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
        added = {
            field.name: sum(getattr(stats, field.name) for stats in all_stats)
            for field in dataclasses.fields(all_stats[0])
            if field.name.endswith("bytes") or field.name in ("seconds", "bytes_saved")
        }
        return dataclasses.replace(all_stats[0], **added)

    def __repr__(self) -> str:
        state = f"rows={self._rows}, columns={self._columns}" if self._rows else "empty"
        return f"MixedCache(layers={len(self._order)}, {state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedCache:
        if self._rows is not None or self._step is not None:
            raise NotImplementedError(
                "a MixedCache that holds tokens can't be copied: prefill another one, or make one "
                "with max_batch_size and batch_repeat_interleave() it"
            )
        return MixedCache(
            self._config,
            **self._sizes,
            **self._options,
            max_batch_size=self._max_batch_size,
            threads=self._threads,
            record_history=self.history is not None,
        )

    # What transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, padded ones too, without those of a step under way."""
        step = self._step
        if step is not None and not self._settle() and layer_idx in step.updated:
            self._give_up("a new forward began")
        return self._columns

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
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; a positive number says how many stay."""
        self._settle_or_give_up("crop() was called")
        keep = tokens_to_remove if tokens_to_remove > 0 else self._columns + tokens_to_remove
        keep = max(keep, 0)
        if keep >= self._columns:
            return
        for row, base in enumerate(self._bases):
            if base is None:
                continue
            for native in self.natives:
                native.seq_rm(row, max(keep - base, 0), -1)
            if base >= keep:
                self._bases[row] = None
        self._columns = keep
        if self._validity is not None:
            validity = self._validity[:, :keep]
            self._validity = None if bool(validity.all()) else validity

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was. Rows share cells; nothing is copied."""
        self._take_rows([int(row) for row in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; see `max_batch_size`."""
        rows = self._rows or 0
        self._take_rows([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers or a boolean mask), in that order."""
        rows = torch.arange(self._rows or 0)[indices]
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
            out = self._attend(step, handle, query, plan, options, layer)
        except BaseException:
            # Whatever it was, this forward is over: leave the cache as it was before it.
            self._drop_step()
            raise
        if len(step.attended) == len(self._order) and not self._keys_are_reused:
            self._commit(step)
        return out

    def _attend(
        self,
        step: Step,
        handle: Handle,
        query: torch.Tensor,
        plan: MaskPlan | None,
        options: dict[str, Any],
        for_layer: int,
    ) -> torch.Tensor:
        layer = handle.layer
        self._check_mask(step, layer, plan)
        rows, heads, queries, _ = query.shape
        # Layers that reuse keys may ask for the last tokens alone: those are the ones that count.
        width = step.width
        if rows != step.rows or (queries != width and not (handle.stored and queries < width)):
            raise ValueError(
                f"layer {layer} has {rows} rows of {queries} queries for {step.rows} rows of "
                f"{width} new keys"
            )
        if queries < width:
            query = torch.nn.functional.pad(query, (0, 0, width - queries, 0))
        if step.placement is None:
            step.placement = self._place(step, plan)
        placement = step.placement
        group = self._group_of[layer]
        native = self._find_slot(group, handle, placement)
        assert group.shape is not None
        place = group.place[layer]
        if handle.k is not None and handle.v is not None:
            if placement.num_tokens:
                native.store(
                    place, _slot_rows(handle.k, placement), _slot_rows(handle.v, placement)
                )
            handle.k = handle.v = None
            group.in_scratch = layer
            step.attended.add(layer)
        elif group.slot is not None and group.slot.num_cold and group.in_scratch != layer:
            raise NotImplementedError(
                f"the keys of layer {layer} are used again after layer {group.in_scratch} stored "
                f"its own, and {width} new columns are more than the hot tier takes: prefill in "
                "smaller chunks (generate(prefill_chunk_size=...)) or make hot_size larger"
            )
        if not placement.num_tokens:
            return query.new_zeros(rows, queries, heads, group.shape[2])

        window = self.layers[layer].window
        options["window_left"] = None if window is None else window - 1
        options["threads"] = self._threads
        out = query.new_empty(rows * width, heads, group.shape[2])
        tokens = _slot_rows(query, placement)
        if placement.kept is None:
            native.attend(place, tokens, out=out.transpose(0, 1), **options)
        else:
            out.zero_()
            out[placement.kept] = native.attend(place, tokens, **options).transpose(0, 1)
        out = out.view(rows, width, heads, -1)[:, width - queries :].contiguous()
        if self.observer is not None:
            self.observer(
                Observation(
                    layer=for_layer,
                    first=step.first,
                    width=width,
                    rows=rows,
                    query=query[:, :, width - queries :],
                    out=out,
                    native=native,
                    place=place,
                    kept=placement.kept,
                    options=options,
                )
            )
        return out

    # Steps

    def _step_for(self, key: torch.Tensor, layer: int) -> Step:
        """Give the step that `layer`'s rows belong to; begin one with the first layer."""
        rows, _, width, _ = key.shape
        if layer not in self._group_of:
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
            if self._rows is not None and rows != self._rows:
                raise ValueError(
                    f"the MixedCache holds {self._rows} rows, got keys of {rows}: reset() it, or "
                    "make one for each batch"
                )
            if self._rows is None:
                self._make_room(rows)
            self._step = step = Step(first=self._columns, width=width, rows=rows)
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

    def _check_mask(self, step: Step, layer: int, plan: MaskPlan | None) -> None:
        """Raise unless this layer's mask is one that the native cache applies by itself."""
        columns = step.first + step.width
        window: int | None = self.layers[layer].window
        if plan is not None and not plan.causal:
            raise NotImplementedError(
                f"layer {layer} has a mask that a MixedCache can't serve: causal and sliding-"
                "window masks are, bidirectional, chunked, block-wise and packed ones and masks "
                "with a function of one's own are not"
            )
        if plan is not None and (plan.columns != columns or not plan.aligned):
            raise ValueError(
                f"layer {layer}: the mask is for {plan.columns} columns, the cache has "
                f"{step.first} and {step.width} new ones"
            )
        masked = plan.window if plan is not None and plan.window_matters() else None
        hides = window if window is not None and columns > window else None
        if masked != hides:
            raise NotImplementedError(
                f"layer {layer} has a window of {window} tokens in the model's config, and "
                f"of {masked} in its mask"
            )
        validity = plan.validity if plan is not None else None
        if validity is not None and tuple(validity.shape) != (step.rows, columns):
            raise ValueError(
                f"attention_mask has the shape {tuple(validity.shape)}, expected [rows, columns "
                f"so far and new] = ({step.rows}, {columns})"
            )
        if step.placement is not None and not _same(validity, step.validity):
            raise ValueError(f"layer {layer} has another padding than the layers before it")

    def _place(self, step: Step, plan: MaskPlan | None) -> Placement:
        """Decide which of the step's columns are stored, and remember their padding."""
        step.validity = plan.validity if plan is not None else None
        bases = self._bases or [None] * step.rows
        if step.validity is None:
            if self._validity is not None:
                raise ValueError(
                    "no attention_mask was given for a cache that has padded columns: give one "
                    "of all columns, those in the cache and the new ones"
                )
            step.bases = [step.first if base is None else base for base in bases]
            return Placement(None, step.rows * step.width)

        before, new = step.validity[:, : step.first], step.validity[:, step.first :]
        if not _same(before if not bool(before.all()) else None, self._validity):
            raise ValueError(
                "attention_mask pads columns that are in the cache unpadded, or the other way "
                "round: what is padded is decided when a column comes"
            )
        step.bases = [
            step.first + int(first) if base is None and bool(some) else base
            for base, first, some in zip(bases, new.int().argmax(1), new.any(1), strict=True)
        ]
        index = new.reshape(-1).nonzero().squeeze(1)
        count = len(index)
        return Placement(None if count == step.rows * step.width else index, count)

    def _find_slot(self, group: Group, handle: Handle, placement: Placement) -> mkv.MixedKVCache:
        """Reserve cells for the step's tokens in a group's native cache, made here if need be."""
        step = handle.step
        native = self._native_for(group, handle)
        if group.slot is not None or not placement.num_tokens:
            return native
        bases = np.array([base or 0 for base in step.bases], np.int32)
        columns = np.arange(step.first, step.first + step.width, dtype=np.int32)
        pos = (columns[None, :] - bases[:, None]).reshape(-1)
        seq = np.repeat(np.arange(step.rows, dtype=np.int32), step.width)
        if placement.kept is not None:
            index = placement.kept.numpy()
            pos, seq = pos[index], seq[index]
        group.slot = native.find_slot(pos=pos, seq_id=seq)
        if group.slot is None:
            self._raise_full(native.stats(), placement.num_tokens)
        return native

    def _native_for(self, group: Group, handle: Handle) -> mkv.MixedKVCache:
        """Give the group's native cache, after a look at the shape of the handle's rows."""
        if handle.k is None or handle.v is None:
            assert group.native is not None
            return group.native
        shape = (handle.k.shape[1], handle.k.shape[3], handle.v.shape[3])
        if group.native is None:
            group.shape = shape
            group.native = mkv.MixedKVCache(
                num_layers=len(group.layers),
                num_kv_heads=shape[0],
                head_dim=shape[1],
                head_dim_v=shape[2],
                n_seq_max=self._room_for,
                **{name: size * self._room_for for name, size in self._sizes.items()},
                **self._options,
            )
        elif shape != group.shape:
            raise ValueError(
                f"layer {handle.layer} has (kv heads, head_dim of K, of V) = {shape}, layer "
                f"{group.layers[0]} has {group.shape}, which the model's config does not tell: "
                "this model can't be served"
            )
        return group.native

    def _raise_full(self, stats: mkv.CacheStats, wanted: int) -> NoReturn:
        rows = f"for {self._room_for} {'row' if self._room_for == 1 else 'rows together'}"
        if self._options["quantize"]:
            raise mkv.CacheFull(
                f"no room for {wanted} more tokens: {stats.hot_tokens} of {stats.hot_size} hot "
                f"cells and {stats.cold_tokens} of {stats.cold_size} cold ones are in use, "
                f"{rows}; make the MixedCache with a larger cold_size"
            )
        raise mkv.CacheFull(
            f"no room for {wanted} more tokens: {stats.hot_tokens} of {stats.hot_size} cells are "
            f"in use, {rows}; make the MixedCache with a larger hot_size"
        )

    def _commit(self, step: Step) -> None:
        for group in self._groups:
            if group.slot is not None:
                assert group.native is not None
                group.native.commit()
                group.slot = None
        self._step = None
        self._rows = step.rows
        self._columns = step.first + step.width
        self._validity = step.validity
        self._bases = step.bases
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
            if group.slot is not None:
                assert group.native is not None
                group.slot = None
                group.native.restore()
        self._step = None

    # Rows and native caches

    def _take_rows(self, sources: list[int]) -> None:
        """Make row i what row sources[i] was."""
        self._settle_or_give_up("the rows of the cache were rearranged")
        if self._rows is None:
            return
        wrong = [row for row in sources if not 0 <= row < self._rows]
        if wrong or not sources:
            raise ValueError(
                f"rows must be in [0, {self._rows}), at least one: got {wrong or sources}"
            )
        if len(sources) > self._room_for:
            raise ValueError(
                f"{len(sources)} rows asked of a cache with room for {self._room_for}: make it "
                f"with max_batch_size={len(sources)}"
            )
        if sources == list(range(self._rows)):
            return
        for native in self.natives:
            native.seq_gather(sources)
        self._rows = len(sources)
        self._bases = [self._bases[row] for row in sources]
        if self._validity is not None:
            validity = self._validity[sources]
            self._validity = None if bool(validity.all()) else validity

    def _make_room(self, rows: int) -> None:
        """Give an empty cache room for this many rows: its native caches are made anew."""
        if rows <= self._room_for:
            return
        if self._max_batch_size is not None and rows > self._max_batch_size:
            raise ValueError(f"got {rows} rows, max_batch_size is {self._max_batch_size}")
        self._room_for = max(rows, self._max_batch_size or 1)
        for group in self._groups:
            group.native = None

    def _forget(self) -> None:
        self._step = None
        self._rows = None
        self._columns = 0
        self._validity = None
        self._bases = []
        if self.history is not None:
            self.history.clear()


def _slot_rows(rows: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Bring [batch, heads, width, dim] to the rows of the slot, [heads, tokens, dim]."""
    flat = rows[0] if rows.shape[0] == 1 else rows.transpose(0, 1).flatten(1, 2)
    return flat if placement.kept is None else flat[:, placement.kept]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
