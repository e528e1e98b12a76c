"""What mixedkv should compute, written to be read: numpy in float64 and plain Python, no more.

Nothing here imports the package, so that each can judge the other. Three parts: formats by their
formulas, attention with carried state, and ``MixedCacheModel``, the mixed cache as plain lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

# --- Q4_0 -----------------------------------------------------------------------------------------

QK4_0 = 32
BLOCK_BYTES = 18


def quantize_q4_0(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., n / 32 * 18], all arithmetic in float32 as the format asks.

    A block that holds a non-finite value gets d = NaN and every q = 0.
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(-1, QK4_0)
    out = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    with np.errstate(all="ignore"):
        # argmax gives the first of equal magnitudes; the value keeps its sign.
        first = np.argmax(np.abs(blocks), axis=-1)
        largest = blocks[np.arange(len(blocks)), first] + np.float32(0)  # -0 counts as 0
        d = largest / np.float32(-8)
        inverse = np.float32(1) / d
        usable = np.isfinite(inverse)
        inverse = np.where(usable, inverse, np.float32(0))
        product = blocks * inverse[:, None]  # rounded to float32 before 8.5 is added
        q = np.minimum(np.trunc(product + np.float32(8.5)), np.float32(15)).astype(np.uint8)
        q[~usable] = 8
        stored = d.astype(np.float16)
    bad = ~np.isfinite(blocks).all(axis=-1)
    q[bad] = 0
    stored[bad] = np.float16(np.nan)
    out[:, :2] = stored.view(np.uint8).reshape(-1, 2)
    out[:, 2:] = q[:, :16] | (q[:, 16:] << 4)
    return out.reshape(*x.shape[:-1], x.shape[-1] // QK4_0 * BLOCK_BYTES)


def dequantize_q4_0(b: np.ndarray) -> np.ndarray:
    """uint8 [..., m * 18] -> float32 [..., m * 32]: (q - 8) * d."""
    blocks = np.ascontiguousarray(b).reshape(-1, BLOCK_BYTES)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    q = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=-1)
    with np.errstate(invalid="ignore"):
        x = (q.astype(np.float32) - np.float32(8)) * d
    return x.reshape(*b.shape[:-1], b.shape[-1] // BLOCK_BYTES * QK4_0)


# --- Q8_0, IQ4_NL, bf16 ---------------------------------------------------------------------------

QK8_0 = 32
Q8_0_BYTES = 34


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., n / 32 * 34]: d = largest magnitude / 127, q = round(x / d).

    Halves go away from zero. A block without a usable d gets q = 0, one that holds a non-finite
    value d = NaN as well.
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(-1, QK8_0)
    out = np.empty((len(blocks), Q8_0_BYTES), np.uint8)
    with np.errstate(all="ignore"):
        d = np.abs(blocks).max(axis=-1) / np.float32(127)
        inverse = np.float32(1) / d
        scaled = blocks * np.where(np.isfinite(inverse), inverse, np.float32(0))[:, None]
        # In float64 adding a half is exact.
        q = np.copysign(np.floor(np.abs(scaled.astype(np.float64)) + 0.5), scaled)
        stored = d.astype(np.float16)
        bad = ~np.isfinite(blocks).all(axis=-1)
        q[bad] = 0
        stored[bad] = np.float16(np.nan)
        out[:, :2] = stored.view(np.uint8).reshape(-1, 2)
        out[:, 2:] = q.astype(np.int8).view(np.uint8)
    return out.reshape(*x.shape[:-1], x.shape[-1] // QK8_0 * Q8_0_BYTES)


def dequantize_q8_0(b: np.ndarray) -> np.ndarray:
    """uint8 [..., m * 34] -> float32 [..., m * 32]: q * d."""
    blocks = np.ascontiguousarray(b).reshape(-1, Q8_0_BYTES)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    q = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    with np.errstate(invalid="ignore"):
        x = q.astype(np.float32) * d
    return x.reshape(*b.shape[:-1], b.shape[-1] // Q8_0_BYTES * QK8_0)


IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _nearest_level(x: np.float32) -> int:
    """Number of the level nearest to x, the upper one of two as near."""
    best = 0
    for i, level in enumerate(IQ4_NL_LEVELS):
        if abs(float(x) - level) <= abs(float(x) - IQ4_NL_LEVELS[best]):
            best = i
    return best


def _quantize_block_iq4_nl(x: np.ndarray) -> tuple[np.float16, list[int]]:
    """d and the 32 level numbers of a block, one float32 operation after the other."""
    bad = np.float16(np.nan), [0] * 32
    if not np.isfinite(x).all():
        return bad
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < np.float32(1e-15):
        return np.float16(0), [8] * 32
    inverse = np.float32(1) / (largest / np.float32(IQ4_NL_LEVELS[0]))
    numbers = [_nearest_level(inverse * value) for value in x]
    of_products = of_squares = np.float32(0)
    for number, value in zip(numbers, x, strict=True):
        level = np.float32(IQ4_NL_LEVELS[number])
        weighted = value * value * level
        of_products = of_products + weighted * value
        of_squares = of_squares + weighted * level
    d = of_products / of_squares
    return bad if np.isnan(d) else (np.float16(d), numbers)


def quantize_iq4_nl(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., n / 32 * 18], in plain Python: slow."""
    x = np.asarray(x, np.float32)
    blocks = x.reshape(-1, 32)
    out = np.empty((len(blocks), 18), np.uint8)
    with np.errstate(all="ignore"):
        for row, block in zip(out, blocks, strict=True):
            d, numbers = _quantize_block_iq4_nl(block)
            row[:2] = np.array([d]).view(np.uint8)
            row[2:] = np.array(numbers[:16]) | np.array(numbers[16:]) << 4
    return out.reshape(*x.shape[:-1], x.shape[-1] // 32 * 18)


def dequantize_iq4_nl(b: np.ndarray) -> np.ndarray:
    """uint8 [..., m * 18] -> float32 [..., m * 32]: level * d."""
    blocks = np.ascontiguousarray(b).reshape(-1, 18)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=-1)
    with np.errstate(invalid="ignore"):
        x = np.array(IQ4_NL_LEVELS, np.float32)[numbers] * d
    return x.reshape(*b.shape[:-1], b.shape[-1] // 18 * 32)


# --- NL4, NL3 -------------------------------------------------------------------------------------

NL4_LEVELS = (-111, -88, -70, -55, -41, -28, -16, -5, 6, 17, 29, 42, 56, 73, 94, 127)
NL4_MULTIPLIERS = (159, 149, 141, 134, 127, 121, 115, 110, 106)


def search_levels(
    blocks: np.ndarray, levels: tuple[int, ...], multipliers: tuple[int, ...], unit: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """d (float32) and level numbers of blocks [m, n] by least squared error, NaN where not finite.

    Each value becomes an integer of 16 bits, 32767 for the block's largest magnitude; a candidate
    multiplies it by +-m / 32768, rounded, halves up, to a byte, which takes the nearest level, the
    lower one of two as near. The first candidate with the largest <x, c>^2 / <c, c> stays. A level
    stands for ``unit`` times less than it says.
    """
    of = np.array(levels, np.int64)
    with np.errstate(all="ignore"):
        finite = np.isfinite(blocks).all(-1)
        largest = np.abs(np.where(finite[:, None], blocks, 0)).max(-1).astype(np.float32)
        inverse = np.where(largest < np.float32(1e-30), 0, np.float32(32767) / largest)
        x = np.where(finite[:, None], blocks, 0) * inverse.astype(np.float32)[:, None]
        x = np.rint(x).astype(np.int64)
    best = np.full(len(x), -1, np.float32)
    numbers = np.zeros(x.shape, np.int64)
    scale = np.zeros(len(x), np.float32)
    candidates = [0] + [s * m for m in multipliers for s in (1, -1)]
    for m in candidates:  # 0 first: what stays where every other's levels are zeros
        y = np.clip((x * m + 16384) >> 15, -128, 127)
        q = np.abs(y[..., None] - of).argmin(-1)
        c = of[q]
        products = (x * c).sum(-1).astype(np.float32)
        squares = (c * c).sum(-1).astype(np.float32)
        with np.errstate(all="ignore"):
            score = np.full(len(x), -1, np.float32) if m == 0 else products * products / squares
        better = (score > best) | (m == 0)
        numbers[better] = q[better]
        scale[better] = (products / np.maximum(squares, np.float32(1)))[better]
        best = np.where(better, score, best).astype(np.float32)
    step = largest / np.float32(32767) * np.float32(unit)
    with np.errstate(over="ignore"):
        d = (scale * step).astype(np.float32)
    d[~finite] = np.nan
    numbers[~finite] = 0
    return d, numbers


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """[m, n] to bytes [m, n / 2]: of every 32, value j low and value j + 16 high."""
    of = numbers.reshape(len(numbers), -1, 2, 16)
    return (of[:, :, 0] | of[:, :, 1] << 4).reshape(len(numbers), -1).astype(np.uint8)


def _numbers(nibbles: np.ndarray) -> np.ndarray:
    of = nibbles.reshape(len(nibbles), -1, 1, 16)
    return np.concatenate([of & 15, of >> 4], 2).reshape(len(nibbles), -1)


def quantize_nl4(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., n / 64 * 34]: 64 values a block, f16 d, 32 bytes of nibbles."""
    x = np.asarray(x, np.float32)
    d, numbers = search_levels(x.reshape(-1, 64), NL4_LEVELS, NL4_MULTIPLIERS)
    with np.errstate(over="ignore"):
        head = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out = np.concatenate([head, _nibbles(numbers)], -1)
    return out.reshape(*x.shape[:-1], x.shape[-1] // 64 * 34)


def dequantize_nl4(b: np.ndarray) -> np.ndarray:
    """uint8 [..., m * 34] -> float32 [..., m * 64]: level * d."""
    blocks = np.ascontiguousarray(b).reshape(-1, 34)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        x = np.array(NL4_LEVELS, np.float32)[_numbers(blocks[:, 2:])] * d
    return x.reshape(*b.shape[:-1], b.shape[-1] // 34 * 64)


NL3_LEVELS = (-104, -65, -34, -8, 17, 44, 76, 127)
NL3_MULTIPLIERS = (148, 137, 127, 119, 111)


def quantize_nl3(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., n / 32 * 14]: blocks of 32 values, f16 d, 12 bytes.

    Nibbles as NL4's, of which four bytes are spread: bit k of bytes 12 to 15's nibbles is the top
    bit of those of bytes 4 k to 4 k + 3.
    """
    x = np.asarray(x, np.float32)
    d, numbers = search_levels(x.reshape(-1, 32), NL3_LEVELS, NL3_MULTIPLIERS)
    with np.errstate(over="ignore"):
        head = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
    nibbles = _nibbles(numbers)
    rest = nibbles[:, 12:]
    spread = np.concatenate([(rest >> k & 0x11) << 3 for k in range(3)], -1)
    out = np.concatenate([head, nibbles[:, :12] | spread], -1)
    return out.reshape(*x.shape[:-1], x.shape[-1] // 32 * 14)


def dequantize_nl3(b: np.ndarray) -> np.ndarray:
    """uint8 [..., m * 14] -> float32 [..., m * 32]: level * d."""
    blocks = np.ascontiguousarray(b).reshape(-1, 14)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    qs = blocks[:, 2:]
    top = (qs >> 3 & 0x11).reshape(-1, 3, 4)
    rest = top[:, 0] | top[:, 1] << 1 | top[:, 2] << 2
    with np.errstate(invalid="ignore"):
        numbers = _numbers(np.concatenate([qs & 0x77, rest], -1))
        x = np.array(NL3_LEVELS, np.float32)[numbers] * d
    return x.reshape(*b.shape[:-1], b.shape[-1] // 14 * 32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float [..., n] -> uint8 [..., 2 n]: the upper half, to nearest even; NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16).view(np.uint8)


def from_bf16(b: np.ndarray) -> np.ndarray:
    """uint8 [..., 2 n] -> float32 [..., n]."""
    halves = np.ascontiguousarray(b).view(np.uint16).astype(np.uint32)
    return (halves << 16).view(np.float32)


#: Of each format of bytes: from values, to values.
PACKED = {
    "q4_0": (quantize_q4_0, dequantize_q4_0),
    "q8_0": (quantize_q8_0, dequantize_q8_0),
    "iq4_nl": (quantize_iq4_nl, dequantize_iq4_nl),
    "bf16": (to_bf16, from_bf16),
    "nl4": (quantize_nl4, dequantize_nl4),
    "nl3": (quantize_nl3, dequantize_nl3),
}


def stored_as(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of x after a trip through rows of the kind, f32, f16 or one of PACKED."""
    x = np.asarray(x, np.float32)
    if kind == "f32":
        return x.copy()
    if kind == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    pack, unpack = PACKED[kind]
    return unpack(pack(x))


# --- attention ------------------------------------------------------------------------------------


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


# --- the mixed cache ------------------------------------------------------------------------------

HOT, COLD = "hot", "cold"
MAX_POS = 2**31 - 1


class NoRoomError(Exception):
    """What the library says with CacheFull."""


@dataclass
class Token:
    """A cell in use. Rows are float32 [Hkv, D], as what they are stored as gives them back."""

    pos: int
    owners: set[int]
    age: int = -1  # place in the order of commits; -1 while pending
    tier: str = HOT
    k: dict[int, np.ndarray] = field(default_factory=dict)
    v: dict[int, np.ndarray] = field(default_factory=dict)

    def copied(self) -> Token:
        return Token(self.pos, set(self.owners), self.age, self.tier, dict(self.k), dict(self.v))


@dataclass
class Plan:
    """The pending ubatch, what find_slot says of it, and what restore needs."""

    tokens: list[Token]
    bound_for_cold: list[Token]
    num_moved: int
    undo: tuple[list[Token], int, int]
    stored: set[int] = field(default_factory=set)
    k: dict[int, np.ndarray] = field(default_factory=dict)
    v: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def num_hot(self) -> int:
        return len(self.tokens) - len(self.bound_for_cold)

    @property
    def num_cold(self) -> int:
        return len(self.bound_for_cold)


class MixedCacheModel:
    """The mixed cache by brute force: one list of tokens, searched anew for every question.

    What it says of a token: its position, its owners, its age, its tier, its rows. What it does
    not know: cells, bytes, threads.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        hot_size: int,
        cold_size: int,
        group_size: int,
        threshold: float = 0.8,
        n_seq_max: int = 1,
        hot_k_type: str = "f16",
        hot_v_type: str = "f16",
        cold_k_type: str = "q4_0",
        cold_v_type: str = "q4_0",
        sink_tokens: int = 0,
        hot_keep: int = 0,
        window_left: int = -1,
        quantize: bool = True,
    ) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.hot_size = hot_size
        self.cold_size = cold_size if quantize else 0
        self.group_size = group_size
        self.level = math.floor(threshold * hot_size)
        self.n_seq_max = n_seq_max
        self.types = {HOT: (hot_k_type, hot_v_type), COLD: (cold_k_type, cold_v_type)}
        self.sink_tokens = sink_tokens
        self.hot_keep = hot_keep
        self.displaced_by: list[Token] = []  # new tokens that are the newest in place of others
        self.window_left = window_left
        self.quantize = quantize

        self.tokens: list[Token] = []  # committed
        self.plan: Plan | None = None
        self.next_age = 0
        self.tokens_seen = 0
        self.moved = 0
        self.events = 0

    # --- counting ---------------------------------------------------------------------------------

    def in_tier(self, tier: str) -> list[Token]:
        return [t for t in self.tokens if t.tier == tier]

    def free(self, tier: str) -> int:
        size = self.hot_size if tier == HOT else self.cold_size
        return size - len(self.in_tier(tier))

    def pinned(self, tokens: list[Token]) -> list[bool]:
        """Tell first positions, and the hot_keep highest that one of the owners has in hot."""
        newest: dict[int, set[int]] = {}
        for seq in range(self.n_seq_max) if self.hot_keep else ():
            in_hot = (t for t in (*self.in_tier(HOT), *self.displaced_by) if seq in t.owners)
            newest[seq] = set(sorted({t.pos for t in in_hot})[-self.hot_keep :])
        return [
            t.pos < self.sink_tokens or any(t.pos in newest.get(seq, ()) for seq in t.owners)
            for t in tokens
        ]

    def movable(self) -> list[Token]:
        """Committed hot tokens that are not pinned, oldest first.

        Copies that seq_add or seq_div made are as old as their originals; among those the one
        with the smaller position goes first, then the one whose owners are the smaller number
        when each stands for a bit.
        """
        if not self.quantize:
            return []
        in_hot = self.in_tier(HOT)
        return sorted(
            (t for t, pinned in zip(in_hot, self.pinned(in_hot), strict=True) if not pinned),
            key=lambda t: (t.age, t.pos, sum(1 << s for s in t.owners)),
        )

    # --- moving -----------------------------------------------------------------------------------

    def _cool(self, t: Token) -> None:
        k_type, v_type = self.types[COLD]
        t.k = {layer: stored_as(x, k_type) for layer, x in t.k.items()}
        t.v = {layer: stored_as(x, v_type) for layer, x in t.v.items()}
        t.tier = COLD

    def _move_batch(self) -> int:
        """One event: the oldest min(occupied // 4, group_size), as far as pins and cold let it."""
        movable = self.movable()
        n = max(1, min(len(self.in_tier(HOT)) // 4, self.group_size))
        n = min(n, len(movable), self.free(COLD))
        if n == 0:
            return 0
        for t in movable[:n]:
            self._cool(t)
        self.moved += n
        self.events += 1
        return n

    # --- a ubatch ---------------------------------------------------------------------------------

    def find_slot(self, pos: Sequence[int], seq_id: Sequence[int | Iterable[int]]) -> Plan | None:
        assert self.plan is None
        assert len(pos) > 0
        tokens = [
            Token(p, {s} if isinstance(s, int) else set(s))
            for p, s in zip(pos, seq_id, strict=True)
        ]
        # The newest so far stay. Where there is no other way, those do that will be the newest.
        for self.displaced_by in ([], tokens):
            found = self._find_slot(pos, tokens)
            if found is not None:
                break
        self.displaced_by = []
        return found

    def _find_slot(self, pos: Sequence[int], tokens: list[Token]) -> Plan | None:
        n = len(tokens)
        undo = ([t.copied() for t in self.tokens], self.moved, self.events)

        def plan(bound_for_cold: list[Token], num_moved: int) -> Plan:
            self.plan = Plan(tokens, bound_for_cold, num_moved, undo)
            return self.plan

        if n <= self.free(HOT):
            return plan([], 0)
        if not self.quantize:
            return None
        movable = self.movable()
        if n <= self.free(HOT) + min(len(movable), self.free(COLD)):
            num_moved = 0
            while n > self.free(HOT):
                num_moved += self._move_batch()
            return plan([], num_moved)

        # A long ubatch: hot gives up all it can, keeps pins and the newest up to the level.
        if n > self.free(HOT) + self.free(COLD):
            return None
        order = sorted(range(n), key=lambda i: (pos[i], i))
        by_age = [tokens[i] for i in order]
        before, self.displaced_by = self.displaced_by, tokens
        is_pinned = self.pinned(by_age)
        self.displaced_by = before
        pins = [t for t, pinned in zip(by_age, is_pinned, strict=True) if pinned]
        others = [t for t, pinned in zip(by_age, is_pinned, strict=True) if not pinned]
        held = len(self.in_tier(HOT)) - len(movable)
        room_in_cold = self.free(COLD) - len(movable)
        stay = max(self.level - held, len(pins), n - room_in_cold)
        if held + stay > self.hot_size:
            return None
        for t in movable:
            self._cool(t)
        self.moved += len(movable)
        self.events += -(-len(movable) // self.group_size)
        return plan(others[: n - stay], len(movable))

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """k [Hkv, n, D], v [Hkv, n, Dv]: rows of the slot's tokens, in the order of find_slot."""
        assert self.plan is not None
        k_type, v_type = self.types[HOT]
        self.plan.stored.add(layer)
        self.plan.k[layer] = stored_as(k, k_type)
        self.plan.v[layer] = stored_as(v, v_type)

    def visible(self, i: int, window_left: int | None = None) -> list[tuple[Token, int]]:
        """What token i of the slot sees: (token, its index in the slot, or -1 if committed)."""
        assert self.plan is not None
        window = self.window_left if window_left is None else window_left
        query = self.plan.tokens[i]
        seq = min(query.owners)
        everyone = [(t, -1) for t in self.tokens]
        everyone += [(t, j) for j, t in enumerate(self.plan.tokens)]
        return [
            (t, j)
            for t, j in everyone
            if seq in t.owners
            and t.pos <= query.pos
            and (window < 0 or t.pos >= query.pos - window)
        ]

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        *,
        window_left: int | None = None,
        alibi_slopes: np.ndarray | None = None,
        sinks: np.ndarray | None = None,
        only: Sequence[int] | None = None,
        **options: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """q [Hq, n, D] -> out [Hq, n, Dv], lse [Hq, n]; only: those of the slot's tokens, the
        others are left NaN (this is slow)."""
        assert self.plan is not None
        assert layer in self.plan.stored
        num_qo_heads, n, _ = q.shape
        out = np.full((num_qo_heads, n, self.head_dim_v), np.nan)
        lse = np.full((num_qo_heads, n), np.nan)
        for i in range(n) if only is None else only:
            query = self.plan.tokens[i]
            seen = self.visible(i, window_left)
            k = np.stack([t.k[layer] if j < 0 else self.plan.k[layer][:, j] for t, j in seen], 1)
            v = np.stack([t.v[layer] if j < 0 else self.plan.v[layer][:, j] for t, j in seen], 1)
            # ALiBi's distances, as a mask of one row a query head.
            bias = None
            if alibi_slopes is not None:
                distance = np.array([t.pos - query.pos for t, _ in seen], np.float64)
                bias = np.broadcast_to(distance, (1, num_qo_heads, 1, len(seen)))
            o, s = attention(
                q[:, i : i + 1], k, v, mask=bias, alibi_slopes=alibi_slopes, sinks=sinks, **options
            )
            out[:, i], lse[:, i] = o[0, :, 0], s[0, :, 0]
        return out, lse

    def commit(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        order = sorted(range(len(plan.tokens)), key=lambda i: (plan.tokens[i].pos, i))
        for i in order:
            t = plan.tokens[i]
            t.age = self.next_age
            self.next_age += 1
            for layer in range(self.num_layers):
                if layer in plan.stored:
                    t.k[layer], t.v[layer] = plan.k[layer][:, i], plan.v[layer][:, i]
                else:  # a layer that was not stored holds zeros
                    t.k[layer] = np.zeros((self.num_kv_heads, self.head_dim), np.float32)
                    t.v[layer] = np.zeros((self.num_kv_heads, self.head_dim_v), np.float32)
            self.tokens.append(t)
        self.tokens_seen += len(plan.tokens)
        for t in plan.bound_for_cold:
            self._cool(t)
        self.moved += plan.num_cold
        self.events += -(-plan.num_cold // self.group_size)
        while len(self.in_tier(HOT)) > self.level and self._move_batch():
            pass

    def restore(self) -> None:
        assert self.plan is not None
        self.tokens, self.moved, self.events = self.plan.undo
        self.plan = None

    # --- sequences --------------------------------------------------------------------------------

    def _owned(self, seq: int, p0: int = -1, p1: int = -1) -> list[Token]:
        return [
            t
            for t in self.tokens
            if seq in t.owners and (p0 < 0 or t.pos >= p0) and (p1 < 0 or t.pos < p1)
        ]

    def _drop_unowned(self) -> None:
        self.tokens = [t for t in self.tokens if t.owners]

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> None:
        for s in range(self.n_seq_max) if seq < 0 else [seq]:
            for t in self._owned(s, p0, p1):
                t.owners.discard(s)
        self._drop_unowned()

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        for t in self._owned(src, p0, p1):
            t.owners.add(dst)

    def seq_keep(self, seq: int) -> None:
        for t in self.tokens:
            t.owners &= {seq}
        self._drop_unowned()

    def _shift(self, seq: int, p0: int, p1: int, new_pos: Callable[[int], int]) -> None:
        """Moves positions of seq alone: a token that others own too is copied first."""
        changed = [t for t in self._owned(seq, p0, p1) if new_pos(t.pos) != t.pos]
        copies = [t for t in changed if len(t.owners) > 1 and new_pos(t.pos) >= 0]
        freed = [t for t in changed if len(t.owners) == 1 and new_pos(t.pos) < 0]
        for tier in (HOT, COLD):
            room = self.free(tier) + sum(t.tier == tier for t in freed)
            if sum(t.tier == tier for t in copies) > room:
                raise NoRoomError(tier)
        for t in changed:
            moved = t.copied()
            moved.owners, moved.pos = {seq}, new_pos(t.pos)
            t.owners.discard(seq)
            if moved.pos >= 0:
                self.tokens.append(moved)
        self._drop_unowned()

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        if any(t.pos + delta > MAX_POS for t in self._owned(seq, p0, p1)):
            raise OverflowError(delta)
        self._shift(seq, p0, p1, lambda p: p + delta)

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        self._shift(seq, p0, p1, lambda p: p // d)

    def seq_gather(self, sources: Sequence[int]) -> None:
        for t in self.tokens:
            t.owners = {i for i, s in enumerate(sources) if s in t.owners}
        self._drop_unowned()

    def seq_pos_min(self, seq: int) -> int:
        return min((t.pos for t in self._owned(seq)), default=-1)

    def seq_pos_max(self, seq: int) -> int:
        return max((t.pos for t in self._owned(seq)), default=-1)

    def clear(self) -> None:
        if self.plan is not None:
            self.restore()
        self.tokens = []

    # --- looking ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.tokens)

    def in_order(self, seq: int) -> list[Token]:
        """Tokens of seq by position, older ones first where two share one."""
        return sorted(self._owned(seq), key=lambda t: (t.pos, t.age))

    def positions(self, seq: int) -> list[int]:
        return [t.pos for t in self.in_order(seq)]

    def tiers(self, seq: int) -> list[bool]:
        return [t.tier == COLD for t in self.in_order(seq)]

    def keys(self, layer: int, seq: int) -> np.ndarray:
        rows = [t.k[layer] for t in self.in_order(seq)]
        return np.stack(rows, 1) if rows else np.zeros((self.num_kv_heads, 0, self.head_dim))

    def values(self, layer: int, seq: int) -> np.ndarray:
        rows = [t.v[layer] for t in self.in_order(seq)]
        return np.stack(rows, 1) if rows else np.zeros((self.num_kv_heads, 0, self.head_dim_v))
