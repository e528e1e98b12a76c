"""What the op's callers share: its inputs and options, checked."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import FLOATS, MASKS, Array, boolean, check_threads, is_tensor, shown, to_numpy
from .quantized import row_width, rows_of

F32 = np.dtype(np.float32)
#: What products of many query rows may be rounded to.
ComputeType: TypeAlias = Literal["f32", "bf16", "auto"]
#: Smallest soft cap above 0: the smallest normal float32.
_LEAST_SOFT_CAP = 2.0**-126
#: Largest width of a head; a guard against absurd scratch memory.
MAX_HEAD_DIM = 65536


def lse_like(q: Array, lse: NDArray[np.float32]) -> Array:
    """Return an lse in q's kind, in float32 whatever q's dtype, sharing its memory."""
    return sys.modules["torch"].from_numpy(lse) if is_tensor(q) else lse


def size(value: int, name: str, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return int(value)


def position(value: int | None, name: str, needed: bool) -> int:
    if value is None:
        if needed:
            raise ValueError(
                f"{name} is required with causal, window_left, window_right, or alibi_slopes "
                "without an additive mask; got None"
            )
        return 0
    return size(value, name, -(2**40), 2**40)


def per_head(values: Array | None, name: str, num_qo_heads: int) -> NDArray[np.float32] | None:
    if values is None:
        return None
    array = to_numpy(values, name, FLOATS)
    if array.shape != (num_qo_heads,):
        raise ValueError(f"{name} must have shape ({num_qo_heads},), got {array.shape}")
    return np.ascontiguousarray(array, F32)


def _real(value: float, name: str) -> float:
    if not isinstance(value, (bool, np.bool_, str, bytes, bytearray)) and not getattr(
        value, "ndim", 0
    ):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise TypeError(f"{name} must be a number, got {shown(value)}")


def finite(value: float, name: str, low: float = -math.inf) -> float:
    """Return value as a finite float of low or more; ValueError and TypeError name it."""
    try:
        number = _real(value, name)
    except OverflowError:  # an int beyond float64
        number = math.inf
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
    return size(value, name, -1, 2**40)


def check_layout(layout: str) -> None:
    """Raise ValueError or TypeError unless layout is one."""
    if not isinstance(layout, str):
        raise TypeError(f"layout must be a str, got {shown(layout)}")
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout must be 'HND' or 'NHD', got {layout!r}")


def check_compute_type(compute_type: ComputeType) -> ComputeType:
    """Return a compute_type that is one."""
    if not isinstance(compute_type, str):
        raise TypeError(f"compute_type must be a str, got {shown(compute_type)}")
    if compute_type not in ("f32", "bf16", "auto"):
        raise ValueError(f"compute_type must be 'f32', 'bf16' or 'auto', got {compute_type!r}")
    return compute_type


@dataclass(init=False)
class Inputs:
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
        k_dim = row_width(k, self.k_format, "k")
        if k_dim != self.head_dim:
            raise ValueError(
                f"k must have q's head_dim {self.head_dim}, got {k_dim} (shape {k.shape}, "
                f"{k.dtype})"
            )
        for name, width in (("q", self.head_dim), ("v", self.head_dim_v)):
            if not 1 <= width <= MAX_HEAD_DIM:
                raise ValueError(
                    f"the head_dim of {name} must be from 1 to {MAX_HEAD_DIM}, got {width}"
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


class Options:
    """The options of the op, checked."""

    def __init__(
        self,
        shapes: Inputs,
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
        self.causal = boolean(causal, "causal")
        self.window_left = window(window_left)
        self.window_right = window(window_right, "window_right")
        self.logits_soft_cap = soft_cap(logits_soft_cap)
        self.alibi_slopes = per_head(alibi_slopes, "alibi_slopes", shapes.num_qo_heads)
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
        shapes: Inputs,
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
