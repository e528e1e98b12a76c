"""Attention with carried state: flash attention that continues from segment to segment.

For a query row, and logits ``x`` of the keys seen so far, the state is ``M = max(x)``,
``S = sum(exp(x - M))`` and ``acc = sum(exp(x - M) * v)``; the result is ``acc / S`` and
``lse = M + ln S`` (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The accumulator is reset only while M is -inf.

Arrays are numpy arrays or torch CPU tensors. Keys and values may be float32, float16, bfloat16
(torch), or a :class:`mixedkv.QuantizedArray` of any format, each on its own; bare uint8 is Q4_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import (
    FLOATS,
    MASKS,
    Array,
    Result,
    check_target,
    check_threads,
    to_numpy,
)
from .quantized import row_width, rows_of

__all__ = ["AttentionState", "attention", "merge", "merge_state", "merge_states"]

_F32 = np.dtype(np.float32)
#: What products of many query rows may be rounded to.
ComputeType: TypeAlias = Literal["f32", "bf16", "auto"]
#: Smallest soft cap above 0: the smallest normal float32.
_LEAST_SOFT_CAP = 2.0**-126
#: Largest width of a head; a guard against absurd scratch memory.
_MAX_HEAD_DIM = 65536


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    sm_scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    window_left: int = -1,
    window_right: int = -1,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    layout: Literal["HND", "NHD"] = "HND",
    return_lse: bool = False,
    out: Array | None = None,
    threads: int | None = None,
    compute_type: ComputeType = "f32",
) -> Any:
    """Return the attention of all queries over all keys.

    Parameters
    ----------
    q
        Queries [B, Hq, Lq, D], float32 or float16 (torch also bfloat16). A leading B may be left
        out, in q, k and v alike.
    k, v
        Keys [B, Hkv, Lkv, D] and values [B, Hkv, Lkv, Dv], plain, a
        :class:`mixedkv.QuantizedArray`, or bare Q4_0 rows (uint8, last axis ``D // 32 * 18``), read
        as they are. Query head h reads kv head ``h // (Hq // Hkv)``. A batch of 1, in k, v or
        both, serves every row of q's batch, without a copy.
    sm_scale
        Factor of the logits; None: ``1 / sqrt(D)``. Below float32's range it counts as 0.
    causal
        Show a query the keys up to its own position only; the last query stands at the last key.
    mask
        Additive (float32, float16) or boolean (true = attend), broadcast to [B, Hq, Lq, Lkv]; an
        entry of -inf removes the key.
    window_left, window_right
        W >= 0 and R >= 0: show a query at position p the keys p - W to p + R; -1: that side is
        open. With causal nothing after p is shown, whatever window_right is.
    logits_soft_cap
        c > 0: logits become ``c * tanh(logit / c)``, before the mask; 0: none. c is
        float32, from its smallest normal number, 2**-126, on.
    alibi_slopes
        [Hq]: adds ``slope * (key position - query position)``, beside a boolean mask too. An
        additive mask is taken to hold the distances itself, as in ggml: it is multiplied by slope,
        and nothing else is added, causal or not.
    sinks
        [Hq]: learned logits without a value that take part in the softmax's sum.
    layout
        "HND", or "NHD" for q, k, v and the result as [B, L, H, D].
    return_lse
        Return (out, lse) with lse float32 [B, Hq, Lq], natural log; -inf where no key was seen.
    out
        Preallocated result of q's shape with Dv for D. It must not share memory with anything that
        is read: q, k, v, mask, alibi_slopes, sinks.
    threads
        Threads to use; None: :func:`mixedkv.get_num_threads`. The bits don't depend on it.
    compute_type
        "f32", or "bf16" to let queries, keys, weights and values be rounded to bfloat16 (8 bits of
        mantissa) in the products of many query rows: faster where the instruction set in use has
        it (:func:`mixedkv.isa.compute_types`), f32 elsewhere, for single queries, and where the
        last few rows of a prefill are too few to profit. Sums, softmax and state stay f32. A logit
        is then off by some 2^-7 of ``|sm_scale| * sum(|q_i * k_i|)`` at most, and the result by
        some 3e-3 of its norm on data like that of models; magnitudes near 1e-38 may count as 0.
        Whether bf16 is faster depends on the processor: "auto" takes it where it is, by a trial of
        some milliseconds at the first prefill of the process, and f32 elsewhere
        (:func:`mixedkv.isa.auto_compute_type`).

    Returns
    -------
    The result [B, Hq, Lq, Dv], torch in q's dtype or numpy in float32; zeros in rows that see no
    key.

    Raises
    ------
    ValueError
        Where shapes or options don't fit; the message names the argument and its value.
    TypeError
        Where a dtype or a type does not fit.
    """
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout must be 'HND' or 'NHD', got {layout!r}")
    shapes = _Inputs(q, k, v, nhd=layout == "NHD")
    options = _Options(
        shapes,
        sm_scale,
        mask,
        causal,
        window_left,
        window_right,
        logits_soft_cap,
        alibi_slopes,
        threads,
        compute_type,
    )
    sink_array = _per_head(sinks, "sinks", shapes.num_qo_heads)
    out_shape = shapes.out_shape(nhd=layout == "NHD")
    result = Result(q, out_shape, out)
    if out is not None:
        check_target(result.array, {}, "out")
    lse = np.empty((shapes.batch, shapes.num_qo_heads, shapes.qo_len), _F32) if return_lse else None
    out_array = result.array if shapes.batched else result.array[np.newaxis]
    # The last query stands at the last key.
    start = shapes.kv_len - shapes.qo_len
    options.run(
        shapes,
        q_start=start,
        kv_start=0,
        out=out_array.swapaxes(1, 2) if layout == "NHD" else out_array,
        lse=lse,
        sinks=sink_array,
    )
    if lse is None:
        return result.get()
    lse_result = Result(_lse_kind(q), lse.shape, None)
    lse_result.array = lse
    value = lse_result.get()
    return result.get(), value if shapes.batched else value[0]


class AttentionState:
    """The unnormalised attention state of B x Hq x Lq query rows.

    Parameters
    ----------
    num_qo_heads
        Query heads, Hq, 1 and more.
    qo_len
        Queries a head, Lq; 0 and more.
    head_dim
        Width of a value, Dv, 1 and more.
    batch
        B; 0 and more. As in :func:`attention`, a state without rows has empty results.
    """

    def __init__(self, num_qo_heads: int, qo_len: int, head_dim: int, batch: int = 1) -> None:
        self.num_qo_heads = _size(num_qo_heads, "num_qo_heads", 1)
        self.qo_len = _size(qo_len, "qo_len", 0)
        self.head_dim = _size(head_dim, "head_dim", 1, _MAX_HEAD_DIM)
        self.batch = _size(batch, "batch", 0)
        rows = self.num_qo_heads * self.qo_len
        if self.batch * rows * self.head_dim >= 2**48:
            raise ValueError(
                f"a state of batch {batch}, num_qo_heads {num_qo_heads}, qo_len {qo_len}, "
                f"head_dim {head_dim} is too large"
            )
        self._ms = np.empty((self.batch, rows, 2), _F32)
        self._acc = np.zeros((self.batch, rows, self.head_dim), _F32)
        self._like: Array = self._acc
        self._batched = True
        self._guard = _core.Guard("this AttentionState")
        self.reset()

    def __repr__(self) -> str:
        return (
            f"AttentionState(num_qo_heads={self.num_qo_heads}, qo_len={self.qo_len}, "
            f"head_dim={self.head_dim}, batch={self.batch})"
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.batch, self.num_qo_heads, self.qo_len

    @property
    def M(self) -> NDArray[np.float32]:  # noqa: N802 - the field's own name
        """Running maximum of the logits: writable float32 view [B, Hq, Lq]; -inf: no key seen."""
        return self._ms.reshape(*self._shape, 2)[..., 0]

    @property
    def S(self) -> NDArray[np.float32]:  # noqa: N802
        """Sum of exp(x - M): writable float32 view [B, Hq, Lq]."""
        return self._ms.reshape(*self._shape, 2)[..., 1]

    @property
    def acc(self) -> NDArray[np.float32]:
        """Sum of exp(x - M) * v: writable float32 view [B, Hq, Lq, Dv]; not read while M = -inf."""
        return self._acc.reshape(*self._shape, self.head_dim)

    @property
    def ms(self) -> NDArray[np.float32]:
        """M and S side by side, M first: writable float32 view [B, Hq * Lq, 2], row h * Lq + i."""
        return self._ms

    def reset(self) -> None:
        """Forget every key; the accumulator keeps its bytes, which are meaningless then."""
        self._ms[..., 0] = -np.inf
        self._ms[..., 1] = 0.0

    def update(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        sm_scale: float | None = None,
        mask: Array | None = None,
        causal: bool = False,
        q_start: int | None = None,
        kv_start: int | None = None,
        window_left: int = -1,
        window_right: int = -1,
        logits_soft_cap: float = 0.0,
        alibi_slopes: Array | None = None,
        threads: int | None = None,
        compute_type: ComputeType = "f32",
    ) -> None:
        """Attend one more segment of keys.

        Parameters
        ----------
        q, k, v
            As in :func:`attention`, HND: the segment's keys and values, the same queries at every
            update.
        mask
            Of this segment: broadcast to [B, Hq, Lq, segment length].
        q_start, kv_start
            Positions of the first query and of the segment's first key; required with causal, a
            window on either side, or ALiBi without an additive mask.
        sm_scale, causal, window_left, window_right, logits_soft_cap, alibi_slopes, threads,
        compute_type
            As in :func:`attention`.

        Raises
        ------
        ValueError, TypeError
            As :func:`attention`; the state is as it was.
        """
        shapes = _Inputs(q, k, v)
        got = (shapes.batch, shapes.num_qo_heads, shapes.qo_len, shapes.head_dim_v)
        if got != (*self._shape, self.head_dim):
            raise ValueError(
                "q and v must fit the state's (batch, num_qo_heads, qo_len, head_dim) = "
                f"{(*self._shape, self.head_dim)}, got {got}"
            )
        options = _Options(
            shapes,
            sm_scale,
            mask,
            causal,
            window_left,
            window_right,
            logits_soft_cap,
            alibi_slopes,
            threads,
            compute_type,
        )
        q_first = _position(q_start, "q_start", options.positional)
        kv_first = _position(kv_start, "kv_start", options.positional)
        with self._guard:
            options.run(shapes, q_start=q_first, kv_start=kv_first, ms=self._ms, acc=self._acc)
            self._like = q
            self._batched = shapes.batched

    def finalize(
        self, *, sinks: Array | None = None, return_lse: bool = False, out: Array | None = None
    ) -> Any:
        """Return the normalised result, ``acc / S``; the state stays as it is.

        Parameters
        ----------
        sinks
            [Hq]: logits without a value that enter S here, once.
        return_lse
            Return (out, lse); lse = M + ln S, float32 [B, Hq, Lq], -inf where no key was seen.
        out
            Preallocated result.

        Returns
        -------
        [B, Hq, Lq, Dv] of the kind of the last update's q (without B where that came without);
        zeros in rows that saw no key.
        """
        shape: tuple[int, ...] = (*self._shape, self.head_dim)
        sink_array = _per_head(sinks, "sinks", self.num_qo_heads)
        result = Result(self._like, shape if self._batched else shape[1:], out)
        if out is not None:
            check_target(result.array, {}, "out")
        array = result.array if self._batched else result.array[np.newaxis]
        lse = np.empty(self._shape, _F32)
        with self._guard:
            _core.finalize(self._ms, self._acc, sink_array, array, lse)
        if not return_lse:
            return result.get()
        lse_result = Result(_lse_kind(self._like), lse.shape, None)
        lse_result.array = lse
        value = lse_result.get()
        return result.get(), value if self._batched else value[0]

    def merge_(self, other: AttentionState) -> AttentionState:
        """Take in what another state of the same shape has seen, and return self.

        Rows of other whose M is -inf have seen nothing and change nothing. No state has an M of
        +inf, which other libraries' lse may be: a row that was given one becomes NaN.

        Raises
        ------
        ValueError
            Where the shapes differ.
        """
        if not isinstance(other, AttentionState):
            raise TypeError(f"other must be an AttentionState, got {type(other).__name__}")
        if (other._shape, other.head_dim) != (self._shape, self.head_dim):
            raise ValueError(f"other must have the shape of {self!r}, got {other!r}")
        ms, acc = other._ms, other._acc
        if other is self:
            ms, acc = ms.copy(), acc.copy()
        with self._guard:
            _core.merge(self._ms, self._acc, ms, acc)
        if self._like is self._acc and other._like is not other._acc:
            self._like, self._batched = other._like, other._batched
        return self

    def copy(self) -> AttentionState:
        """Return an independent state with the same contents."""
        twin = AttentionState(self.num_qo_heads, self.qo_len, self.head_dim, self.batch)
        twin._ms[...] = self._ms
        twin._acc[...] = self._acc
        if self._like is not self._acc:
            twin._like = self._like
        twin._batched = self._batched
        return twin


def merge(states: Sequence[AttentionState]) -> AttentionState:
    """Return the state of everything that the given states have seen; empty states are neutral.

    Merges in the order given. The states stay as they are.

    Raises
    ------
    ValueError
        Where there is none, or their shapes differ.
    """
    states = list(states)
    if not states:
        raise ValueError("states must hold one AttentionState at least, got none")
    for state in states:
        if not isinstance(state, AttentionState):
            raise TypeError(f"states must hold AttentionState, got {type(state).__name__}")
    merged = states[0].copy()
    for state in states[1:]:
        merged.merge_(state)
    return merged


def merge_state(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Any, Any]:
    """Merge two normalised results over different keys into that of all of them.

    Parameters
    ----------
    out_a, out_b
        Results [..., Dv], float32 or float16 (torch also bfloat16).
    lse_a, lse_b
        Their natural log-sum-exps [...], float32; -inf marks rows that saw no key, and so does
        +inf (as FlashAttention 2 and vLLM write it): they are neutral, whatever their result
        holds. (FlashInfer's are base 2: multiply by ln 2.)

    Returns
    -------
    (out, lse) of the same shapes, in out_a's kind; zeros and -inf where neither saw a key, NaN
    where either lse is NaN.
    """
    a = to_numpy(out_a, "out_a", FLOATS)
    b = to_numpy(out_b, "out_b", FLOATS)
    la = to_numpy(lse_a, "lse_a", (_F32,))
    lb = to_numpy(lse_b, "lse_b", (_F32,))
    if a.ndim == 0 or b.shape != a.shape:
        raise ValueError(f"out_b must have out_a's shape {a.shape}, got {b.shape}")
    for name, array in (("lse_a", la), ("lse_b", lb)):
        if array.shape != a.shape[:-1]:
            raise ValueError(f"{name} must have shape {a.shape[:-1]}, got {array.shape}")
    return _merge_stacked(out_a, np.stack([a, b]), np.stack([la, lb]))


def merge_states(outs: Array, lses: Array) -> tuple[Any, Any]:
    """Merge many normalised results, stacked on the first axis; see :func:`merge_state`.

    Parameters
    ----------
    outs
        [N, ..., Dv], N >= 1.
    lses
        [N, ...].

    Returns
    -------
    (out, lse) of shapes [..., Dv] and [...].
    """
    o = to_numpy(outs, "outs", FLOATS)
    s = to_numpy(lses, "lses", (_F32,))
    if o.ndim < 2 or o.shape[0] < 1:
        raise ValueError(f"outs must be [N, ..., Dv] with N >= 1, got shape {o.shape}")
    if s.shape != o.shape[:-1]:
        raise ValueError(f"lses must have shape {o.shape[:-1]}, got {s.shape}")
    return _merge_stacked(outs, o, s)


def _merge_stacked(like: Array, outs: NDArray[Any], lses: NDArray[Any]) -> tuple[Any, Any]:
    count, *shape = outs.shape
    width = shape[-1]
    result = Result(like, tuple(shape), None)
    lse = Result(_lse_kind(like), tuple(shape[:-1]), None)
    rows = math.prod(shape[:-1])
    _core.merge_states(
        np.ascontiguousarray(outs, _F32).reshape(count, rows, width),
        np.ascontiguousarray(lses, _F32).reshape(count, rows),
        result.array.reshape(rows, width),
        lse.array.reshape(rows),
    )
    return result.get(), lse.get()


def _lse_kind(q: Array) -> Array:
    """Return what makes a Result of q's kind in float32."""
    return q if isinstance(q, np.ndarray) else q[..., :0].float()


def _size(value: int, name: str, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return int(value)


def _position(value: int | None, name: str, needed: bool) -> int:
    if value is None:
        if needed:
            raise ValueError(
                f"{name} is required with causal, window_left, window_right, or alibi_slopes "
                "without an additive mask; got None"
            )
        return 0
    return _size(value, name, -(2**40), 2**40)


def _per_head(values: Array | None, name: str, num_qo_heads: int) -> NDArray[np.float32] | None:
    if values is None:
        return None
    array = to_numpy(values, name, FLOATS)
    if array.shape != (num_qo_heads,):
        raise ValueError(f"{name} must have shape ({num_qo_heads},), got {array.shape}")
    return np.ascontiguousarray(array, _F32)


def _real(value: float, name: str) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def finite(value: float, name: str, low: float = -math.inf) -> float:
    """Return value as a finite float of low or more; ValueError and TypeError name it."""
    number = _real(value, name)
    if not math.isfinite(number) or number < low or abs(number) > 3.4e38:
        bound = "" if low == -math.inf else f" of {low:g} or more"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")
    return number


def soft_cap(value: float) -> float:
    """Return a logits_soft_cap: 0 for none, or one that float32 holds as a normal number."""
    number = finite(value, "logits_soft_cap", 0.0)
    if 0.0 < number < _LEAST_SOFT_CAP:
        raise ValueError(
            f"logits_soft_cap must be 0 (none) or {_LEAST_SOFT_CAP:.9g} (2**-126) or more, "
            f"got {value}"
        )
    return number


def window(value: int, name: str = "window_left") -> int:
    """Return one side of a window: -1 for none, or 0 and more."""
    return _size(value, name, -1, 2**40)


def check_compute_type(compute_type: ComputeType) -> ComputeType:
    """Return a compute_type that is one."""
    if not isinstance(compute_type, str):
        raise TypeError(f"compute_type must be a str, got {type(compute_type).__name__}")
    if compute_type not in ("f32", "bf16", "auto"):
        raise ValueError(f"compute_type must be 'f32', 'bf16' or 'auto', got {compute_type!r}")
    return compute_type


@dataclass(init=False)
class _Inputs:
    """q, k and v as [B, H, L, row] numpy views, and their sizes."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    batched: bool

    def __init__(self, q: Array, k: Array, v: Array, *, nhd: bool = False) -> None:
        arrays = {"q": to_numpy(q, "q", FLOATS)}
        arrays["k"], self.k_format = rows_of(k, "k")
        arrays["v"], self.v_format = rows_of(v, "v")
        order = "[B, L, H, D]" if nhd else "[B, H, L, D]"
        ndim = arrays["q"].ndim
        for name, array in arrays.items():
            if array.ndim not in (3, 4):
                raise ValueError(f"{name} must be {order}, B optional, got shape {array.shape}")
            if array.ndim != ndim:
                raise ValueError(
                    f"q, k and v must all come with or without B, got {arrays['q'].shape} and "
                    f"{name} {array.shape}"
                )
        self.batched = ndim == 4
        for name, array in arrays.items():
            full = array if self.batched else array[np.newaxis]
            setattr(self, name, full.swapaxes(1, 2) if nhd else full)
        self._check()

    def _check(self) -> None:
        q, k, v = self.q, self.k, self.v
        for name, array in (("k", k), ("v", v)):
            if array.shape[0] not in (1, q.shape[0]):
                wanted = "1" if q.shape[0] == 1 else f"{q.shape[0]}, or 1"
                raise ValueError(f"{name} must have q's batch {wanted}, got {array.shape[0]}")
        if v.shape[1:3] != k.shape[1:3]:
            raise ValueError(f"v must have k's heads and length {k.shape[1:3]}, got {v.shape[1:3]}")
        if not k.shape[1] or q.shape[1] % k.shape[1] or not q.shape[1]:
            raise ValueError(
                f"the heads of q must be a multiple of those of k, got {q.shape[1]} and "
                f"{k.shape[1]}"
            )
        self.head_dim = int(q.shape[-1])
        self.head_dim_v = row_width(v, self.v_format, "v")
        if row_width(k, self.k_format, "k") != self.head_dim:
            raise ValueError(
                f"k must have q's head_dim {self.head_dim}, got "
                f"{row_width(k, self.k_format, 'k')} (shape {k.shape}, {k.dtype})"
            )
        for name, width in (("q", self.head_dim), ("v", self.head_dim_v)):
            if not 1 <= width <= _MAX_HEAD_DIM:
                raise ValueError(
                    f"the head_dim of {name} must be from 1 to {_MAX_HEAD_DIM}, got {width}"
                )
        if k.shape[0] != q.shape[0]:
            self.k = np.broadcast_to(k, (q.shape[0], *k.shape[1:]))
        if v.shape[0] != q.shape[0]:
            self.v = np.broadcast_to(v, (q.shape[0], *v.shape[1:]))

    @property
    def batch(self) -> int:
        return int(self.q.shape[0])

    @property
    def num_qo_heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def qo_len(self) -> int:
        return int(self.q.shape[2])

    @property
    def kv_len(self) -> int:
        return int(self.k.shape[2])

    def out_shape(self, *, nhd: bool) -> tuple[int, ...]:
        heads_len = (self.num_qo_heads, self.qo_len)
        shape = (*(heads_len[::-1] if nhd else heads_len), self.head_dim_v)
        return (self.batch, *shape) if self.batched else shape


class _Options:
    """The options of the op, checked."""

    def __init__(
        self,
        shapes: _Inputs,
        sm_scale: float | None,
        mask: Array | None,
        causal: bool,
        window_left: int,
        window_right: int,
        logits_soft_cap: float,
        alibi_slopes: Array | None,
        threads: int | None,
        compute_type: ComputeType,
    ) -> None:
        self.sm_scale = (
            1.0 / math.sqrt(shapes.head_dim) if sm_scale is None else finite(sm_scale, "sm_scale")
        )
        if not isinstance(causal, (bool, np.bool_)):
            raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
        self.causal = bool(causal)
        self.window_left = window(window_left)
        self.window_right = window(window_right, "window_right")
        self.logits_soft_cap = soft_cap(logits_soft_cap)
        self.alibi_slopes = _per_head(alibi_slopes, "alibi_slopes", shapes.num_qo_heads)
        self.threads = check_threads(threads)
        self.compute_type = check_compute_type(compute_type)
        self.mask: NDArray[Any] | None = None
        if mask is not None:
            array = to_numpy(mask, "mask", MASKS)
            wanted = (shapes.batch, shapes.num_qo_heads, shapes.qo_len, shapes.kv_len)
            try:
                self.mask = np.broadcast_to(array, wanted)
            except ValueError:
                raise ValueError(
                    f"mask must broadcast to [B, Hq, Lq, Lkv] = {wanted}, got {array.shape}"
                ) from None
        self.positional = (
            self.causal
            or self.window_left >= 0
            or self.window_right >= 0
            or (
                self.alibi_slopes is not None and (self.mask is None or self.mask.dtype == np.bool_)
            )
        )

    def run(
        self,
        shapes: _Inputs,
        *,
        q_start: int,
        kv_start: int,
        ms: NDArray[np.float32] | None = None,
        acc: NDArray[np.float32] | None = None,
        out: NDArray[np.float32] | None = None,
        lse: NDArray[np.float32] | None = None,
        sinks: NDArray[np.float32] | None = None,
    ) -> None:
        _core.attend(
            shapes.q,
            shapes.k,
            shapes.v,
            shapes.k_format.name,
            shapes.v_format.name,
            ms,
            acc,
            out,
            lse,
            self.mask,
            self.alibi_slopes,
            sinks,
            self.sm_scale,
            self.logits_soft_cap,
            self.causal,
            self.window_left,
            self.window_right,
            q_start,
            kv_start,
            self.threads,
            self.compute_type,
        )
