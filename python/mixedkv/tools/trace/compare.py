"""The op three ways on the same numbers: whole, segmented, and by PyTorch.

Whole is one call of `mixedkv.attention`; segmented carries a state over several runs of keys;
PyTorch is `scaled_dot_product_attention` in float32 on what the same stored keys and values stand
for. The verdict is FAIL when any of the three pairs is out of tolerance.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .arithmetic import MOST_HELD, Problem, attend_torch
from .format import LayerInfo
from .layout import watched
from .metrics import Difference, difference
from .stored import Rows, as_float32, converted

PAIRS = (("whole", "segmented"), ("whole", "torch"), ("segmented", "torch"))

FLOAT_ABSOLUTE = 1e-5
FLOAT_RELATIVE = 1e-5
BLOCK_RELATIVE = 1e-3
"""Segmented against whole is held to 1e-5 of each element, either against PyTorch to 1e-5 of the
norm; where a format of blocks takes part, such as Q4_0, to 1e-3 of the norm."""

MOST_LOGITS = 1 << 28
"""Query heads times queries times keys: seconds of work for each of the three ways."""
MOST_BYTES = 1 << 30
"""Memory that a comparison may take, all arrays of the three ways together."""
_KEY_BYTES = 20
_QUERY_BYTES = 64
_BLOCK_BYTES = 16 * MOST_HELD
"""At most for a value of the keys and values (as stored, in float32 for PyTorch, and while they are
made), for a value of the queries (three outputs, states, differences in float64), for the logits
that PyTorch holds at a time and their mask."""


@dataclass(frozen=True)
class Settings:
    """Shapes and options.

    Attributes
    ----------
    segments
        Runs of keys that the state is carried over.
    causal
        The last query stands at the last key.
    tolerance_abs, tolerance_rel
        In place of the defaults: of each element, of the norm.
    """

    num_qo_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    qo_len: int = 16
    kv_len: int = 512
    segments: int = 4
    k_type: str = "f16"
    v_type: str = "f16"
    causal: bool = True
    seed: int = 42
    tolerance_abs: float | None = None
    tolerance_rel: float | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be computed, or takes too long or too much memory."""
        qo_heads, kv_heads, width = self.num_qo_heads, self.num_kv_heads, self.head_dim
        qo_len, kv_len, types = self.qo_len, self.kv_len, (self.k_type, self.v_type)
        for name in ("num_qo_heads", "num_kv_heads", "head_dim", "qo_len", "kv_len", "segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("tolerance_abs", "tolerance_rel"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name, value in zip(("k_type", "v_type"), types, strict=True):
            known = mkv.formats.available()
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        logits, keys, queries = qo_heads * qo_len * kv_len, kv_heads * kv_len, qo_heads * qo_len
        names = ("num_kv_heads", "kv_len", kv_heads, kv_len)
        if _KEY_BYTES * keys < _QUERY_BYTES * queries:
            names = ("num_qo_heads", "qo_len", qo_heads, qo_len)
        for wrong, words in (
            (
                qo_heads % kv_heads,
                f"num_qo_heads must be a multiple of num_kv_heads, got {qo_heads} and {kv_heads}",
            ),
            (
                self.segments > kv_len,
                f"segments {self.segments} is more than kv_len {kv_len}: some would be empty",
            ),
            (
                self.causal and qo_len > kv_len,
                f"qo_len {qo_len} is more than kv_len {kv_len}: with a causal mask some queries "
                "would see nothing",
            ),
            *(
                (
                    width % one.block_values,
                    f"{one.name} wants a multiple of {one.block_values}; head_dim is {width}",
                )
                for one in map(mkv.formats.info, types)
            ),
            (
                logits > MOST_LOGITS,
                f"num_qo_heads {qo_heads} times qo_len {qo_len} times kv_len {kv_len} are "
                f"{logits:,} logits, more than {MOST_LOGITS:,}",
            ),
            (
                self.bytes_needed > MOST_BYTES,
                f"{names[0]} {names[2]} times {names[1]} {names[3]} times head_dim {width} take "
                f"{self.bytes_needed / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:.0f} GiB",
            ),
        ):
            if wrong:
                raise ValueError(words)

    @property
    def bytes_needed(self) -> int:
        """An upper bound of the memory that comparing takes."""
        rows = _KEY_BYTES * self.num_kv_heads * self.kv_len
        rows += _QUERY_BYTES * self.num_qo_heads * self.qo_len
        return rows * self.head_dim + _BLOCK_BYTES


@dataclass(frozen=True)
class Pair:
    """Two of the three ways.

    Attributes
    ----------
    above
        Elements that are off by more than the absolute tolerance.
    """

    a: str
    b: str
    found: Difference
    above: int
    tolerance_abs: float
    tolerance_rel: float | None
    passed: bool


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes
    ----------
    outputs
        whole, segmented, torch -> [Hq, n, D] float32.
    M, S
        Smallest and largest of the carried state, after the last segment.
    """

    settings: Settings
    outputs: dict[str, NDArray[np.float32]]
    pairs: list[Pair]
    M: tuple[float, float]
    S: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Whether all pairs were in tolerance."""
        return all(pair.passed for pair in self.pairs)

    def elements(self, count: int = 128) -> list[tuple[float, ...]]:
        """Give the first elements: whole, segmented, torch, and the differences of `PAIRS`."""
        flat = {name: out.ravel()[:count].astype(np.float64) for name, out in self.outputs.items()}
        columns = [flat["whole"], flat["segmented"], flat["torch"]]
        columns += [flat[a] - flat[b] for a, b in PAIRS]
        return [tuple(float(x) for x in row) for row in zip(*columns, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "mixedkv": mkv.__version__,
            "torch": torch.__version__,
            "isa": mkv.isa.active(),
            "settings": dataclasses.asdict(self.settings),
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "M": list(self.M),
            "S": list(self.S),
            "passed": self.passed,
        }


def compare(settings: Settings) -> Comparison:
    """Compute three ways and judge the three pairs."""
    rng = np.random.default_rng(settings.seed)

    def normal(heads: int, length: int) -> NDArray[np.float32]:
        return rng.standard_normal((heads, length, settings.head_dim), dtype=np.float32)

    q = watched("q", normal(settings.num_qo_heads, settings.qo_len))
    k = watched("k", converted(normal(settings.num_kv_heads, settings.kv_len), settings.k_type))
    v = watched("v", converted(normal(settings.num_kv_heads, settings.kv_len), settings.v_type))
    # The last query stands at the last key.
    q_start = settings.kv_len - settings.qo_len
    whole = mkv.attention(q, k, v, causal=settings.causal)

    state = mkv.AttentionState(settings.num_qo_heads, settings.qo_len, settings.head_dim)
    bounds = np.linspace(0, settings.kv_len, settings.segments + 1).astype(int).tolist()
    for begin, end in itertools.pairwise(bounds):
        state.update(
            q,
            k[:, begin:end],
            v[:, begin:end],
            causal=settings.causal,
            q_start=q_start,
            kv_start=begin,
        )
    segmented = state.finalize()

    by_torch = attend_torch(problem_of(settings, q, k, v), torch.float32)
    outputs = {
        "whole": watched("whole", np.asarray(whole)),
        "segmented": watched("segmented", np.asarray(segmented)),
        "torch": watched("torch", by_torch.transpose(1, 0, 2).astype(np.float32)),
    }
    return Comparison(
        settings,
        outputs,
        [_judge(settings, outputs, a, b) for a, b in PAIRS],
        (float(state.M.min()), float(state.M.max())),
        (float(state.S.min()), float(state.S.max())),
    )


def problem_of(settings: Settings, q: NDArray[np.float32], k: Rows, v: Rows) -> Problem:
    """Give what PyTorch computes. Its mask is a view of one row, however many it has."""
    n, kv, width = settings.qo_len, settings.kv_len, settings.head_dim
    row = np.zeros(n + kv - 1, np.float32)
    if settings.causal:  # the last query stands at the last key
        row[kv:] = -np.inf
    info = LayerInfo(settings.num_qo_heads, settings.num_kv_heads, width, width, width**-0.5)
    mask = np.lib.stride_tricks.sliding_window_view(row, kv)[::-1]
    return Problem(q, as_float32(k), as_float32(v), mask, 0, info)


def _judge(settings: Settings, outputs: dict[str, NDArray[np.float32]], a: str, b: str) -> Pair:
    found = difference(outputs[a], outputs[b])
    types = map(mkv.formats.info, (settings.k_type, settings.v_type))
    quantised = any(one.block_values > 1 for one in types)
    # Elements of values of a standard deviation of 1; larger ones round in proportion.
    absolute = (BLOCK_RELATIVE if quantised else FLOAT_ABSOLUTE) * max(found.scale, 1.0)
    relative = BLOCK_RELATIVE if quantised else None if b == "segmented" else FLOAT_RELATIVE
    absolute = absolute if settings.tolerance_abs is None else settings.tolerance_abs
    relative = relative if settings.tolerance_rel is None else settings.tolerance_rel
    off = np.abs(outputs[a].astype(np.float64) - outputs[b].astype(np.float64))
    above = int((~(off <= absolute)).sum())
    passed = above == 0 and (relative is None or found.relative <= relative)
    return Pair(a, b, found, above, absolute, relative, passed)
