"""Formats of rows by their formulas."""

from __future__ import annotations

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


FIT_MULTIPLIERS = (151, 143, 137, 130, 125, 120, 115, 111, 107)


def fit_scales(x: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of "q4_0" or "iq4_nl" whose scales are searched for, float [..., n] -> uint8.

    A block is ggml's, or the one that `search_levels` finds where its squared error, 1 + 2^-17
    times over, is below that of ggml's, which must be finite and 1e-30 at least. Errors are added
    in float32: values 0, 16, 1, 17 and so on.
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(-1, 32)
    pack, unpack = PACKED[kind]
    levels, unit = (tuple(range(-128, 128, 16)), 16) if kind == "q4_0" else (IQ4_NL_LEVELS, 1)
    d, numbers = search_levels(blocks, levels, FIT_MULTIPLIERS, unit)
    with np.errstate(all="ignore"):
        head = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
        out, found = pack(blocks), np.concatenate([head, _nibbles(numbers)], -1)
        errors = []
        for rows in (out, found):
            of = np.square(blocks - unpack(rows))
            of = of.reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1, 32)
            total = np.zeros(len(of), np.float32)
            for i in range(32):
                total = total + of[:, i]
            errors.append(total)
        better = errors[1] * np.float32(1 + 2**-17) < errors[0]
    better &= np.isfinite(errors[0]) & (errors[0] >= np.float32(1e-30))
    out[better] = found[better]
    return out.reshape(*x.shape[:-1], x.shape[-1] // 32 * 18)


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
