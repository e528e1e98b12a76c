"""Guessing what went wrong: known mistakes are made on purpose, to see which one explains a trace.

A hypothesis is an output that a known mistake gives, or another reading of the recorded output. The
one that comes nearest is named, if it is near enough. Where none is, what is said is where the
error lies: heads, queries, and whether the queries that see every key are right.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Problem
from .format import StepData
from .masks import mistaken, visible
from .metrics import difference
from .mistakes import MASK_BY_POSITIONS, Sample, mistakes

_MOST_F16_ERROR = 2e-2
"""Relative errors above are more than rounding in f16."""
_MOST_KEYS = 1 << 16
"""Of a step in which mistakes are looked for."""
_MOST_SUMMED = 1 << 13
"""Keys that are summed up one by one, to see what an f16 accumulator makes of them."""
_MOST_ROLLED = 1 << 12
"""Keys up to which every rotation of the hot part is tried: the time grows with their square."""
_ROLLED_TOGETHER = 512
_AS_NEAR = 2.0
"""Of two explanations, a later one must be nearer by this factor: the first is the likelier."""


def diagnose(
    data: StepData,
    problem: Problem,
    want: NDArray[np.float64],
    tolerance: float,
    shown: NDArray[np.bool_] | None = None,
) -> list[str]:
    """Give lines that help to find a mistake: the best explanation, or where the error lies.

    Takes a bounded time, a few seconds at most: of a long step some heads and queries are looked
    at, and a line says so.

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
    kv = problem.k.shape[1]
    if kv > _MOST_KEYS:
        best = _best(
            _readings(out, problem.k.shape[0]), out, want, difference(out, want).relative, tolerance
        )
        cut = (
            f"known mistakes were not tried: the step has {kv:,} keys, {_MOST_KEYS:,} at most are "
            "looked at"
        )
        return [best] if best else [*_where(problem, out, want, tolerance), cut]
    with np.errstate(invalid="ignore", over="ignore"):
        sample = Sample(problem, np.nan_to_num(np.linalg.norm(out - want, axis=2)))
    got, right = sample.of(out), sample.of(want)
    error = difference(got, right).relative
    cuts = []
    if not sample.whole:
        cuts.append(
            f"known mistakes were tried on {len(sample.heads)} of {out.shape[1]} heads and "
            f"{len(sample.queries)} of {out.shape[0]} queries"
        )
    readings = ((words, sample.of(read)) for words, read in _readings(out, problem.k.shape[0]))
    best = _best(readings, got, right, error, tolerance, mistakes(sample, shown))
    if best == MASK_BY_POSITIONS and shown is not None:
        how = mistaken(visible(data), shown, problem.cold)
        best = f"{how or 'the recorded mask is wrong'}; {best}"
    if best is None:
        hot = kv - problem.cold
        if hot > _MOST_ROLLED:
            cuts.append(f"rotations of the hot part were not tried: it has {hot:,} keys")
        else:
            best = _rotation(sample, got, right, _enough(error, tolerance))
    if best is None:
        best = _rounding(sample, got, right, difference(out, want).relative)
    return [best] if best else [*_where(problem, out, want, tolerance), *cuts]


def _enough(error: float, tolerance: float) -> float:
    """Give the relative error at which a hypothesis explains an output that is off by `error`.

    A right explanation leaves rounding (the output may well have been computed in f16), and far
    less than there was: an error that is small anyway is explained by nothing.
    """
    return min(max(tolerance, 1e-3), error / 10)


def _best(
    readings: Iterable[tuple[str, NDArray[np.float32]]],
    got: NDArray[np.float32],
    want: NDArray[np.float64],
    error: float,
    tolerance: float,
    made: Iterable[tuple[str, NDArray[np.float32]]] = (),
) -> str | None:
    """Name the explanation that leaves least; None where each leaves too much."""
    best, least = None, _enough(error, tolerance) * _AS_NEAR
    for words, left in itertools.chain(
        ((words, difference(read, want).relative) for words, read in readings),
        ((words, difference(got, one).relative) for words, one in made),
    ):
        if left * _AS_NEAR <= least:
            best, least = words, left
    return best


