"""The KV caches: one tier (UnifiedKVCache) and two (MixedKVCache).

A pool of cells, each one token: its position, the sequences that own it, its K and V rows of every
layer. A ubatch goes through ``find_slot``, then per layer ``store`` and ``attend``, then
``commit`` (or ``restore``, which undoes it). In a mixed cache new tokens are *hot* (f16); above a
threshold the oldest move to *cold* (Q4_0), once each, and attention reads both in one pass.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import FLOATS, Array, Result, check_target, check_threads, to_numpy
from .attention import ComputeType, _lse_kind, _per_head, allows_bf16, finite, window

__all__ = [
    "CacheFull",
    "CacheStats",
    "MixedKVCache",
    "Slot",
    "StateFileError",
    "StoredRows",
    "UnifiedKVCache",
]

logger = logging.getLogger("mixedkv.cache")

CacheFull = _core.CacheFull


class StateFileError(Exception):
    """A state file can't be read, or does not fit the cache."""


if os.environ.get("MIXEDKV_DEBUG", "0") not in ("", "0"):
    # On request, without any logging set-up of the program's own.
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.DEBUG)


@dataclass(frozen=True)
class Slot:
    """What :meth:`MixedKVCache.find_slot` found for a ubatch."""

    #: Tokens of the ubatch.
    num_tokens: int
    #: Tokens that will lie in hot at commit.
    num_hot: int
    #: Tokens of a ubatch longer than hot that go straight on to cold at commit.
    num_cold: int
    #: Older tokens moved to cold to make room.
    num_moved: int


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a layer as one tier stores them, in order of position."""

    #: int64 [n].
    positions: NDArray[np.int64]
    #: [Hkv, n, D] in the tier's type: float32, float16, or Q4_0 rows (uint8, ggml's block order).
    k: NDArray[Any]
    #: [Hkv, n, Dv] likewise.
    v: NDArray[Any]


@dataclass(frozen=True)
class CacheStats:
    """Counters of a cache. Tokens are cells in use; bytes are what is allocated."""

    hot_tokens: int
    cold_tokens: int
    hot_size: int
    cold_size: int
    #: Tokens ever committed.
    tokens_seen: int
    #: Tokens ever moved from hot to cold.
    moved: int
    #: Batches of moves.
    events: int
    #: Time spent on moves, mostly quantising.
    move_seconds: float
    hot_bytes: int
    cold_bytes: int
    #: What restore needs, allocated with the cache.
    journal_bytes: int
    #: Cells, indices, plans.
    books_bytes: int
    #: Of a ubatch longer than hot, while it is pending.
    scratch_bytes: int
    #: What the tokens now in cold would take more in f16.
    bytes_saved: int

    @property
    def total_bytes(self) -> int:
        """Everything that the cache holds."""
        return (
            self.hot_bytes
            + self.cold_bytes
            + self.journal_bytes
            + self.books_bytes
            + self.scratch_bytes
        )


class _KVCache:
    """What both caches share: every verb."""

    _core: _core.MixedCache
    _head_dim: int
    _head_dim_v: int
    _num_kv_heads: int
    _num_layers: int
    _events: int

    def _create(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None,
        hot_size: int,
        cold_size: int,
        group_size: int,
        threshold: float,
        n_pad: int,
        n_seq_max: int,
        types: tuple[str, str, str, str],
        sink_tokens: int,
        window_left: int,
        layer_filter: Callable[[int], bool] | Iterable[int] | None,
        quantize: bool,
        size_names: tuple[str, str, str] = ("hot_size", "hot_k_type", "hot_v_type"),
    ) -> None:
        self._num_layers = _positive(num_layers, "num_layers")
        self._num_kv_heads = _positive(num_kv_heads, "num_kv_heads")
        self._head_dim = _positive(head_dim, "head_dim")
        self._head_dim_v = (
            self._head_dim if head_dim_v is None else _positive(head_dim_v, "head_dim_v")
        )
        if not isinstance(quantize, (bool, np.bool_)):
            raise TypeError(f"quantize must be a bool, got {type(quantize).__name__}")
        type_names = (size_names[1], size_names[2], "cold_k_type", "cold_v_type")
        for value, name in zip(types, type_names, strict=True):
            _check_kv_type(value, name)
        self._core = _core.MixedCache(
            self._num_layers,
            self._num_kv_heads,
            self._head_dim,
            self._head_dim_v,
            _positive(hot_size, size_names[0]),
            _positive(cold_size, "cold_size"),
            _positive(group_size, "group_size"),
            finite(threshold, "threshold"),
            _positive(n_pad, "n_pad"),
            _positive(n_seq_max, "n_seq_max"),
            types,
            _integer(sink_tokens, "sink_tokens"),
            window(window_left),
            _layers(layer_filter, self._num_layers),
            bool(quantize),
        )
        self._events = 0

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
        positions = _int_array(pos, "pos")
        begin, ids = _owners(seq_id, len(positions))
        found = self._core.find_slot(positions, begin, ids)
        if found is None:
            self._log("full")
            return None
        if found[3]:
            self._log_moves()
        return Slot(*found)

    def store(self, layer: int, k: Array, v: Array) -> None:
        """Store a layer's keys and values of the slot's tokens.

        Parameters
        ----------
        layer
            Model layer.
        k, v
            [Hkv, n, D] and [Hkv, n, Dv], n the tokens of the slot in find_slot's order; float32
            or float16 (torch also bfloat16), converted to the type of the tier.

        Raises
        ------
        ValueError
            Without a slot, for a layer that the cache does not hold, for shapes that don't fit.
        """
        self._core.store(
            _integer(layer, "layer"), to_numpy(k, "k", FLOATS), to_numpy(v, "v", FLOATS)
        )

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
        array = to_numpy(q, "q", FLOATS)
        if array.ndim != 3:
            raise ValueError(f"q must be [Hq, n, D], got shape {array.shape}")
        heads, length = int(array.shape[0]), int(array.shape[1])
        result = Result(q, (heads, length, self._head_dim_v), out)
        if out is not None:
            check_target(result.array, {"q": array}, "out")
        lse = np.empty((heads, length), np.float32) if return_lse else None
        self._core.attend(
            _integer(layer, "layer"),
            array,
            result.array,
            lse,
            1.0 / math.sqrt(self._head_dim) if sm_scale is None else finite(sm_scale, "sm_scale"),
            finite(logits_soft_cap, "logits_soft_cap", 0.0),
            None if window_left is None else window(window_left),
            _per_head(alibi_slopes, "alibi_slopes", heads),
            _per_head(sinks, "sinks", heads),
            check_threads(threads),
            allows_bf16(compute_type),
        )
        if lse is None:
            return result.get()
        lse_result = Result(_lse_kind(q), lse.shape, None)
        lse_result.array = lse
        return result.get(), lse_result.get()

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
        ks: Sequence[Array] | Array,
        vs: Sequence[Array] | Array,
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
                raise TypeError(f"{name} must be a sequence, got {type(rows).__name__}")
            if len(rows) != len(layers):
                raise ValueError(f"{name} must hold rows of {len(layers)} layers, got {len(rows)}")
        slot = self.find_slot(pos, seq_id)
        if slot is None:
            raise CacheFull(self._full_message(len(pos)))
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
        self._core.seq_rm(_integer(seq, "seq"), _integer(p0, "p0"), _integer(p1, "p1"))
        self._log("seq_rm")

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Let sequence dst own what src owns in [p0, p1) too; shares cells, copies nothing."""
        self._core.seq_cp(
            _integer(src, "src"), _integer(dst, "dst"), _integer(p0, "p0"), _integer(p1, "p1")
        )

    def seq_keep(self, seq: int) -> None:
        """Drop every other sequence."""
        self._core.seq_keep(_integer(seq, "seq"))
        self._log("seq_keep")

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        """Shift the positions in [p0, p1) of a sequence by delta; negative ones are freed.

        A cell with other owners is copied first, so that they don't notice (CacheFull where
        there is no room for the copies; nothing has changed then). Stored keys are not rotated:
        the cache knows no RoPE parameters yet.
        """
        self._core.seq_add(
            _integer(seq, "seq"), _integer(p0, "p0"), _integer(p1, "p1"), _integer(delta, "delta")
        )

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        """Divide the positions in [p0, p1) of a sequence by d >= 1, rounding down; as seq_add."""
        self._core.seq_div(
            _integer(seq, "seq"), _integer(p0, "p0"), _integer(p1, "p1"), _integer(d, "d")
        )

    def seq_gather(self, sources: Sequence[int] | Array) -> None:
        """Let sequence i be what sequence sources[i] was, for all i at once; others end.

        What beam search needs: shares cells, copies nothing.
        """
        self._core.seq_gather(_int_array(sources, "sources"))

    def seq_pos_min(self, seq: int) -> int:
        """Return the smallest position that a sequence owns, in either tier; -1 when empty."""
        return self._core.seq_pos_min(_integer(seq, "seq"))

    def seq_pos_max(self, seq: int) -> int:
        """Return the largest position that a sequence owns, in either tier; -1 when empty."""
        return self._core.seq_pos_max(_integer(seq, "seq"))

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
        return self._core.positions(_integer(seq, "seq"))[0]

    def tiers(self, seq: int) -> NDArray[np.bool_]:
        """Return for each of :meth:`positions` whether it lies in cold: bool [n]."""
        return self._core.positions(_integer(seq, "seq"))[1]

    def keys(self, layer: int, seq: int) -> NDArray[np.float32]:
        """Return a dequantised copy of a sequence's keys: float32 [Hkv, n, D], as positions."""
        return self._core.keys(_integer(layer, "layer"), _integer(seq, "seq"))

    def values(self, layer: int, seq: int) -> NDArray[np.float32]:
        """Return a dequantised copy of a sequence's values: float32 [Hkv, n, Dv], as positions."""
        return self._core.values(_integer(layer, "layer"), _integer(seq, "seq"))

    def export_rows(self, layer: int, seq: int) -> tuple[StoredRows, StoredRows]:
        """Return what :meth:`attend` reads of a sequence, bit for bit: (hot rows, cold rows).

        With a slot pending, its tokens are among the hot rows, wherever they will lie at commit:
        that is how they are attended. The layer is stored already then, and, of a slot with tokens
        bound for cold, the layer stored last.

        Raises
        ------
        ValueError
            Where layer or seq does not fit.
        """
        hot, cold = self._core.export_rows(_integer(layer, "layer"), _integer(seq, "seq"))
        return StoredRows(*hot), StoredRows(*cold)

    def stats(self) -> CacheStats:
        """Return the counters."""
        return CacheStats(**self._core.stats())

    def __copy__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be pickled")

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

    def _full_message(self, n: int) -> str:
        stats = self.stats()
        return (
            f"no room for {n} tokens: hot has {stats.hot_size - stats.hot_tokens} of "
            f"{stats.hot_size} cells free, cold {stats.cold_size - stats.cold_tokens} of "
            f"{stats.cold_size}"
        )

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


