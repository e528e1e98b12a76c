"""Groups of layers that share a native cache."""

from __future__ import annotations

from typing import Any, NoReturn

from numpy.typing import NDArray

import mixedkv as mkv

from .options import for_rows
from .rows import Handle, stored_as, to_bits
from .steps import Step


class Group:
    """Layers of one geometry, and the native cache that holds their rows.

    Parameters
    ----------
    layers
        Their indices in the model; a layer's index in the native cache is its place here.
    config
        The cache for one row of the batch; its geometry is unknown yet.

    Attributes
    ----------
    place
        A layer's index in the native cache, by its index in the model.
    shape
        (kv heads, head_dim of K, head_dim of V), known from the first rows on.
    native
        Made when the first rows come.
    slot
        What the step under way has reserved in the native cache.
    in_scratch
        The layer that stored last in this step: where tokens go straight to the cold tier, they
        can be attended in the hot type until another layer stores.
    """

    def __init__(self, layers: list[int], config: mkv.CacheConfig) -> None:
        self.layers = layers
        self.place = {layer: place for place, layer in enumerate(layers)}
        self.shape: tuple[int, int, int] | None = None
        self.native: mkv.MixedKVCache | None = None
        self.slot: mkv.Slot | None = None
        self.in_scratch: int | None = None
        self._config = config

    def fit(self, layer: int, k: NDArray[Any], v: NDArray[Any], room_for: int) -> mkv.MixedKVCache:
        """Give the native cache, made here if need be, after a look at a layer's new rows.

        Parameters
        ----------
        layer
            The model's layer.
        k, v
            Its rows, [batch, kv heads, width, head_dim].
        room_for
            Rows of the batch to make the native cache for.
        """
        shape = (k.shape[1], k.shape[3], v.shape[3])
        if self.native is None:
            self.shape = shape
            config = for_rows(self._config, room_for, len(self.layers), shape)
            self.native = mkv.MixedKVCache(config)
        elif shape != self.shape:
            raise ValueError(
                f"layer {layer} has (kv heads, head_dim of K, of V) = {shape}, layer "
                f"{self.layers[0]} has {self.shape}, which the model's config does not tell: "
                "this model can't be served"
            )
        return self.native

    def find_slot(self, step: Step, room_for: int) -> None:
        """Reserve cells for a step's tokens, if they are not yet.

        Raises
        ------
        CacheFull
            There is no room.
        """
        assert self.native is not None
        assert step.placement is not None
        if self.slot is not None or not step.placement.num_tokens:
            return
        pos, seq = step.positions()
        self.slot = self.native.find_slot(pos=pos, seq_id=seq)
        if self.slot is None:
            self._raise_full(step.placement.num_tokens, room_for)

    def store(self, step: Step, handle: Handle, room_for: int) -> mkv.MixedKVCache:
        """Store the handle's rows, if they are not yet, and give the cache that has them."""
        layer = handle.layer
        if handle.k is None or handle.v is None:
            if self.slot is not None and self.slot.num_cold and self.in_scratch != layer:
                raise NotImplementedError(
                    f"the keys of layer {layer} are used again after layer {self.in_scratch} "
                    f"stored its own, and {step.width} new columns are more than the hot tier "
                    "takes: prefill in smaller chunks (generate(prefill_chunk_size=...)) or make "
                    "hot_size larger"
                )
            assert self.native is not None
            return self.native
        k, v = to_bits(handle.k), to_bits(handle.v)
        native = self.fit(layer, k, v, room_for)
        if self.slot is None:
            self.find_slot(step, room_for)
        placement = step.placement
        assert placement is not None
        if placement.num_tokens:
            try:
                k_rows, v_rows = (stored_as(placement.cut(rows)) for rows in (k, v))
                native.store(self.place[layer], k_rows, v_rows)
            except ValueError as error:
                raise ValueError(f"the model's layer {layer}: {error}") from None
        handle.k = handle.v = None
        self.in_scratch = layer
        step.attended.add(layer)
        return native

    def commit(self) -> None:
        """Make the step's tokens final."""
        if self.slot is not None:
            assert self.native is not None
            self.native.commit()
            self.slot = None

    def drop(self) -> None:
        """Leave the native cache as it was before the step."""
        if self.slot is not None:
            assert self.native is not None
            self.slot = None
            self.native.restore()

    def _raise_full(self, wanted: int, room_for: int) -> NoReturn:
        assert self.native is not None
        stats = self.native.stats()
        rows = f"for {room_for} {'row' if room_for == 1 else 'rows together'}"
        if self._config.quantize:
            raise mkv.CacheFull(
                f"no room for {wanted} more tokens: {stats.hot_tokens} of {stats.hot_size} hot "
                f"cells and {stats.cold_tokens} of {stats.cold_size} cold ones are in use, "
                f"{rows}; make the MixedCache with a larger cold_size"
            )
        raise mkv.CacheFull(
            f"no room for {wanted} more tokens: {stats.hot_tokens} of {stats.hot_size} cells are "
            f"in use, {rows}; make the MixedCache with a larger hot_size"
        )
