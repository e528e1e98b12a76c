"""Known mistakes, made on purpose: what a step's output is when attention goes wrong in one way.

Each is made on a sample of a step's heads and queries, so that looking for them takes a bounded
time however long the step is. They come in kinds: heads, layouts, masks, tiers, logits, blocks.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arithmetic import Problem

Output = NDArray[np.float32]
Mistake = tuple[str, Output]
"""What was done wrong, in words, and the sample's output [queries, heads, Dv] if it was."""

_MOST_PRODUCTS = 1 << 25
"""Multiplications of one attention over a sample."""
_MOST_GATHERED = 1 << 24
"""Numbers of K that a sample's heads hold together."""
_MOST_HEADS = 12


class Sample:
    """Some heads and queries of a step, with all of their keys.

    Attributes
    ----------
    heads, queries
        Which of the step's, in order; those that are farthest off are among them.
    whole
        All of the step is in it.
    """

    def __init__(self, problem: Problem, error: NDArray[np.float64]) -> None:
        """Pick by `error`, the rows' [n, Hq]."""
        self.problem = problem
        count, n, width = problem.q.shape
        self.kv_heads, self.kv, _ = problem.k.shape
        self.ratio = count // self.kv_heads
        self.cold = problem.cold
        row = self.kv * (width + problem.v.shape[2])
        most = max(2, min(_MOST_HEADS, _MOST_GATHERED // max(1, row)))
        # Head 1 is one that tiling gives another kv head; the first and the last keep theirs.
        worst = int(error.sum(0).argmax())
        self.heads = _spread(count, most, [worst, min(1, count - 1)])
        most = max(1, _MOST_PRODUCTS // (row * len(self.heads)))
        self.queries = _spread(n, most, [int(error[:, self.heads].sum(1).argmax())])
        self.whole = len(self.heads) == count and len(self.queries) == n
        self.of_kv = self.heads // self.ratio
        self.q: NDArray[np.float32] = problem.q[self.heads][:, self.queries]
        # The output is finite: what is not among keys and values is not seen.
        self.k = _numbers(problem.k[self.of_kv])
        self.v = _numbers(problem.v[self.of_kv])
        self.mask: NDArray[np.float32] = problem.mask[self.queries]
        self.x = self.logits(self.q, self.k)
        info = problem.info
        self.sinks = None
        if info.sinks is not None:
            self.sinks = np.array(info.sinks, np.float32)[self.heads]

    def of(self, out: NDArray[Any]) -> NDArray[Any]:
        """Take the sample out of an output [n, Hq, Dv]."""
        taken: NDArray[Any] = out[self.queries][:, self.heads]
        return taken

    def logits(
        self,
        q: NDArray[np.float32],
        k: NDArray[np.float32],
        scale: float | None = None,
        cap: float | None = None,
    ) -> NDArray[np.float32]:
        """Give the logits [heads, queries, kv] before the mask."""
        info = self.problem.info
        scale = info.sm_scale if scale is None else scale
        cap = info.logits_soft_cap if cap is None else cap
        x: NDArray[np.float32] = _product(q, np.swapaxes(k, 1, 2)) * np.float32(scale)
        return np.float32(cap) * np.tanh(x / np.float32(cap)) if cap else x

    def attend(
        self,
        x: NDArray[np.float32] | None = None,
        v: NDArray[np.float32] | None = None,
        mask: NDArray[np.float32] | None = None,
        *,
        sinks: bool = True,
    ) -> Output:
        """Give the output [queries, heads, Dv] of logits, values and a mask; None: the right."""
        masked = (self.x if x is None else x) + (self.mask if mask is None else mask)
        acc, total, largest = self.parts(masked, self.v if v is None else v)
        return self.finish(acc, total, largest, sinks=sinks)

    def parts(
        self, masked: NDArray[np.float32], v: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Give acc [heads, queries, Dv], S and M [heads, queries, 1]; M is -inf without a key."""
        largest = masked.max(-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore", over="ignore"):
            p = np.exp(masked - np.where(np.isneginf(largest), 0, largest))
        return _product(p, v), p.sum(-1, keepdims=True), largest

    def finish(
        self,
        acc: NDArray[np.float32],
        total: NDArray[np.float32],
        largest: NDArray[np.float32],
        *,
        sinks: bool = True,
    ) -> Output:
        """Divide acc by S, with the sinks in it where there are any."""
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if sinks and self.sinks is not None:
                total = total + np.exp(self.sinks[:, None, None] - largest)
            out = np.where(total > 0, acc / total, 0)
        return np.ascontiguousarray(out.swapaxes(0, 1), np.float32)


def _spread(count: int, most: int, wanted: list[int]) -> NDArray[np.intp]:
    """Give at most `most` (but all wanted) of `count` indices, from the first to the last."""
    if count <= most:
        return np.arange(count)
    wanted = sorted(set(wanted))
    others = np.linspace(0, count - 1, max(0, most - len(wanted))).astype(np.intp)
    return np.unique(np.concatenate([others, np.array(wanted, np.intp)]))


def _numbers(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.nan_to_num(rows, nan=0, posinf=0, neginf=0)
    return found


def _product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return product


def mistakes(sample: Sample, shown: NDArray[np.bool_] | None) -> Iterator[Mistake]:
    """Make every known mistake. Of two that give the same, the likelier comes first.

    Parameters
    ----------
    shown
        Which keys the step's queries see by the positions [n, kv], where that is known.
    """
    yield from _of_masks(sample, shown)
    yield from _of_tiers(sample)
    yield from _of_heads(sample)
    yield from _of_layouts(sample)
    yield from _of_logits(sample)
    yield from _of_blocks(sample)


MASK_BY_POSITIONS = "the output fits the mask that the positions imply, not the recorded one"


def _of_masks(sample: Sample, shown: NDArray[np.bool_] | None) -> Iterator[Mistake]:
    mask, cold, kv = sample.mask, sample.cold, sample.kv
    if shown is not None:
        right = np.where(shown[sample.queries], 0, -np.inf).astype(np.float32)
        if not np.array_equal(right, mask):
            yield MASK_BY_POSITIONS, sample.attend(mask=right)
    if np.isneginf(mask).any():
        words = "the mask was ignored: every query saw every key"
        yield words, sample.attend(mask=np.zeros_like(mask))
        for by, words in ((1, "late"), (-1, "early")):
            shifted = np.roll(mask, by, 1)
            shifted[:, 0 if by > 0 else -1] = 0.0 if by > 0 else -np.inf
            yield f"the mask is one key too {words}", sample.attend(mask=shifted)
        for axes, words in ((1, "keys"), (0, "queries"), ((0, 1), "keys and queries")):
            whole = np.flip(sample.problem.mask, axes)[sample.queries]
            words = f"the mask is reversed: its {words} stand backwards"
            yield words, sample.attend(mask=whole)
    if 0 < cold < kv:
        swapped = np.concatenate([mask[:, kv - cold :], mask[:, : kv - cold]], 1)
        if not np.array_equal(swapped, mask):
            words = (
                "the mask's parts are exchanged: it was taken as hot then cold, cold then hot is "
                "wanted"
            )
            yield words, sample.attend(mask=swapped)


def _of_tiers(sample: Sample) -> Iterator[Mistake]:
    """Tiers left out, attended twice, or joined wrongly."""
    cold, kv = sample.cold, sample.kv
    if not 0 < cold < kv:
        return
    masked = sample.x + sample.mask
    names = ("cold", "hot")
    cuts = (slice(0, cold), slice(cold, kv))
    (a, s, m), (b, t, n) = (sample.parts(masked[..., cut], sample.v[:, cut]) for cut in cuts)
    yield "the cold part was not attended", sample.finish(b, t, n)
    yield "the hot part was not attended", sample.finish(a, s, m)
    for name, cut in zip(names, cuts, strict=True):
        twice = np.array(sample.mask)
        twice[:, cut] += np.float32(math.log(2))
        yield f"the {name} part was attended twice", sample.attend(mask=twice)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = np.maximum(m, n)
        top = np.where(np.isneginf(top), 0, top)
        of_cold, of_hot = np.exp(m - top), np.exp(n - top)
        total = s * of_cold + t * of_hot
        both = (s > 0) & (t > 0)
        average = np.where(both, (a / s + b / t) / 2, (a * of_cold + b * of_hot) / total)
        average = np.ascontiguousarray(np.nan_to_num(average).swapaxes(0, 1), np.float32)
    yield (
        "the tiers' results were averaged: each counts by its own sum of weights, not as one half",
        average,
    )
    for name, kept in (("cold", b * of_hot), ("hot", a * of_cold)):
        yield (
            f"the accumulator was reset after the {name} part, while its sum of weights was kept",
            sample.finish(kept, total, top),
        )
    # Where the maximum moves from one tier to the next, what was summed up must shrink with it.
    for words, acc, sums in (
        ("accumulator and sum", a + b, s + t),
        ("accumulator", a + b, total),
        ("accumulator", a + b * of_hot, total),
        ("accumulator and sum", a + b * of_hot, s + t * of_hot),
        ("accumulator", a * of_cold + b, total),
        ("accumulator and sum", a * of_cold + b, s * of_cold + t),
    ):
        yield (
            f"tiers were joined without scaling the {words} to one maximum",
            sample.finish(acc, sums, top),
        )


def _of_heads(sample: Sample) -> Iterator[Mistake]:
    """Query heads that read another kv head than theirs."""
    if sample.ratio == 1 or sample.kv_heads == 1:
        return
    tiled = sample.heads % sample.kv_heads
    k, v = (_numbers(rows[tiled]) for rows in (sample.problem.k, sample.problem.v))
    x = sample.logits(sample.q, k)
    for letter, logits, values in (("", x, v), (" for K", x, None), (" for V", None, v)):
        yield (
            f"GQA is tiled{letter}: query head h read kv head h % num_kv_heads; "
            "h // (num_qo_heads / num_kv_heads) is wanted (repeat_interleave, not tile)",
            sample.attend(logits, values),
        )


_LAID = (
    ("fits the output when its memory is read as [key][head][dim]", "nhd"),
    ("fits the output when it is laid out as [key][head][dim] and read as [head][key][dim]", "hnd"),
    ("was read transposed: it fits the output when its memory is read as [head][dim][key]", "dk"),
    ("was laid out as [head][dim][key] and read as [head][key][dim]", "kd"),
)


def _of_layouts(sample: Sample) -> Iterator[Mistake]:
    """Strides of K, V or Q that were dropped or taken for others."""
    problem, cold, kv = sample.problem, sample.cold, sample.kv
    everything = slice(0, kv)
    parts = [(everything, "")]
    if 0 < cold < kv:
        parts += [(slice(0, cold), "the cold part of "), (slice(cold, kv), "the hot part of ")]
    for (part, where), (words, way) in itertools.product(parts, _LAID):
        k, v = sample.k, sample.v
        if way in ("nhd", "hnd") and (sample.kv_heads == 1 or part.stop - part.start == 1):
            continue
        if way in ("nhd", "hnd") or part.stop - part.start > 1:
            k, v = np.array(k), np.array(v)
            k[:, part] = _read(problem.k[:, part], sample.of_kv, way)
            v[:, part] = _read(problem.v[:, part], sample.of_kv, way)
        x = sample.logits(sample.q, k)
        for letter, logits, values in (("K", x, None), ("V", None, v), ("K and V", x, v)):
            yield (
                f"wrong strides: {where}{letter} {words} (the strides of a view were dropped "
                "between the cache and the trace, or in the op)",
                sample.attend(logits, values),
            )
    count, n, width = problem.q.shape
    if n > 1 and count > 1:
        q = np.ascontiguousarray(problem.q).reshape(n, count, width).transpose(1, 0, 2)
        q = q[sample.heads][:, sample.queries]
        yield (
            "wrong strides: Q was taken as [query][head][dim] in memory, [head][query][dim] is "
            "wanted",
            sample.attend(sample.logits(q, sample.k)),
        )


def _read(rows: NDArray[np.float32], heads: NDArray[np.intp], way: str) -> NDArray[np.float32]:
    """Give heads of [head, key, dim] rows as they are when their memory is read another way."""
    count, kv, width = rows.shape
    at = heads[:, None] * kv + np.arange(kv)  # rows' places in the memory of the whole
    read: NDArray[np.float32]
    if way == "nhd":
        place = np.arange(kv) * count + heads[:, None]
        read = rows[place // kv, place % kv]
    elif way == "hnd":
        read = rows[at % count, at // count]
    elif way == "dk":
        read = np.ascontiguousarray(rows[heads]).reshape(-1, width, kv).swapaxes(1, 2)
    else:
        read = np.ascontiguousarray(rows[heads].swapaxes(1, 2)).reshape(-1, kv, width)
    return _numbers(read)


def _of_logits(sample: Sample) -> Iterator[Mistake]:
    """Another scale, no cap, no sinks."""
    info = sample.problem.info
    width = info.head_dim
    for words, scale in (
        ("left out (1 was used)", 1.0),
        ("1 / head_dim", 1.0 / width),
        ("1 / sqrt(head_dim)", 1.0 / math.sqrt(width)),
        ("applied twice", info.sm_scale**2),
    ):
        if not math.isclose(scale, info.sm_scale, rel_tol=1e-6):
            yield (
                f"the scale of the logits is wrong: {words}; {info.sm_scale:.6g} is wanted",
                sample.attend(sample.logits(sample.q, sample.k, scale)),
            )
    if info.logits_soft_cap:
        yield (
            "the soft cap of the logits was left out",
            sample.attend(sample.logits(sample.q, sample.k, cap=0.0)),
        )
    if info.sinks is not None:
        yield "the learned sinks were left out", sample.attend(sinks=False)


def _of_blocks(sample: Sample) -> Iterator[Mistake]:
    """Nibbles of Q4_0 blocks in the order of the bytes."""
    cold = sample.cold
    if not cold or sample.k.shape[2] % 32 or sample.v.shape[2] % 32:
        return
    k, v = np.array(sample.k), np.array(sample.v)
    k[:, :cold], v[:, :cold] = _paired(k[:, :cold]), _paired(v[:, :cold])
    x = sample.logits(sample.q, k)
    for letter, logits, values in (("K", x, None), ("V", None, v), ("K and V", x, v)):
        yield (
            f"the nibbles of {letter} in the cold part are in the wrong order: byte j of a block "
            "holds values j and j + 16, not 2j and 2j + 1",
            sample.attend(logits, values),
        )


def _paired(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring each block from the order (j, j + 16) to (2j, 2j + 1)."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 2, 16)
    return np.ascontiguousarray(blocks.swapaxes(-1, -2)).reshape(rows.shape)