class MixedKVCache(_KVCache):
    """A hot tier for new tokens and a cold one that older tokens move to.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim, head_dim_v
        The model's geometry; head_dim_v None: head_dim. Multiples of 32 where a type is q4_0.
    hot_size, cold_size
        Cells (tokens) of all sequences together, multiples of n_pad.
    group_size
        Most tokens moved in one batch.
    threshold
        Tokens move when more than ``floor(threshold * hot_size)`` hot cells are in use:
        ``min(used // 4, group_size)`` of them, oldest first, until that is so no longer.
    n_pad
        What both sizes are multiples of.
    n_seq_max
        Sequence ids are 0 to n_seq_max - 1.
    hot_k_type, hot_v_type, cold_k_type, cold_v_type
        "f32", "f16" or "q4_0".
    sink_tokens
        First positions of each sequence that never leave hot.
    window_left
        attend's default window; -1: none.
    layer_filter
        Layers to hold: a callable on the layer's index, or the indices; None: all.
    quantize
        False: one tier, no moves; cold is not allocated.
    hot_keep, rotate, rope
        Not there yet: anything but the default raises NotImplementedError.

    Raises
    ------
    ValueError
        Naming the parameter and its value; also where the pins of all sequences
        (sink_tokens * n_seq_max) reach the trigger's level.
    """

    #: Parameters that a later version gives a meaning, with the one value that they take now.
    _LATER: ClassVar[dict[str, Any]] = {"hot_keep": 0, "rotate": False, "rope": None}

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        hot_size: int = 1024,
        cold_size: int = 4096,
        group_size: int = 256,
        threshold: float = 0.8,
        n_pad: int = 32,
        n_seq_max: int = 1,
        hot_k_type: str = "f16",
        hot_v_type: str = "f16",
        cold_k_type: str = "q4_0",
        cold_v_type: str = "q4_0",
        sink_tokens: int = 0,
        hot_keep: int = 0,
        rotate: bool = False,
        window_left: int = -1,
        rope: None = None,
        layer_filter: Callable[[int], bool] | Iterable[int] | None = None,
        quantize: bool = True,
    ) -> None:
        _refuse_later(hot_keep=hot_keep, rotate=rotate, rope=rope)
        self._create(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            hot_size=hot_size,
            cold_size=cold_size,
            group_size=group_size,
            threshold=threshold,
            n_pad=n_pad,
            n_seq_max=n_seq_max,
            types=(hot_k_type, hot_v_type, cold_k_type, cold_v_type),
            sink_tokens=sink_tokens,
            window_left=window_left,
            layer_filter=layer_filter,
            quantize=quantize,
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"MixedKVCache(num_layers={self._num_layers}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, hot={stats.hot_tokens}/{stats.hot_size}, "
            f"cold={stats.cold_tokens}/{stats.cold_size})"
        )


