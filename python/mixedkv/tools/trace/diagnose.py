"""Guessing what went wrong: known mistakes are made on purpose, to see which one explains a trace.

A hypothesis is an output that a known mistake gives, or another reading of the recorded output. The
one that comes nearest is named, if it is near enough. Where none is, what is said is where the
error lies: heads, queries, and whether the queries that see every key are right.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arithmetic import Problem, attend_torch
from .format import StepData
from .masks import mistaken, visible
from .metrics import difference

Floats = NDArray[Any]

_MOST_F16_ERROR = 2e-2
"""Relative errors above are more than rounding in f16."""
_MOST_VALUES = 1 << 24
"""Of a step's keys, once for each query head, up to which mistakes are looked for."""
_MOST_ROLLED = 1 << 11
"""Keys up to which every rotation is tried: the time grows with their square."""
_MOST_SUMMED = 1 << 13
"""Keys up to which they are summed up one by one, to see what an f16 accumulator makes of them."""
_MOST_PRODUCTS = 1 << 25
"""Multiplications of one attention over some of a step's queries."""
_AS_NEAR = 2.0
"""Of two explanations, a later one must be nearer by this factor: the first is the likelier."""
_BY_POSITIONS = "the output fits the mask that the positions imply, not the recorded one"


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def diagnose(
    data: StepData,
    problem: Problem,
    want: NDArray[np.float64],
    tolerance: float,
    shown: NDArray[np.bool_] | None = None,
) -> list[str]:
    """Give lines that help to find a mistake: the best explanation, or where the error lies.

    Takes a few seconds at most: of a long step some queries are looked at, and a line says so.

    Parameters
    ----------
    want
        The right output [n, Hq, Dv].
    tolerance
        Relative error at which nothing is to be explained.
    shown
        Which keys the queries see by the positions [n, kv], cold keys first; None: not known.
    """
    out = data.out
    odd = np.flatnonzero(~np.isfinite(want).all((1, 2)))
    if odd.size:
        word = "query" if odd.size == 1 else "queries"
        return [
            f"the output of {word} {_ranges(odd)} should hold NaN or infinite values: recorded "
            "queries, keys or values that take part in it do"
        ]
    if not np.isfinite(out).all():
        return _where(problem, out, want, tolerance)
    if not out.any():
        return ["the output is all zero: it was never computed, or recorded before it was"]
    (kv_heads, kv, _), (heads, n, width) = problem.k.shape, problem.q.shape
    error = difference(out, want).relative
    # A right explanation leaves rounding (the output may well have been computed in f16), and far
    # less than there was: an error that is small anyway is explained by nothing.
    enough = min(max(tolerance, 1e-3), error / 10)
    readings = ((words, read, want) for words, read in _readings(out, kv_heads))
    if kv > (most := _MOST_VALUES // (heads * width)):
        cut = f"the step has {kv:,} keys, {most:,} at most are looked at"
        best, cuts = _best(readings, enough), [f"known mistakes were not tried: {cut}"]
        return [best] if best else [*_where(problem, out, want, tolerance), *cuts]
    most = max(1, _MOST_PRODUCTS // (heads * kv * (width + problem.v.shape[2])))
    worst = np.linalg.norm(out - want, axis=2).sum(1).argmax()
    picked = np.unique(np.append(np.linspace(0, n - 1, min(n, most)).astype(np.intp), worst))
    # The output is finite: what is not among keys and values is not seen.
    k, v = (np.nan_to_num(x, nan=0, posinf=0, neginf=0) for x in (problem.k, problem.v))
    some = replace(problem, q=problem.q[:, picked], k=k, v=v, mask=problem.mask[picked])
    got, right, cuts = out[picked], want[picked], []
    if len(picked) < n:
        cuts.append(f"known mistakes were tried on {len(picked)} of {n} queries")
    made = ((words, got, one) for words, one in _mistakes(some, problem, picked, shown))
    best = _best(itertools.chain(readings, made), enough)
    if best == _BY_POSITIONS and shown is not None:
        how = mistaken(visible(data), shown, problem.cold)
        best = f"{how or 'the recorded mask is wrong'}; {best}"
    if best is None and kv - problem.cold > _MOST_ROLLED:
        cut = f"it has {kv - problem.cold:,} keys"
        cuts.append(f"rotations of the hot part were not tried: {cut}")
    elif best is None:
        best = _rotation(some, got, right, enough)
    best = best or _rounding(some, got[-1], right[-1], error)
    return [best] if best else [*_where(problem, out, want, tolerance), *cuts]


def _best(tried: Iterable[tuple[str, Floats, Floats]], enough: float) -> str | None:
    """Name the explanation whose two outputs are nearest; None where none is near enough."""
    best, least = None, enough * _AS_NEAR
    for words, one, other in tried:
        left = difference(one, other).relative
        if left * _AS_NEAR <= least:
            best, least = words, left
    return best


def _readings(out: Floats, kv_heads: int) -> Iterator[tuple[str, Floats]]:
    """Other orders in which the output may lie in memory."""
    n, heads, width = out.shape
    for axes in itertools.permutations(range(3)):
        read = _as(out, *axes)
        if not np.array_equal(read, out):  # as is the given order, and those with an axis of one
            lies = "][".join(("query", "head", "dim")[axis] for axis in axes)
            yield f"the output is permuted: kqv_out lies as [{lies}] in memory", read
    group = heads // kv_heads
    for first, words in (
        (group, "lie as [group][kv head], [kv head][group] is wanted"),
        (kv_heads, "were [kv head][group], and were taken for [group][kv head]"),
    ):
        if min(group, kv_heads) > 1:
            read = out.reshape(n, first, -1, width).swapaxes(1, 2).reshape(out.shape)
            yield f"the output's heads are interleaved: they {words}", read


def _as(x: Floats, *axes: int) -> Floats:
    """Read an array's memory as if its axes lay there in this order."""
    shape = [x.shape[axis] for axis in axes]
    read: Floats = np.ascontiguousarray(x).reshape(shape).transpose(np.argsort(axes))
    return read


def _laid(x: Floats, *axes: int) -> Floats:
    """Lay an array's axes out in this order, and read the memory as if they were not."""
    return np.ascontiguousarray(x.transpose(axes)).reshape(x.shape)


_LAYOUTS = (
    ("fits the output when its memory is read as [key][head][dim]", _as, (1, 0, 2)),
    ("fits the output when it is laid out as [key][head][dim]", _laid, (1, 0, 2)),
    ("was read transposed: its memory holds it as [head][dim][key]", _as, (0, 2, 1)),
    ("was laid out as [head][dim][key] and read as [head][key][dim]", _laid, (0, 2, 1)),
)


def _mistakes(
    some: Problem, whole: Problem, picked: NDArray[np.intp], shown: NDArray[np.bool_] | None
) -> Iterator[tuple[str, Floats]]:
    """Make every known mistake on some queries. Of two that give the same, the likelier is first.

    Each is a problem that a right op gets wrong, but for those of joining tiers.
    """
    info, mask, cold, kv = some.info, some.mask, some.cold, some.k.shape[1]

    def attend(**changes: Any) -> Floats:
        return attend_torch(replace(some, **changes), torch.float32)

    def each(k: Floats, v: Floats, words: str) -> Iterator[tuple[str, Floats]]:
        """Other keys, other values, and both; their letters go into the words."""
        for letter, changes in (("K", {"k": k}), ("V", {"v": v}), ("K and V", {"k": k, "v": v})):
            yield words.format(letter), attend(**changes)

    if shown is not None:
        implied = np.where(shown[picked], 0, -np.inf).astype(np.float32)
        if not np.array_equal(implied, mask):
            yield _BY_POSITIONS, attend(mask=implied)
    if np.isneginf(mask).any():
        yield "the mask was ignored: every query saw every key", attend(mask=np.zeros_like(mask))
        late, early = np.roll(mask, 1, 1), np.roll(mask, -1, 1)
        late[:, 0], early[:, -1] = 0, -np.inf
        yield "the mask is one key too late", attend(mask=late)
        yield "the mask is one key too early", attend(mask=early)
        for axes, words in ((1, "keys"), (0, "queries"), ((0, 1), "keys and queries")):
            backwards = np.flip(whole.mask, axes)[picked]
            yield f"the mask is reversed: its {words} stand backwards", attend(mask=backwards)
    if 0 < cold < kv:
        words = "the mask's parts are exchanged: it was taken as hot then cold"
        yield words, attend(mask=np.roll(mask, cold, 1))
        yield from _of_tiers(some)
    heads, kv_heads = len(some.q), len(some.k)
    if heads > kv_heads > 1:
        own, tiled = np.arange(heads) * kv_heads // heads, np.arange(heads) % kv_heads
        words = (
            "query head h read kv head h % num_kv_heads; h // (num_qo_heads / num_kv_heads) is "
            "wanted (repeat_interleave, not tile)"
        )
        yield f"GQA is tiled: {words}", attend(k=some.k[tiled], v=some.v[tiled])
        yield f"GQA is tiled for K: {words}", attend(k=some.k[tiled], v=some.v[own])
        yield f"GQA is tiled for V: {words}", attend(k=some.k[own], v=some.v[tiled])
    parts = [(slice(0, kv), ""), (slice(0, cold), "the cold part of ")]
    parts.append((slice(cold, kv), "the hot part of "))
    for (part, where), (words, way, order) in itertools.product(
        parts if 0 < cold < kv else parts[:1], _LAYOUTS
    ):
        k, v = np.array(some.k), np.array(some.v)
        k[:, part], v[:, part] = way(k[:, part], *order), way(v[:, part], *order)
        if not np.array_equal(k, some.k, equal_nan=True):
            words = f"wrong strides: {where}{{}} {words}: a view's strides were dropped on the way"
            yield from each(k, v, words)
    q = whole.q.reshape(whole.q.shape[1], heads, -1).swapaxes(0, 1)[:, picked]
    if not np.array_equal(q, some.q):
        yield "wrong strides: Q was taken as [query][head][dim] in memory", attend(q=q)
    for words, scale in (
        ("left out (1 was used)", 1.0),
        ("1 / head_dim", 1.0 / info.head_dim),
        ("1 / sqrt(head_dim)", 1.0 / math.sqrt(info.head_dim)),
        ("applied twice", info.sm_scale**2),
    ):
        if not math.isclose(scale, info.sm_scale, rel_tol=1e-6):
            words = f"the scale of the logits is wrong: {words}; {info.sm_scale:.6g} is wanted"
            yield words, attend(info=replace(info, sm_scale=scale))
    if info.logits_soft_cap:
        words = "the soft cap of the logits was left out"
        yield words, attend(info=replace(info, logits_soft_cap=0.0))
    if info.sinks is not None:
        yield "the learned sinks were left out", attend(info=replace(info, sinks=None))
    if cold and info.head_dim % 32 == info.head_dim_v % 32 == 0:
        k, v = np.array(some.k), np.array(some.v)
        for rows in (k, v):
            blocks = rows[:, :cold].reshape(kv_heads, cold, -1, 2, 16)
            rows[:, :cold] = blocks.swapaxes(-1, -2).reshape(kv_heads, cold, -1)
        words = "in the wrong order: byte j of a block holds values j and j + 16, not 2j and 2j + 1"
        yield from each(k, v, f"the nibbles of {{}} in the cold part are {words}")


def _times(rows: Floats, others: Floats) -> Floats:
    """Multiply [Hq, n, a] by [Hkv, a, b]."""
    product = rows.reshape(len(others), -1, rows.shape[-1]) @ others
    return np.reshape(product, (*rows.shape[:2], -1))


def _logits(some: Problem, q: Floats) -> Floats:
    """Give the logits of queries [Hq, n, D] as [Hq, n, kv], before the mask."""
    cap = some.info.logits_soft_cap
    x: Floats = _times(q, some.k.swapaxes(1, 2)) * np.float32(some.info.sm_scale)
    if cap:
        x = np.float32(cap) * np.tanh(x / np.float32(cap))
    return x


def _of_tiers(some: Problem) -> Iterator[tuple[str, Floats]]:
    """Tiers left out, attended twice, or joined wrongly."""
    masked = _logits(some, some.q) + some.mask
    parts = []
    for cut in (slice(some.cold), slice(some.cold, None)):
        most = masked[..., cut].max(-1, keepdims=True)
        p = np.exp(masked[..., cut] - np.maximum(most, -1e30))
        parts += [_times(p, some.v[:, cut]), p.sum(-1, keepdims=True), most]
    a, s, m, b, t, n = parts  # acc, S and M of the cold part, and of the hot one
    top = np.maximum(np.maximum(m, n), -1e30)
    u, w = np.exp(m - top), np.exp(n - top)  # what brings each to one maximum
    acc, total = a * u + b * w, s * u + t * w
    average = np.where((s > 0) & (t > 0), (a / s + b / t) / 2 * total, acc)
    sinks = 0.0
    if some.info.sinks is not None:
        sinks = np.exp(np.array(some.info.sinks, np.float32)[:, None, None] - top)
    reset = "the accumulator was reset after the {} part, while its sum of weights was kept"
    unscaled = "tiers were joined without scaling the accumulator{} to one maximum"
    for words, made, sums in (
        ("the cold part was not attended", b * w, t * w),
        ("the hot part was not attended", a * u, s * u),
        ("the cold part was attended twice", acc + a * u, total + s * u),
        ("the hot part was attended twice", acc + b * w, total + t * w),
        ("the tiers' results were averaged, not weighed by their sums", average, total),
        (reset.format("cold"), b * w, total),
        (reset.format("hot"), a * u, total),
        (unscaled.format(" and sum"), a + b, s + t),
        (unscaled.format(""), a + b * w, total),
        (unscaled.format(""), a * u + b, total),
    ):
        yield words, np.where(sums > 0, made / (sums + sinks), 0).swapaxes(0, 1)


def _rotation(some: Problem, got: Floats, want: Floats, enough: float) -> str | None:
    """Find the order in which the hot part stands: rotated, as a ring buffer is, or reversed.

    One head of one query, the one that is farthest off, tells which order it might be; all queries
    that were picked, whether it is.
    """
    cold, hot, info = some.cold, some.k.shape[1] - some.cold, some.info
    row, head = np.unravel_index(np.linalg.norm(got - want, axis=2).argmax(), got.shape[:2])
    x = _logits(some, some.q[:, row, None])[head, 0]
    v, mask = some.v[head // (len(some.q) // len(some.k))], some.mask[row]
    orders = (np.arange(hot) - np.arange(hot)[:, None]) % hot
    orders[0] = orders[0, ::-1]  # stands for the reverse
    tried = []
    for letter, against in (("K", "V"), ("V", "K"), ("K and V", "the mask")):
        logits = np.repeat((x + mask)[None], hot, 0)
        if letter == "K":
            logits[:, cold:] = x[cold:][orders] + mask[cold:]
        elif letter == "V":  # what the rows are weighed by goes the other way round
            logits[:, cold:] = logits[0, cold:][np.argsort(orders, 1)]
        else:
            logits[:, cold:] = x[cold:] + mask[cold:][np.argsort(orders, 1)]
        most = np.maximum(logits.max(1, keepdims=True), -1e30)
        p = np.exp(logits - most)
        total = p.sum(1, keepdims=True) + (np.exp(info.sinks[head] - most) if info.sinks else 0)
        errors = np.linalg.norm(p @ v / np.maximum(total, 1e-30) - got[row, head], axis=1)
        for index in np.argsort(errors, kind="stable")[:2]:
            order = np.append(np.arange(cold), cold + orders[index])
            made = replace(
                some,
                k=some.k[:, order] if "K" in letter else some.k,
                v=some.v[:, order] if "V" in letter else some.v,
            )
            how = f"rotated by {index} keys" if index else "reversed"
            words = f"the hot part is ordered wrongly: its {letter} stand {how} against {against}"
            tried.append((words, got, attend_torch(made, torch.float32)))
    return _best(tried, enough)


def _rounding(some: Problem, got: Floats, want: Floats, error: float) -> str | None:
    """Recognise rounding in f16, which is no mistake, and costs what it costs.

    The last query is computed key by key, as ggml's CPU code does for f16 keys and values: the
    query is rounded to f16, logits and their sum are float32, the accumulator is f16.
    """
    keys = np.flatnonzero(~np.isneginf(some.mask[-1]))
    if len(keys) > _MOST_SUMMED or error > _MOST_F16_ERROR:
        return None
    if some.info.logits_soft_cap or some.info.sinks is not None:
        return None
    logits = _logits(some, some.q[:, -1:].astype(np.float16).astype(np.float32))[:, 0]
    values = some.v.repeat(len(logits) // len(some.v), 0)
    most, total = np.full((len(logits), 1), -np.inf, np.float32), np.float32(0)
    acc = np.zeros((len(logits), values.shape[2]), np.float16)
    for key in keys:
        x = logits[:, key, None] + some.mask[-1, key]
        new = np.maximum(most, x)
        shrink, weight = np.exp(most - new), np.exp(x - new)
        acc = (acc * shrink).astype(np.float16)
        acc = (acc + values[:, key] * weight).astype(np.float16)
        total, most = total * shrink + weight, new
    made = acc / np.maximum(total, 1e-30)
    if difference(got, made).relative > difference(got, want).relative / 4:
        return None
    return (
        "an f16 accumulator: the output is what rounding the query and each partial sum of values "
        f"to f16 gives; that alone costs {error:.2g} here"
    )


def _where(problem: Problem, out: Floats, want: Floats, tolerance: float) -> list[str]:
    """Say where the error lies, when nothing explains it."""
    error = np.nan_to_num(np.linalg.norm(out - want, axis=2), nan=np.inf)
    size = np.linalg.norm(want, axis=2)
    wrong = ~(error <= tolerance * np.maximum(size, 1e-30))
    if not wrong.any():
        return ["every head of every query is near, single elements are off"]
    lines = ["no known mistake explains it"]
    for one, several, hit in (("head", "heads", wrong.any(0)), ("query", "queries", wrong.any(1))):
        if hit.all():
            lines[0] += f"; all {several} are off" if len(hit) > 1 else f"; the one {one} is off"
        else:
            word, verb = (one, "is") if hit.sum() == 1 else (several, "are")
            lines[0] += f"; {word} {_ranges(np.flatnonzero(hit))} of 0-{len(hit) - 1} {verb} off"
    hidden = np.isneginf(problem.mask)
    sees_all = ~hidden[:, ~hidden.all(0)].any(1)  # every key that anyone sees
    if sees_all.any() and wrong[~sees_all].any() and not wrong[sees_all].any():
        lines.append(
            "queries that see every key are right, others are not: the mask was not applied as "
            "recorded, or the keys stand in another order than its columns"
        )
    query, head = np.unravel_index(error.argmax(), error.shape)
    where = f"query {query}, head {head}, error {error[query, head]:.3g}"
    return [*lines, f"worst: {where} at a norm of {size[query, head]:.3g}"]


def _ranges(indices: NDArray[np.intp]) -> str:
    """Write 0,1,2,5 as 0-2, 5."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:6]]
    return ", ".join(words) + (", ..." if len(runs) > 6 else "")