def _readings(out: NDArray[np.float32], kv_heads: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Other orders in which the output may lie in memory."""
    n, heads, width = out.shape
    names = ("query", "head", "dim")
    sizes = (n, heads, width)
    flat = np.ascontiguousarray(out).ravel()
    for order in itertools.permutations(range(3)):
        if order == (0, 1, 2):
            continue
        read = flat.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order))
        if np.array_equal(read, out):
            continue  # an axis of one: the same thing
        lies = "][".join(names[axis] for axis in order)
        yield (
            f"the output is permuted: kqv_out lies as [{lies}] in memory, [query][head][dim] is "
            "wanted",
            read,
        )
    group = heads // kv_heads
    if min(group, kv_heads) > 1:
        for (a, b), words in (
            ((group, kv_heads), "lie as [group][kv head], [kv head][group] is wanted"),
            ((kv_heads, group), "were [kv head][group], and were taken for [group][kv head]"),
        ):
            read = out.reshape(n, a, b, width).swapaxes(1, 2).reshape(out.shape)
            yield f"the output's heads are interleaved: they {words}", read


def _rotation(
    sample: Sample, got: NDArray[np.float32], want: NDArray[np.float64], enough: float
) -> str | None:
    """Find the order in which the hot part stands: rotated, as a ring buffer is, or reversed.

    One head of one query, the one that is farthest off, tells which order it might be; the whole
    sample whether it is.
    """
    cold, kv = sample.cold, sample.kv
    hot = kv - cold
    if hot < 2:
        return None
    found: list[tuple[float, str]] = []
    orders = [np.arange(hot)[::-1], *(np.roll(np.arange(hot), by) for by in range(1, hot))]
    names = ["reversed", *(f"rotated by {by} keys" for by in range(1, hot))]
    for letter, against in (("K", "V"), ("V", "K"), ("K and V", "the mask")):
        errors = _errors_of_orders(sample, got, want, letter)
        for index in np.argsort(errors, kind="stable")[:2]:
            whole = np.concatenate([np.arange(cold), cold + orders[index]])
            made = sample.attend(
                sample.x[..., whole] if "K" in letter else None,
                sample.v[:, whole] if "V" in letter else None,
            )
            left = difference(got, made).relative
            if left <= enough:
                words = f"its {letter} stand {names[index]} against {against}"
                found.append((left, f"the hot part is ordered wrongly: {words}"))
    return min(found)[1] if found else None


def _errors_of_orders(
    sample: Sample, got: NDArray[np.float32], want: NDArray[np.float64], letter: str
) -> NDArray[np.float64]:
    """Give the errors that reversing and then each rotation leave in the worst row of a sample."""
    cold, kv = sample.cold, sample.kv
    hot = kv - cold
    row, head = np.unravel_index(np.linalg.norm(got - want, axis=2).argmax(), got.shape[:2])
    x, mask, v = sample.x[head, row], sample.mask[row], sample.v[head]
    masked = x + mask
    errors = np.empty(hot)
    for start in range(0, hot, _ROLLED_TOGETHER):
        by = np.arange(start, min(start + _ROLLED_TOGETHER, hot))[:, None]
        # Where keys come from, and, the other way round, where they go; row 0 is the reverse.
        source, target = ((np.arange(hot) + sign * by) % hot for sign in (-1, 1))
        if start == 0:
            source[0] = target[0] = np.arange(hot)[::-1]
        logits = np.repeat(masked[None], len(by), 0)
        if letter == "K":
            logits[:, cold:] = x[cold:][source] + mask[cold:]
        elif letter == "V":
            logits[:, cold:] = masked[cold:][target]
        else:
            logits[:, cold:] = x[cold:] + mask[cold:][target]
        largest = logits.max(1, keepdims=True)
        p = np.exp(logits - np.where(np.isneginf(largest), 0, largest))
        total = p.sum(1, keepdims=True)
        if sample.sinks is not None:
            total += np.exp(sample.sinks[head] - largest)
        made = (p @ v) / np.maximum(total, 1e-30)
        errors[by[:, 0]] = np.linalg.norm(made - got[row, head], axis=1)
    return errors


def _rounding(
    sample: Sample, got: NDArray[np.float32], want: NDArray[np.float64], error: float
) -> str | None:
    """Recognise rounding in f16, which is no mistake, and costs what it costs."""
    info = sample.problem.info
    if error > _MOST_F16_ERROR or info.logits_soft_cap or info.sinks is not None:
        return None
    if sample.kv > _MOST_SUMMED:
        return None
    n = len(sample.queries)
    picked = sorted({n - 1, n // 2})
    small = dataclasses.replace(
        sample.problem,
        q=sample.q[:, picked],
        k=sample.k,
        v=sample.v,
        mask=sample.mask[picked],
    )
    plain = difference(got[picked], want[picked]).relative
    if difference(got[picked], _attend_f16(small)).relative > plain / 4:
        return None
    return (
        f"an f16 accumulator: the output is what rounding the query and each partial sum of "
        f"values to f16 gives; that alone costs {error:.2g} here"
    )


def _attend_f16(problem: Problem) -> NDArray[np.float32]:
    """Compute the output [n, Hq, Dv] key by key, as ggml's CPU code does for f16 keys and values.

    The query is rounded to f16, logits and their sum are float32, the accumulator is f16.
    """
    heads, n, width = problem.q.shape
    kv_heads, kv, _ = problem.k.shape
    k, v = problem.k, problem.v
    q = problem.q.astype(np.float16).astype(np.float32).reshape(kv_heads, -1, width)
    logits = (q @ k.swapaxes(1, 2)).reshape(heads, n, kv)
    logits = logits * np.float32(problem.info.sm_scale) + problem.mask
    largest = np.full(logits.shape[:2], -np.inf, np.float32)
    total = np.zeros(logits.shape[:2], np.float32)
    sums = np.zeros((*logits.shape[:2], v.shape[2]), np.float16)
    with np.errstate(invalid="ignore", over="ignore"):
        for key in range(kv):
            x = logits[..., key]
            seen = ~np.isneginf(x)
            new = np.maximum(largest, x)
            shrink = np.where(seen & (new > largest), np.exp(largest - new), 1).astype(np.float32)
            weight = np.where(seen, np.exp(x - new), 0).astype(np.float32)
            sums = (sums.astype(np.float32) * shrink[..., None]).astype(np.float16)
            value = v[:, key].repeat(heads // kv_heads, 0)
            added = sums.astype(np.float32) + value[:, None] * weight[..., None]
            sums = added.astype(np.float16)
            total = total * shrink + weight
            largest = new
    out = sums.astype(np.float32) / np.where(total > 0, total, 1)[..., None]
    return np.ascontiguousarray(out.transpose(1, 0, 2))


def _where(
    problem: Problem, out: NDArray[np.float32], want: NDArray[np.float64], tolerance: float
) -> list[str]:
    """Say where the error lies, when nothing explains it."""
    n, heads, _ = out.shape
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(out - want, axis=2)
        size = np.linalg.norm(want, axis=2)
        wrong = ~(error <= tolerance * np.maximum(size, 1e-30)) | ~np.isfinite(error)
    if not wrong.any():
        return ["every head of every query is near, single elements are off"]
    lines = ["no known mistake explains it"]
    for what, axis, count in (("head", 0, heads), ("query", 1, n)):
        hit = np.flatnonzero(wrong.any(axis))
        if len(hit) == count:
            lines[0] += f"; {f'all {_plural(what)} are' if count > 1 else f'the one {what} is'} off"
        else:
            word = f"{what} {hit[0]}" if len(hit) == 1 else f"{_plural(what)} {_ranges(hit)}"
            lines[0] += f"; {word} of 0-{count - 1} {'is' if len(hit) == 1 else 'are'} off"
    hidden = np.isneginf(problem.mask)
    sees_all = ~hidden[:, ~hidden.all(0)].any(1)  # every key that anyone sees
    if sees_all.any() and not sees_all.all():
        right, others = ~wrong[sees_all].any(), wrong[~sees_all].any()
        if right and others:
            lines.append(
                "queries that see every key are right, others are not: the mask was not applied "
                "as recorded, or the keys stand in another order than its columns"
            )
    query, head = (
        int(i) for i in np.unravel_index(np.nan_to_num(error, nan=np.inf).argmax(), error.shape)
    )
    lines.append(
        f"worst: query {query}, head {head}, error {error[query, head]:.3g} at a norm of "
        f"{size[query, head]:.3g}"
    )
    return lines


def _plural(word: str) -> str:
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def _ranges(indices: NDArray[np.intp]) -> str:
    """Write 0,1,2,5 as 0-2, 5."""
    parts: list[list[int]] = []
    for index in indices.tolist():
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in parts[:6]]
    return ", ".join(words) + (", ..." if len(parts) > 6 else "")