class UnifiedKVCache(_KVCache):
    """One tier, the same verbs: a standard cache to compare with.

    Parameters
    ----------
    size
        Cells (tokens) of all sequences together, a multiple of n_pad.
    k_type, v_type
        "f32", "f16" or "q4_0"; with q4_0 a token's rows are quantised as they are stored.
    num_layers, num_kv_heads, head_dim, head_dim_v, n_pad, n_seq_max, window_left, layer_filter
        As in :class:`MixedKVCache`.
    rope
        Not there yet: anything but None raises NotImplementedError.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        size: int = 1024,
        n_pad: int = 32,
        n_seq_max: int = 1,
        k_type: str = "f16",
        v_type: str = "f16",
        window_left: int = -1,
        rope: None = None,
        layer_filter: Callable[[int], bool] | Iterable[int] | None = None,
    ) -> None:
        _refuse_later(rope=rope)
        self._create(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            hot_size=size,
            cold_size=n_pad,
            group_size=1,
            threshold=1.0,
            n_pad=n_pad,
            n_seq_max=n_seq_max,
            types=(k_type, v_type, "f16", "f16"),
            sink_tokens=0,
            window_left=window_left,
            layer_filter=layer_filter,
            quantize=False,
            size_names=("size", "k_type", "v_type"),
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"UnifiedKVCache(num_layers={self._num_layers}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, cells={stats.hot_tokens}/{stats.hot_size})"
        )


def _refuse_later(**parameters: Any) -> None:
    for name, value in parameters.items():
        default = MixedKVCache._LATER[name]
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not there yet: it must be {default}, got {value}")


def _integer(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if not -(2**62) < number < 2**62:
        raise ValueError(f"{name} is out of range: {number}")
    return number


def _positive(value: int, name: str) -> int:
    number = _integer(value, name)
    if number < 1 or number > 2**40:
        raise ValueError(f"{name} must be from 1 to 2**40, got {number}")
    return number


def _check_kv_type(value: str, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in ("f32", "f16", "q4_0"):
        raise ValueError(f"{name} must be 'f32', 'f16' or 'q4_0', got {value!r}")


def _layers(
    layer_filter: Callable[[int], bool] | Iterable[int] | None, num_layers: int
) -> list[bool]:
    if layer_filter is None:
        return []
    if callable(layer_filter):
        held = [bool(layer_filter(layer)) for layer in range(num_layers)]
    else:
        held = [False] * num_layers
        if not isinstance(layer_filter, Iterable):
            raise TypeError(
                "layer_filter must be a callable or layer indices, got "
                f"{type(layer_filter).__name__}"
            )
        for layer in layer_filter:
            if not 0 <= _integer(layer, "layer_filter") < num_layers:
                raise ValueError(
                    f"layer_filter must hold layers from 0 to {num_layers - 1}, got {layer}"
                )
            held[layer] = True
    if not any(held):
        raise ValueError("layer_filter must let one layer through at least, got none")
    return held


def _int_array(values: Sequence[int] | Array, name: str) -> NDArray[np.int64]:
    """Return values as contiguous int64 [n]."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of ints ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ints, got {array.dtype}")
    if array.size and array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} is out of range: {array.max()}")
    return np.ascontiguousarray(array, np.int64)


def _owners(
    seq_id: Sequence[int | Iterable[int]] | Array, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each token's owners begin, [n + 1], and all owners."""
    if not hasattr(seq_id, "__len__"):
        raise TypeError(f"seq_id must be a sequence, got {type(seq_id).__name__}")
    if len(seq_id) != n:
        raise ValueError(f"seq_id must have one entry a token, {n}, got {len(seq_id)}")
    if isinstance(seq_id, np.ndarray) or not any(
        isinstance(owner, (set, frozenset, list, tuple)) for owner in seq_id
    ):
        return np.arange(n + 1, dtype=np.int64), _int_array(seq_id, "seq_id")
    begin = [0]
    ids: list[int] = []
    for i, owner in enumerate(seq_id):
        owners = list(owner) if isinstance(owner, (set, frozenset, list, tuple)) else [owner]
        if not owners:
            raise ValueError(f"seq_id[{i}] must hold one sequence at least, got {owner!r}")
        ids.extend(sorted(_integer(one, f"seq_id[{i}]") for one in owners))
        begin.append(len(ids))
    return np.array(begin, np.int64), np.array(ids, np.int64)
