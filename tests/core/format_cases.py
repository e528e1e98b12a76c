"""Formats by name, and rows that try them: what the tests of formats share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import reference as ref
from conftest import normal

#: ggml's formats of blocks, and ours.
GGML_BLOCKS = ("q4_0", "q8_0", "iq4_nl")
OWN = ("nl4", "nl3")
BLOCKS = (*GGML_BLOCKS, *OWN)
PACKED = (*BLOCKS, "bf16")
KINDS = ("f32", "f16", *PACKED)
F32_MAX = np.finfo(np.float32).max

Make = Callable[[], np.ndarray]


def blocks_of(rng: np.random.Generator, n: int) -> np.ndarray:
    """Blocks of every magnitude that a float has, with ties, zeros and single values among them."""
    x = normal(rng, n, 32) * np.exp2(rng.integers(-110, 60, (n, 1))).astype(np.float32)
    x[: n // 4] = rng.integers(-3, 4, (n // 4, 32))
    x[n // 4 : n // 3] = 0
    x[np.arange(n // 4, n // 3), rng.integers(0, 32, n // 3 - n // 4)] = -1.5
    return x


def half_way() -> np.ndarray:
    """Values at, and one step from, what lies half way between two quants of a format."""
    rows = []
    halves = [np.arange(-63.5, 64.5, 4.0), np.arange(-16, 16) / 2]
    levels = np.array(ref.IQ4_NL_LEVELS, np.float32)
    halves.append(np.resize((levels[1:] + levels[:-1]) / 2, 32))
    for largest in (127.0, -127.0, 8.0, -8.0, 0.1, 3e-5, 1e10):
        for x in halves:
            row = (x * np.float32(abs(largest) / 127)).astype(np.float32)
            for step in (row, np.nextafter(row, np.float32(9e9)), np.nextafter(row, np.float32(0))):
                rows.append(np.r_[np.float32(largest), step[1:]])
    return np.stack(rows).astype(np.float32)


def extremes() -> np.ndarray:
    rows = []
    for value in (
        0.0,
        -0.0,
        1e-45,
        1e-40,
        2.9e-39,
        3e-39,
        1e-30,
        9.9e-16,
        1.1e-15,
        1e18,
        3e18,
        F32_MAX,
    ):
        x = np.zeros(32, np.float32)
        x[5] = value
        rows += [x, -x, np.full(32, value, np.float32), np.linspace(-1, 1, 32) * value]
    return np.stack(rows).astype(np.float32)


DATA: dict[str, Make] = {
    "random": lambda: blocks_of(np.random.default_rng(0), 400),
    "half way": half_way,
    "extremes": extremes,
}


def whole_blocks(x: np.ndarray, format: str) -> np.ndarray:
    """The rows of 32 values, two by two where a block of the format is larger."""
    n = max(32, mkv.formats.info(format).block_values)
    return x[: len(x) // 2 * 2].reshape(-1, n)


def rows_as(x: np.ndarray, kind: str) -> Any:
    if kind in PACKED:
        return mkv.quantize(x, kind)
    return x.astype({"f32": np.float32, "f16": np.float16}[kind])


def values(a: mkv.QuantizedArray) -> np.ndarray:
    return np.asarray(a)
