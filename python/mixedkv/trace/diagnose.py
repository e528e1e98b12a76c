"""Guessing what went wrong: known mistakes are made on purpose, to see which one explains a trace.

A hypothesis is a problem, changed by one mistake, or another reading of the recorded output. One
that brings the recorded output within the tolerance is named. Where none does, what is said is
where the error lies: heads, queries, and whether the queries that see every key are right.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .arithmetic import Problem, attend_torch
from .format import StepData
from .metrics import difference

_MOST_F16_ERROR = 2e-2
"""Relative errors above are more than rounding in f16."""
_MOST_F16_LOGITS = 1 << 24
"""Logits that are held at once to see what an f16 accumulator makes of them."""
_MOST_ROLLED = 4096
_MOST_ROLLED_LOGITS = 1 << 30
"""Keys, and logits of a query, up to which every rotation of the hot part is tried."""


def diagnose(
    data: StepData, problem: Problem, want: NDArray[np.float64], tolerance: float
) -> list[str]:
    """Give lines that help to find a mistake.

    Parameters
    ----------
    want
        The right output [n, Hq, Dv].
    tolerance
        Relative error at which a hypothesis explains the recorded output.
    """
    out = data.out
    if not np.isfinite(out).all():
        return _where(problem, out, want, tolerance)
    # A right explanation leaves rounding (the output may well have been computed in f16), and far
    # less than there was: an error that is small anyway is explained by nothing.
    enough = min(max(tolerance, 1e-3), difference(out, want).relative / 10)
    hints = []
    for words, read in _readings(out):
        if difference(read, want).relative <= enough:
            hints.append(words)
    for words, changed, order in _mistakes(problem):
        made = attend_torch(changed, torch.float32)
        if order is not None:
            made = made[:, np.argsort(order)]
        if difference(out, made).relative <= enough:
            hints.append(words)
    if not hints:
        hints = list(_rotations(problem, out, enough))
    if not hints:
        hints = list(_rounding(problem, out, difference(out, want).relative))
    return hints[:3] or _where(problem, out, want, tolerance)


def _readings(out: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
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


class _Mistake(NamedTuple):
    """What was done wrong, and the problem that gives the same when done right.

    `order` are the query heads in the order in which that problem has them; None: as they are.
    """

    words: str
    problem: Problem
    order: NDArray[np.intp] | None = None


def _mistakes(problem: Problem) -> Iterator[_Mistake]:
    """Right data, wrong use of it (or wrong data, read so that it would be right)."""
    replace = dataclasses.replace
    q, k, v, mask, info = problem.q, problem.k, problem.v, problem.mask, problem.info
    heads, n, _ = q.shape
    kv_heads, kv, _ = k.shape
    cold = problem.cold
    ratio = heads // kv_heads

    if ratio > 1 and kv_heads > 1:
        # Query head h reading kv head h % Hkv is the right thing on heads in another order.
        order = np.argsort(np.arange(heads) % kv_heads, kind="stable")
        sinks = None if info.sinks is None else tuple(info.sinks[head] for head in order)
        yield _Mistake(
            "GQA is tiled: query head h read kv head h % num_kv_heads; h // (num_qo_heads / "
            "num_kv_heads) is wanted (repeat_interleave, not tile)",
            replace(problem, q=q[order], info=replace(info, sinks=sinks)),
            order,
        )

    for letter in ("K", "V", "K and V"):
        for part, where in (
            (slice(None), ""),
            (slice(0, cold), "the cold part of "),
            (slice(cold, None), "the hot part of "),
        ):
            if where and not 0 < cold < kv:
                continue
            for fits, turn in (
                ("when its memory is read as [key][head][dim]", _as_nhd),
                ("when it is laid out as [key][head][dim] and read as [head][key][dim]", _as_hnd),
            ):
                changed_k, changed_v = np.array(k), np.array(v)
                if "K" in letter:
                    changed_k[:, part] = turn(k[:, part])
                if "V" in letter:
                    changed_v[:, part] = turn(v[:, part])
                if np.array_equal(changed_k, k) and np.array_equal(changed_v, v):
                    continue
                yield _Mistake(
                    f"wrong strides: {where}{letter} fits the output {fits} (the strides of a "
                    "view were dropped between the cache and the trace, or in the op)",
                    replace(problem, k=changed_k, v=changed_v),
                )
    if n > 1 and heads > 1:
        yield _Mistake(
            "wrong strides: Q was taken as [query][head][dim] in memory, [head][query][dim] is "
            "wanted",
            replace(problem, q=np.ascontiguousarray(q).reshape(n, heads, -1).transpose(1, 0, 2)),
        )

    if np.isneginf(mask).any():
        yield _Mistake(
            "the mask was ignored: every query saw every key",
            replace(problem, mask=np.zeros_like(mask)),
        )
        for by, words in ((1, "late"), (-1, "early")):
            shifted = np.roll(mask, by, 1)
            shifted[:, 0 if by > 0 else -1] = 0.0 if by > 0 else -np.inf
            yield _Mistake(f"the mask is one key too {words}", replace(problem, mask=shifted))
    if 0 < cold < kv:
        swapped = np.concatenate([mask[:, kv - cold :], mask[:, : kv - cold]], 1)
        if not np.array_equal(swapped, mask):
            yield _Mistake(
                "the mask's parts are exchanged: it was taken as hot then cold, cold then hot is "
                "wanted",
                replace(problem, mask=swapped),
            )
        for words, part in (("cold", slice(0, cold)), ("hot", slice(cold, None))):
            blind = np.array(mask)
            blind[:, part] = -np.inf
            yield _Mistake(f"the {words} part was not attended", replace(problem, mask=blind))
        yield _Mistake(
            "the accumulator was reset between the tiers, or the tiers' results were averaged "
            "without their weights (the cold part counted as if it were alone)",
            replace(problem, mask=np.where(np.arange(kv) < cold, mask, -np.inf)),
        )

    width = info.head_dim
    for words, scale in (
        ("left out (1 was used)", 1.0),
        ("1 / head_dim", 1.0 / width),
        ("1 / sqrt(head_dim)", 1.0 / math.sqrt(width)),
        ("applied twice", info.sm_scale**2),
    ):
        if not math.isclose(scale, info.sm_scale, rel_tol=1e-6):
            yield _Mistake(
                f"the scale of the logits is wrong: {words}; {info.sm_scale:.6g} is wanted",
                replace(problem, info=replace(info, sm_scale=scale)),
            )
    if info.logits_soft_cap:
        yield _Mistake(
            "the soft cap of the logits was left out",
            replace(problem, info=replace(info, logits_soft_cap=0.0)),
        )
    if info.sinks is not None:
        yield _Mistake(
            "the learned sinks were left out", replace(problem, info=replace(info, sinks=None))
        )
    if cold:
        for letter in ("K", "V", "K and V"):
            changed_k, changed_v = np.array(k), np.array(v)
            if "K" in letter:
                changed_k[:, :cold] = _paired_nibbles(k[:, :cold])
            if "V" in letter:
                changed_v[:, :cold] = _paired_nibbles(v[:, :cold])
            yield _Mistake(
                f"the nibbles of {letter} in the cold part are in the wrong order: byte j of a "
                "block holds values j and j + 16, not 2j and 2j + 1",
                replace(problem, k=changed_k, v=changed_v),
            )


def _as_nhd(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Read the memory of [head, key, dim] as if it were [key][head][dim]."""
    heads, kv, width = rows.shape
    read: NDArray[np.float32] = np.ascontiguousarray(rows).reshape(kv, heads, width)
    turned: NDArray[np.float32] = read.transpose(1, 0, 2)
    return turned


