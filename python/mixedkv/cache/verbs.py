"""What both caches can do: every verb."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arrays import FLOATS, Array, Result, boolean, check_target, check_threads, shown, to_numpy
from .._options import (
    ComputeType,
    check_compute_type,
    finite,
    lse_like,
    per_head,
    soft_cap,
    window,
)
from ..quantized import QuantizedArray
from .arguments import int_array, integer, new_rows, owners
from .config import CacheConfig, core_options
from .log import logger
from .records import CacheFull, CacheStats, Slot, StoredRows, full_message, stored_rows


class KVCache:
    """What both caches share: every verb."""

    def __init__(self, config: CacheConfig) -> None:
        options = core_options(config)
        try:
            self._core = _core.MixedCache(**options)
        except MemoryError:
            names = ["num_layers", "num_kv_heads", "head_dim", "head_dim_v", "n_seq_max"]
            tiers = ["hot_size", "cold_size"] if config.quantize else ["hot_size"]
            sizes = ", ".join(f"{name}={options[name]}" for name in [*tiers, *names])
            raise MemoryError(f"there is no memory for a cache of {sizes}") from None
        self._config = config
        self._head_dim: int = options["head_dim"]
        self._head_dim_v: int = options["head_dim_v"]
        self._events = 0

    @property
    def config(self) -> CacheConfig:
        """What the cache was made from."""
        return self._config

    # --- a ubatch -----------------------------------------------------------------------------

    def find_slot(
        self, pos: Sequence[int] | Array, seq_id: Sequence[int | Iterable[int]] | Array
    ) -> Slot | None:
        """Find room for a ubatch of tokens, moving older ones to cold where hot is too full.

        Parameters
        ----------
        pos
            Position of each token, 0 and up.
        seq_id
            Owner of each token: a sequence id, or a set of them. A token of several owners sees
            what the smallest one owns.

        Returns
        -------
        The slot, or None where the tokens don't fit; nothing has changed then.

        Raises
        ------
        ValueError
            Where the arguments don't fit, or a slot is pending already.
        """
        positions = int_array(pos, "pos")
        begin, ids = owners(seq_id, len(positions))
        found = self._core.find_slot(positions, begin, ids)
        if found is None:
            self._log("full")
            return None
        if found[3]:
            self._log_moves()
        return Slot(*found)

    def store(self, layer: int, k: Array | QuantizedArray, v: Array | QuantizedArray) -> None:
        """Store a layer's keys and values of the slot's tokens.

        Parameters
        ----------
        layer
            Model layer.
        k, v
            [Hkv, n, D] and [Hkv, n, Dv], n the tokens of the slot in find_slot's order: float32,
            float16, bfloat16 (torch), or a QuantizedArray of any format. Read as they are and
            converted to the type of the tier; rows of the tier's own type keep their bits.

        Raises
        ------
        ValueError
            Without a slot, for a layer that the cache does not hold, for shapes that don't fit;
            for a finite value that the types of the tiers can't hold (f16 from a magnitude of
            65,520 on, q4_0 from 524,160 on), naming layer, head and value: it would turn into an
            infinity or NaN. Nothing is stored then. Infinities and NaN are stored as they are.
        """
        k_rows, k_format = new_rows(k, "k")
        v_rows, v_format = new_rows(v, "v")
        self._core.store(integer(layer, "layer"), k_rows, v_rows, k_format.name, v_format.name)

    def attend(
        self,
        layer: int,
        q: Array,
        *,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        window_left: int | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        return_lse: bool = False,
        out: Array | None = None,
        threads: int | None = None,
        compute_type: ComputeType = "f32",
    ) -> Any:
        """Attend the slot's tokens to all that their sequences own up to their positions.

        Parameters
        ----------
        layer
            Model layer, its keys and values stored in this slot.
        q
            Queries [Hq, n, D] of the slot's tokens; float32 or float16 (torch also bfloat16).
        window_left
            W >= 0: positions p - W to p only; None: the cache's own.
        sm_scale, logits_soft_cap, alibi_slopes, sinks, return_lse, out, threads, compute_type
            As in :func:`mixedkv.attention`.

        Returns
        -------
        [Hq, n, Dv], torch in q's dtype or numpy in float32; with return_lse, (out, lse [Hq, n]).

        Raises
        ------
        ValueError
            Without a slot, before the layer is stored, for shapes or options that don't fit.
        """
        return_lse = boolean(return_lse, "return_lse")
        array = to_numpy(q, "q", FLOATS)
        if array.ndim != 3:
            raise ValueError(f"q must be [Hq, n, D], got shape {array.shape}")
        heads, length = int(array.shape[0]), int(array.shape[1])
        result = Result(q, (heads, length, self._head_dim_v), out)
        if out is not None:
            check_target(result.array, {}, "out")
        lse = np.empty((heads, length), np.float32) if return_lse else None
        self._core.attend(
            integer(layer, "layer"),
            array,
            result.array,
            lse,
            1.0 / math.sqrt(self._head_dim) if sm_scale is None else finite(sm_scale, "sm_scale"),
            soft_cap(logits_soft_cap),
            None if window_left is None else window(window_left),
            per_head(alibi_slopes, "alibi_slopes", heads),
            per_head(sinks, "sinks", heads),
            check_threads(threads),
            check_compute_type(compute_type),
        )
        if lse is None:
            return result.get()
        return result.get(), lse_like(q, lse)

    def commit(self) -> None:
        """Make the slot's tokens final; then, above the threshold, move the oldest to cold.

        A layer that was not stored holds zeros for these tokens. Never fails for lack of room:
        it moves what cold can take.
        """
        self._core.commit()
        self._log("commit")
        self._log_moves()

    def restore(self) -> None:
        """Undo find_slot: put back exactly what was there, moves included."""
        self._core.restore()
        self._log("restore")
        self._events = self._core.stats()["events"]

    def append(
        self,
        pos: Sequence[int] | Array,
        seq_id: Sequence[int | Iterable[int]] | Array,
        ks: Sequence[Array | QuantizedArray] | Array | QuantizedArray,
        vs: Sequence[Array | QuantizedArray] | Array | QuantizedArray,
    ) -> None:
        """Add tokens in one go: find_slot, store every layer, commit.

        Parameters
        ----------
        pos, seq_id
            As in find_slot.
        ks, vs
            For each layer that the cache holds, in order, rows as in store.

        Raises
        ------
        CacheFull
            Where there is no room; nothing has changed then.
        """
        layers = self._core.layers()
        for name, rows in (("ks", ks), ("vs", vs)):
            if not hasattr(rows, "__len__"):
                raise TypeError(f"{name} must be a sequence, got {shown(rows)}")
            if len(rows) != len(layers):
                raise ValueError(f"{name} must hold rows of {len(layers)} layers, got {len(rows)}")
        slot = self.find_slot(pos, seq_id)
        if slot is None:
            raise CacheFull(full_message(self.stats(), len(pos), self._config.quantize))
        try:
            for layer, k, v in zip(layers, ks, vs, strict=True):
                self.store(layer, k, v)
        except BaseException:
            self.restore()
            raise
        self.commit()

    # --- sequences ------------------------------------------------------------------------------

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> None:
        """Take positions [p0, p1) from a sequence (seq < 0: from all).

        p0 < 0 means from the start, p1 < 0 to the end. A cell is freed when its last owner goes.
        """
        self._core.seq_rm(integer(seq, "seq"), integer(p0, "p0"), integer(p1, "p1"))
        self._log("seq_rm")

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Let sequence dst own what src owns in [p0, p1) too; shares cells, copies nothing."""
        self._core.seq_cp(
            integer(src, "src"), integer(dst, "dst"), integer(p0, "p0"), integer(p1, "p1")
        )

    def seq_keep(self, seq: int) -> None:
        """Drop every other sequence."""
        self._core.seq_keep(integer(seq, "seq"))
        self._log("seq_keep")

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        """Shift the positions in [p0, p1) of a sequence by delta; negative ones are freed.

        A cell with other owners is copied first, so that they don't notice (CacheFull where
        there is no room for the copies; nothing has changed then). Stored keys are not rotated:
        the cache knows no RoPE parameters yet.
        """
        self._core.seq_add(
            integer(seq, "seq"), integer(p0, "p0"), integer(p1, "p1"), integer(delta, "delta")
        )

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        """Divide the positions in [p0, p1) of a sequence by d >= 1, rounding down; as seq_add."""
        self._core.seq_div(
            integer(seq, "seq"), integer(p0, "p0"), integer(p1, "p1"), integer(d, "d")
        )

    def seq_gather(self, sources: Sequence[int] | Array) -> None:
        """Let sequence i be what sequence sources[i] was, for all i at once; others end.

        What beam search needs: shares cells, copies nothing.
        """
        self._core.seq_gather(int_array(sources, "sources"))

    def seq_pos_min(self, seq: int) -> int:
        """Return the smallest position that a sequence owns, in either tier; -1 when empty."""
        return self._core.seq_pos_min(integer(seq, "seq"))

    def seq_pos_max(self, seq: int) -> int:
        """Return the largest position that a sequence owns, in either tier; -1 when empty."""
        return self._core.seq_pos_max(integer(seq, "seq"))

    def clear(self) -> None:
        """Forget everything, a pending slot included. Counters go on."""
        self._core.clear()
        self._log("clear")

    # --- looking --------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the cells in use in both tiers: a shared one once, uncommitted ones not."""
        return self._core.size()

    def __bool__(self) -> bool:
        """Return True: an empty cache is a cache."""
        return True

    def positions(self, seq: int) -> NDArray[np.int64]:
        """Return the committed positions of a sequence, ascending: int64 [n]."""
        return self._core.positions(integer(seq, "seq"))[0]

    def tiers(self, seq: int) -> NDArray[np.bool_]:
        """Return for each of :meth:`positions` whether it lies in cold: bool [n]."""
        return self._core.positions(integer(seq, "seq"))[1]

    def keys(self, layer: int, seq: int) -> NDArray[np.float32]:
        """Return a dequantised copy of a sequence's keys: float32 [Hkv, n, D], as positions."""
        return self._core.keys(integer(layer, "layer"), integer(seq, "seq"))

    def values(self, layer: int, seq: int) -> NDArray[np.float32]:
        """Return a dequantised copy of a sequence's values: float32 [Hkv, n, Dv], as positions."""
        return self._core.values(integer(layer, "layer"), integer(seq, "seq"))

    def export_rows(
        self, layer: int, seq: int, *, dequantize: bool = False
    ) -> tuple[StoredRows, StoredRows]:
        """Return what :meth:`attend` reads of a sequence, bit for bit: (hot rows, cold rows).

        With a slot pending, its tokens are among the hot rows, wherever they will lie at commit:
        that is how they are attended. The layer is stored already then, and, of a slot with tokens
        bound for cold, the layer stored last. Where the cache rotates rows (`rotate`), these are
        rotated, as the queries that meet them are.

        Parameters
        ----------
        dequantize
            Return float32 rows that stand for these, as :meth:`keys` and :meth:`values` do:
            dequantised, centers added (`center_keys`), rotated back. Attention over them is what
            the cache's attention comes to, but for rounding.

        Raises
        ------
        ValueError
            Where layer or seq does not fit; where keys are centered and rows are wanted as stored,
            which say nothing without their centers.
        """
        dequantize = boolean(dequantize, "dequantize")
        hot, cold = self._core.export_rows(integer(layer, "layer"), integer(seq, "seq"), dequantize)
        if dequantize:
            return StoredRows(*hot), StoredRows(*cold)
        config = self._config
        return (
            stored_rows(hot, config.hot_k_type, config.hot_v_type),
            stored_rows(cold, config.cold_k_type, config.cold_v_type),
        )

    def stats(self) -> CacheStats:
        """Return the counters."""
        return CacheStats(**self._core.stats())

    def __copy__(self) -> NoReturn:
        raise TypeError(f"a {shown(self)} can't be copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(f"a {shown(self)} can't be copied")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {shown(self)} can't be pickled")

    # --- state files ------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """Save the cache, or one sequence: not there yet."""
        raise NotImplementedError(f"saving to {Path(path)}: state files are not there yet")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoReturn:
        """Load a saved cache: not there yet."""
        raise NotImplementedError(f"loading {Path(path)}: state files are not there yet")

    def load_into(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """Load a saved state into this cache: not there yet."""
        raise NotImplementedError(f"loading {Path(path)}: state files are not there yet")

    # --- words ------------------------------------------------------------------------------------

    def _log_moves(self) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            events = self._core.stats()["events"]
            if events != self._events:
                self._events = events
                self._log("move")

    def _log(self, event: str) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            stats = self.stats()
            logger.debug(
                "[MIXED_CACHE_DEBUG] %s: hot=%d/%d (%.1f%%), cold=%d/%d (%.1f%%)",
                event,
                stats.hot_tokens,
                stats.hot_size,
                100.0 * stats.hot_tokens / stats.hot_size,
                stats.cold_tokens,
                stats.cold_size,
                100.0 * stats.cold_tokens / max(stats.cold_size, 1),
            )
