"""The data of one comparison, and what the right answer is, in float64.

Q4_0 is written once more here, in numpy, so that no contender judges itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .shapes import Shape

__all__ = [
    "KINDS",
    "Problem",
    "Rows",
    "aligned_empty",
    "dequantize_q4_0",
    "quantize_q4_0",
    "relative_error",
]

F32Array = NDArray[np.float32]
#: Conversions, from->to.
KINDS = ("f32->q4_0", "f16->q4_0", "q4_0->f32", "q4_0->f16")


def aligned_empty(shape: tuple[int, ...], dtype: Any, alignment: int = 64) -> NDArray[Any]:
    """Return an array that begins on a cache line, as every library would allocate its own."""
    wanted = np.dtype(dtype)
    size = math.prod(shape) * wanted.itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    array: NDArray[Any] = raw[start : start + size].view(wanted).reshape(shape)
    return array


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous copy that begins on a cache line."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def quantize_q4_0(x: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the Q4_0 rows [..., n // 32 * 18] of values [..., n]."""
    blocks = x.reshape(-1, 32).astype(np.float32)
    at = np.argmax(np.abs(blocks), axis=1)
    largest = np.take_along_axis(blocks, at[:, None], axis=1)
    scale = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
    codes = np.minimum(15, (blocks * inverse + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    rows = np.empty((len(blocks), 18), np.uint8)
    rows[:, :2] = scale.astype(np.float16).view(np.uint8)
    rows[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return rows.reshape(*x.shape[:-1], x.shape[-1] // 32 * 18)


def dequantize_q4_0(rows: NDArray[np.uint8]) -> F32Array:
    """Return the values [..., n] of Q4_0 rows [..., n // 32 * 18]."""
    blocks = rows.reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    values: F32Array = (codes.astype(np.float32) - np.float32(8)) * scale
    return values.reshape(*rows.shape[:-1], rows.shape[-1] // 18 * 32)


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Return ||got - want|| / ||want||; infinity where something is not a number."""
    difference = np.asarray(got, np.float64) - want
    error = float(np.linalg.norm(difference) / np.linalg.norm(want))
    return error if math.isfinite(error) else math.inf


class Problem:
    """Queries, keys and values of one shape: Gaussian, f16 values.

    Query i stands at position kv_len - qo_len + i and sees the keys up to there, itself included.

    Attributes
    ----------
    q
        float32 [Hq, qo_len, D].
    k, v
        float16 [Hkv, kv_len, D].
    """

    def __init__(
        self, shape: Shape, q: F32Array, k: NDArray[np.float16], v: NDArray[np.float16]
    ) -> None:
        self.shape = shape
        self.qo_len = int(q.shape[1])
        self.kv_len = int(k.shape[1])
        self.sm_scale = 1.0 / math.sqrt(shape.head_dim)
        self.q, self.k, self.v = q, k, v
        self._answers: dict[str, NDArray[np.float64]] = {}

    @classmethod
    def random(cls, shape: Shape, qo_len: int, kv_len: int, seed: int = 1) -> Problem:
        """Return a problem of standard normal numbers."""
        if not 1 <= qo_len <= kv_len:
            raise ValueError(f"kv_len must be at least qo_len = {qo_len}, got {kv_len}")
        rng = np.random.default_rng(seed)
        hq, hkv, d = shape.sizes
        k, v = (aligned_empty((hkv, kv_len, d), np.float16) for _ in range(2))
        for head in range(hkv):
            k[head] = rng.standard_normal((kv_len, d), np.float32)
            v[head] = rng.standard_normal((kv_len, d), np.float32)
        return cls(shape, aligned(rng.standard_normal((hq, qo_len, d), np.float32)), k, v)

    def keys(self, begin: int, end: int) -> Problem:
        """Return the problem of the same queries over the keys begin to end alone."""
        return Problem(self.shape, self.q, self.k[:, begin:end], self.v[:, begin:end])

    @cached_property
    def k_q4_0(self) -> NDArray[np.uint8]:
        """Keys as Q4_0 rows: uint8 [Hkv, kv_len, D // 32 * 18]."""
        return self._rows(self.k)

    @cached_property
    def v_q4_0(self) -> NDArray[np.uint8]:
        """Values as Q4_0 rows."""
        return self._rows(self.v)

    def _rows(self, x: NDArray[np.float16]) -> NDArray[np.uint8]:
        rows = aligned_empty((*x.shape[:-1], self.shape.head_dim // 32 * 18), np.uint8)
        for head in range(len(x)):
            rows[head] = quantize_q4_0(x[head])
        return rows

    def row_bytes(self, kv_type: str) -> float:
        """Bytes of K and V of one token in all heads."""
        size = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "u8": 1.0, "q4_0": 18 / 32, "int4": 0.5}
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * size[kv_type]

    @property
    def pairs(self) -> int:
        """(query, key) pairs of a head that attention has to look at."""
        hidden: int = self.qo_len * (self.qo_len - 1) // 2
        return self.qo_len * self.kv_len - hidden

    def answer(
        self,
        key: str,
        rows: Callable[[int], tuple[NDArray[Any], NDArray[Any]]],
        q: NDArray[Any] | None = None,
    ) -> NDArray[np.float64]:
        """Return the attention of float64 arithmetic [Hq, qo_len, D].

        Parameters
        ----------
        key
            Under which the answer is kept.
        rows
            K and V [kv_len, D] of a kv head, as the contender holds them, dequantised.
        q
            The queries that the contender was given, where they were rounded.
        """
        if key not in self._answers:
            self._answers[key] = self._attend(rows, self.q if q is None else q)
        return self._answers[key]

    def answer_f16(self) -> NDArray[np.float64]:
        """Return the answer over the f16 keys and values."""
        return self.answer("f16", lambda head: (self.k[head], self.v[head]))

    def answer_q4_0(self, hot: int = 0) -> NDArray[np.float64]:
        """Return the answer with all keys but the last `hot` in Q4_0, and those in f16."""
        cold = self.kv_len - hot

        def rows(head: int) -> tuple[NDArray[Any], NDArray[Any]]:
            k, v = (dequantize_q4_0(x[head]) for x in (self.k_q4_0, self.v_q4_0))
            k[cold:], v[cold:] = self.k[head, cold:], self.v[head, cold:]
            return k, v

        return self.answer(f"q4_0 but {hot}", rows)

    def _attend(
        self, rows: Callable[[int], tuple[NDArray[Any], NDArray[Any]]], q: NDArray[Any]
    ) -> NDArray[np.float64]:
        group, d = self.shape.group, self.shape.head_dim
        out = np.empty((self.shape.num_qo_heads, self.qo_len, d), np.float64)
        last = self.kv_len - self.qo_len + np.arange(self.qo_len)
        hidden = np.arange(self.kv_len) > last[:, None]
        for head in range(self.shape.num_kv_heads):
            k, v = (x.astype(np.float64) for x in rows(head))
            for h in range(head * group, (head + 1) * group):
                logits = q[h].astype(np.float64) @ k.T * self.sm_scale
                logits[hidden] = -np.inf
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                out[h] = weights @ v / weights.sum(axis=1, keepdims=True)
        return out


class Rows:
    """Rows of Gaussian values to convert, and what they become.

    Attributes
    ----------
    f32, f16
        The same values [n, width].
    q4_0
        Their Q4_0 rows [n, width // 32 * 18].
    """

    def __init__(self, n: int, width: int, seed: int = 1) -> None:
        values = np.random.default_rng(seed).standard_normal((n, width), np.float32)
        self.f16: NDArray[np.float16] = aligned(values.astype(np.float16))
        self.f32: F32Array = aligned(self.f16.astype(np.float32))
        self.q4_0: NDArray[np.uint8] = aligned(quantize_q4_0(values.astype(np.float16)))

    def arrays(self, kind: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the source of a conversion and a new array for its result."""
        source, target = (getattr(self, name) for name in kind.split("->"))
        return source, aligned_empty(target.shape, target.dtype)

    def answer(self, kind: str) -> NDArray[Any]:
        """Return what a conversion must give, to the bit."""
        if kind.endswith("q4_0"):
            return self.q4_0
        values = dequantize_q4_0(self.q4_0)
        return values if kind.endswith("f32") else values.astype(np.float16)

    def float_bytes(self, kind: str) -> int:
        """Return the bytes of the side that is not Q4_0."""
        return self.f16.nbytes if "f16" in kind else self.f32.nbytes