def _as_hnd(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lay [head, key, dim] out as [key][head][dim] and read that as [head][key][dim]."""
    laid: NDArray[np.float32] = np.ascontiguousarray(rows.transpose(1, 0, 2))
    return laid.reshape(rows.shape)


def _paired_nibbles(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring each block from the order (j, j + 16) to (2j, 2j + 1)."""
    if rows.shape[-1] % 32:
        return rows
    blocks = rows.reshape(*rows.shape[:-1], -1, 2, 16)
    return np.ascontiguousarray(blocks.swapaxes(-1, -2)).reshape(rows.shape)


def _rotations(problem: Problem, out: NDArray[np.float32], enough: float) -> Iterator[str]:
    """Orders in which the hot part may stand: rotated, as a ring buffer is, or reversed."""
    cold = problem.cold
    kv = problem.k.shape[1]
    hot = kv - cold
    if not 1 < hot <= _MOST_ROLLED or hot * problem.q.shape[0] * kv > _MOST_ROLLED_LOGITS:
        return
    # Few queries settle it: the last, and, where the mask hides something, some others.
    n = problem.q.shape[1]
    picked = sorted({n - 1, n // 2, n // 4, 0})
    small = dataclasses.replace(problem, q=problem.q[:, picked], mask=problem.mask[picked])
    got = out[picked]
    reverse = cold + np.arange(hot)[::-1]
    orders = [(f"rotated by {by} keys", cold + np.roll(np.arange(hot), by)) for by in range(1, hot)]
    for words, order in [("reversed", reverse), *orders]:
        whole = np.concatenate([np.arange(cold), order])
        for letter in ("K", "V", "K and V"):
            changed = dataclasses.replace(
                small,
                k=small.k[:, whole] if "K" in letter else small.k,
                v=small.v[:, whole] if "V" in letter else small.v,
            )
            made = attend_torch(changed, torch.float32)
            if difference(got, made).relative <= enough:
                against = "the mask" if letter == "K and V" else ("V" if letter == "K" else "K")
                yield (
                    f"the hot part is ordered wrongly: its {letter} stand {words} against {against}"
                )
                return


def _rounding(problem: Problem, out: NDArray[np.float32], error: float) -> Iterator[str]:
    """Recognise rounding in f16, which is no mistake, and costs what it costs."""
    info = problem.info
    if error > _MOST_F16_ERROR or info.logits_soft_cap or info.sinks is not None:
        return
    picked = sorted({problem.q.shape[1] - 1, problem.q.shape[1] // 2})
    small = dataclasses.replace(problem, q=problem.q[:, picked], mask=problem.mask[picked])
    plain = difference(out[picked], attend_torch(small, torch.float32)).relative
    if small.q.shape[0] * len(picked) * small.k.shape[1] > _MOST_F16_LOGITS:
        return
    made = _attend_f16(small)
    if difference(out[picked], made).relative <= plain / 4:
        yield (
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
        wrong = ~(error <= tolerance * np.maximum(size, 1e-30))
    if not wrong.any():
        return ["every head of every query is near, single elements are off"]
    lines = ["no known mistake explains it"]
    for what, axis, count in (("heads", 0, heads), ("queries", 1, n)):
        hit = np.flatnonzero(wrong.any(axis))
        which = f"all {what}" if len(hit) == count else f"{what} {_ranges(hit)} of 0-{count - 1}"
        lines[0] += f"; {which} are off"
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
