"""Attention and its carried state, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def _with_batch(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x[None] if x.ndim == 3 else x


def logits_of(
    q: np.ndarray,
    k: np.ndarray,
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    mask: np.ndarray | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: np.ndarray | None = None,
    q_start: int | None = None,
    kv_start: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled logits x and which keys each query sees, both [B, Hq, Lq, Lkv].

    q [B, Hq, Lq, D], k [B, Hkv, Lkv, D], float. Query i stands at q_start + i, key j at
    kv_start + j; without them the last query stands where the last key does.
    """
    q, k = _with_batch(q), _with_batch(k)
    _, num_qo_heads, qo_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else sm_scale

    k = np.repeat(k, num_qo_heads // num_kv_heads, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        x = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
        if logits_soft_cap != 0.0:
            x = logits_soft_cap * np.tanh(x / logits_soft_cap)

    if kv_start is None:
        kv_start = 0
    if q_start is None:
        q_start = kv_start + kv_len - qo_len
    q_pos = (q_start + np.arange(qo_len))[:, None]
    k_pos = (kv_start + np.arange(kv_len))[None, :]
    seen = np.ones((qo_len, kv_len), bool)
    if causal:
        seen &= k_pos <= q_pos
    if window_left >= 0:
        seen &= k_pos >= q_pos - window_left
    if window_right >= 0:
        seen &= k_pos <= q_pos + window_right
    seen = np.broadcast_to(seen, x.shape).copy()

    slopes = None
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, np.float64)[None, :, None, None]
    additive = mask is not None and np.asarray(mask).dtype != bool
    if slopes is not None and not additive:
        x = x + slopes * (k_pos - q_pos)
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask), x.shape)
        if not additive:
            seen &= mask
        else:
            bias = mask.astype(np.float64)
            seen &= ~np.isneginf(bias)
            bias = np.where(np.isneginf(bias), 0.0, bias)
            x = x + (bias if slopes is None else slopes * bias)
    return np.where(seen, x, -np.inf), seen


def _weighted_sum(p: np.ndarray, seen: np.ndarray, v: np.ndarray) -> np.ndarray:
    """sum_j p_ij v_j over the keys that are seen: a value nobody sees may be anything."""
    if np.isfinite(v).all():
        return np.einsum("bhqk,bhkd->bhqd", p, v)
    out = np.zeros((*p.shape[:3], v.shape[3]))
    with np.errstate(invalid="ignore", over="ignore"):
        for b, h, i in np.ndindex(*p.shape[:3]):
            j = np.nonzero(seen[b, h, i])[0]
            out[b, h, i] = (p[b, h, i, j, None] * v[b, h, j]).sum(axis=0)
    return out


@dataclass
class State:
    """M, S [B, Hq, Lq] and acc [B, Hq, Lq, Dv] of the keys seen so far."""

    M: np.ndarray
    S: np.ndarray
    acc: np.ndarray

    @classmethod
    def empty(cls, batch: int, num_qo_heads: int, qo_len: int, head_dim_v: int) -> State:
        rows = (batch, num_qo_heads, qo_len)
        return cls(np.full(rows, -np.inf), np.zeros(rows), np.zeros((*rows, head_dim_v)))

    @classmethod
    def of(cls, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: object) -> State:
        """The state after one segment alone."""
        x, seen = logits_of(q, k, **options)  # type: ignore[arg-type]
        v = _with_batch(v)
        v = np.repeat(v, x.shape[1] // v.shape[1], axis=1)
        if x.shape[3] == 0:
            return cls.empty(*x.shape[:3], v.shape[3])
        M = x.max(axis=-1)
        with np.errstate(invalid="ignore"):
            p = np.where(seen, np.exp(x - np.where(np.isneginf(M), 0.0, M)[..., None]), 0.0)
        return cls(M, p.sum(axis=-1), _weighted_sum(p, seen, v))

    def update(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: object) -> State:
        merged = merge(self, State.of(q, k, v, **options))
        self.M, self.S, self.acc = merged.M, merged.S, merged.acc
        return self

    def finalize(self, sinks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]; zeros and -inf where nothing was seen."""
        M, S, acc = self.M, self.S, self.acc
        empty = np.isneginf(M)
        with np.errstate(invalid="ignore", divide="ignore"):
            if sinks is not None:
                sink = np.asarray(sinks, np.float64)[None, :, None]
                top = np.maximum(M, sink)
                shrink = np.exp(M - top)
                M, S, acc = top, S * shrink + np.exp(sink - top), acc * shrink[..., None]
            out = np.where(empty[..., None], 0.0, acc / S[..., None])
            lse = np.where(empty, -np.inf, M + np.log(S))
        return out, lse


def merge(a: State, b: State) -> State:
    """The state of the union of what a and b saw; an empty one changes nothing."""
    M = np.maximum(a.M, b.M)
    with np.errstate(invalid="ignore"):
        wa = np.where(np.isneginf(a.M), 0.0, np.exp(a.M - M))
        wb = np.where(np.isneginf(b.M), 0.0, np.exp(b.M - M))
    return State(M, a.S * wa + b.S * wb, a.acc * wa[..., None] + b.acc * wb[..., None])


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sinks: np.ndarray | None = None,
    **options: object,
) -> tuple[np.ndarray, np.ndarray]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]; options as in ``logits_of``."""
    return State.of(q, k, v, **options).finalize(sinks)


def merge_states(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised results [n, ..., Dv] with lse [n, ...] -> those of the union.

    An lse of -inf or +inf says that no key was seen.
    """
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    lses = np.where(np.isposinf(lses), -np.inf, lses)
    top = lses.max(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        w = np.where(np.isneginf(lses), 0.0, np.exp(lses - top))
        total = w.sum(axis=0)
        used = np.where((w == 0.0)[..., None], 0.0, outs)
        out = (w[..., None] * used).sum(axis=0) / total[..., None]
        empty = np.isneginf(top)
        return np.where(empty[..., None], 0.0, out), np.where(empty, -np.inf, top + np.log(total))
