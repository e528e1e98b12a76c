"""The carried state of attention, and the algebra of merging.

What the state is stands in :mod:`mixedkv.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import FLOATS, Array, Result, boolean, check_target, shown, to_numpy
from ._options import (
    F32,
    MAX_HEAD_DIM,
    ComputeType,
    Inputs,
    Options,
    lse_like,
    per_head,
    position,
    size,
)

__all__ = ["AttentionState", "merge", "merge_state", "merge_states"]


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
        self.num_qo_heads = size(num_qo_heads, "num_qo_heads", 1)
        self.qo_len = size(qo_len, "qo_len", 0)
        self.head_dim = size(head_dim, "head_dim", 1, MAX_HEAD_DIM)
        self.batch = size(batch, "batch", 0)
        rows = self.num_qo_heads * self.qo_len
        if self.batch * rows * self.head_dim >= 2**48:
            raise ValueError(
                f"a state of batch {batch}, num_qo_heads {num_qo_heads}, qo_len {qo_len}, "
                f"head_dim {head_dim} is too large"
            )
        self._ms = np.empty((self.batch, rows, 2), F32)
        self._acc = np.zeros((self.batch, rows, self.head_dim), F32)
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
        shapes = Inputs(q, k, v)
        got = (shapes.batch, shapes.num_qo_heads, shapes.qo_len, shapes.head_dim_v)
        if got != (*self._shape, self.head_dim):
            raise ValueError(
                "q and v must fit the state's (batch, num_qo_heads, qo_len, head_dim) = "
                f"{(*self._shape, self.head_dim)}, got {got}"
            )
        options = Options(
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
        q_first = position(q_start, "q_start", options.positional)
        kv_first = position(kv_start, "kv_start", options.positional)
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
        return_lse = boolean(return_lse, "return_lse")
        shape: tuple[int, ...] = (*self._shape, self.head_dim)
        sink_array = per_head(sinks, "sinks", self.num_qo_heads)
        result = Result(self._like, shape if self._batched else shape[1:], out)
        if out is not None:
            check_target(result.array, {}, "out")
        array = result.array if self._batched else result.array[np.newaxis]
        lse = np.empty(self._shape, F32)
        with self._guard:
            _core.finalize(self._ms, self._acc, sink_array, array, lse)
        if not return_lse:
            return result.get()
        return result.get(), lse_like(self._like, lse if self._batched else lse[0])

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
            raise TypeError(f"other must be an AttentionState, got {shown(other)}")
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
            raise TypeError(f"states must hold AttentionState, got {shown(state)}")
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
    la = to_numpy(lse_a, "lse_a", (F32,))
    lb = to_numpy(lse_b, "lse_b", (F32,))
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
    s = to_numpy(lses, "lses", (F32,))
    if o.ndim < 2 or o.shape[0] < 1:
        raise ValueError(f"outs must be [N, ..., Dv] with N >= 1, got shape {o.shape}")
    if s.shape != o.shape[:-1]:
        raise ValueError(f"lses must have shape {o.shape[:-1]}, got {s.shape}")
    return _merge_stacked(outs, o, s)


def _merge_stacked(like: Array, outs: NDArray[Any], lses: NDArray[Any]) -> tuple[Any, Any]:
    count, *shape = outs.shape
    width = shape[-1]
    result = Result(like, tuple(shape), None)
    lse = np.empty(tuple(shape[:-1]), F32)
    rows = math.prod(shape[:-1])
    _core.merge_states(
        np.ascontiguousarray(outs, F32).reshape(count, rows, width),
        np.ascontiguousarray(lses, F32).reshape(count, rows),
        result.array.reshape(rows, width),
        lse.reshape(rows),
    )
    return result.get(), lse_like(like, lse)
