"""The data of one comparison, and what the right answer is, in float64.

No contender judges itself: Q4_0 is written once more here, in numpy, and rows of every other format
are made and read by mixedkv's scalar kernels, which are written apart from those that are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from .shapes import DEFAULT_FORMATS, Shape

__all__ = [
    "Problem",
    "Rows",
    "aligned",
    "aligned_empty",
    "as_argument",
    "bits_of",
    "dequantize_q4_0",
    "kinds",
    "quantize_q4_0",
    "relative_error",
    "rows_in",
    "values_of",
]

F32Array = NDArray[np.float32]
#: Bits a value of what other libraries hold, and mixedkv has no format for; scales come on top.
_OTHERS_BITS = {"int8": 8.0, "u8": 8.0, "int4": 4.0, "u4": 4.0}


def bits_of(kv_type: str) -> float:
    """Return the bits a value takes in a format, or in what another library holds."""
    return _OTHERS_BITS.get(kv_type) or mkv.formats.info(kv_type).bits


def kinds(formats: Sequence[str]) -> list[str]:
    """Return the conversions between plain rows and those of formats, from->to."""
    plain = [name for name in mkv.formats.available() if name not in mkv.formats.packed()]
    return [
        kind
        for name in formats
        if name not in plain
        for kind in (*(f"{one}->{name}" for one in plain), *(f"{name}->{one}" for one in plain))
    ]


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


@contextmanager
def _scalar() -> Iterator[None]:
    """Let mixedkv convert by its plain loops."""
    before = mkv.isa.active()
    mkv.isa.select("scalar")
    try:
        yield
    finally:
        mkv.isa.select(before)


def rows_in(x: NDArray[Any], name: str) -> NDArray[Any]:
    """Return values [..., n] as rows of a format: floats, or the bytes of packed rows (uint8)."""
    if name in ("f32", "f16"):
        return aligned(x.astype(np.float32 if name == "f32" else np.float16))
    if name == "q4_0":
        return aligned(quantize_q4_0(x))
    rows = aligned_empty((*x.shape[:-1], mkv.formats.info(name).row_bytes(x.shape[-1])), np.uint8)
    with _scalar():
        mkv.quantize(x, name, out=rows)
    return rows


def values_of(rows: NDArray[Any], name: str) -> F32Array:
    """Return the values [..., n] of such rows."""
    if name in ("f32", "f16"):
        return rows.astype(np.float32)
    if name == "q4_0":
        return dequantize_q4_0(rows)
    with _scalar():
        values: F32Array = mkv.QuantizedArray(rows, name).dequantize()
    return values


def as_argument(rows: NDArray[Any], name: str) -> Any:
    """Return such rows as mixedkv takes them."""
    return rows if name in ("f32", "f16") else mkv.QuantizedArray(rows, name)


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
        self._rows: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {"f16": (k, v)}

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

    def rows(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return K and V as rows of a format, [Hkv, kv_len, D] or [Hkv, kv_len, bytes of a row]."""
        if name not in self._rows:
            self._rows[name] = rows_in(self.k, name), rows_in(self.v, name)
        return self._rows[name]

    def row_bytes(self, kv_type: str) -> float:
        """Bytes of K and V of one token in all heads."""
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * bits_of(kv_type) / 8

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

    def answer_in(self, name: str, hot: int = 0) -> NDArray[np.float64]:
        """Return the answer with all keys but the last `hot` in a format, and those in f16."""
        cold = self.kv_len - hot

        def rows(head: int) -> tuple[NDArray[Any], NDArray[Any]]:
            k, v = (values_of(x[head], name) for x in self.rows(name))
            k[cold:], v[cold:] = self.k[head, cold:], self.v[head, cold:]
            return k, v

        return self.answer(f"{name} but {hot}", rows)

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
    kinds
        The conversions, from->to.
    """

    def __init__(
        self, n: int, width: int, formats: Sequence[str] = DEFAULT_FORMATS, seed: int = 1
    ) -> None:
        values = np.random.default_rng(seed).standard_normal((n, width), np.float32)
        values = values.astype(np.float16)
        self.kinds = kinds(formats)
        names = {name for kind in self.kinds for name in kind.split("->")} | {"f32", "f16"}
        self._rows = {name: rows_in(values, name) for name in names}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, values of a row)."""
        n, width = self._rows["f32"].shape
        return n, width

    def rows(self, name: str) -> NDArray[Any]:
        """Return the values [n, width], or their rows in a format [n, bytes of a row]."""
        return self._rows[name]

    def arrays(self, kind: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the source of a conversion and a new array for its result."""
        source, target = (self._rows[name] for name in kind.split("->"))
        return source, aligned_empty(target.shape, target.dtype)

    def answer(self, kind: str) -> NDArray[Any]:
        """Return what a conversion must give, to the bit."""
        source, target = kind.split("->")
        if source in ("f32", "f16"):
            return self._rows[target]
        return values_of(self._rows[source], source).astype(self._rows[target].dtype)

    def float_bytes(self, kind: str) -> int:
        """Return the bytes of the side that is floats."""
        return self._rows["f16" if "f16" in kind.split("->") else "f32"].nbytes
