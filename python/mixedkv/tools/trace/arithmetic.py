"""One step's attention, by PyTorch and by mixedkv's own op.

PyTorch's `scaled_dot_product_attention` is the judge wherever it can compute what the layer does;
a soft cap and learned sinks, which it does not know, take PyTorch's softmax and matrix products.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .format import LayerInfo, StepData
from .layout import watched
from .stored import as_float32, in_blocks

MOST_HELD = 1 << 24
"""Logits held at a time: heads, and queries, are taken in turns where a step has more."""
_MOST_PATTERNS = 64
"""Ways in which queries see the keys that are not finite, up to which each is looked at."""


@dataclass(frozen=True)
class Problem:
    """Attention over whole keys and values, everything dequantised.

    Attributes
    ----------
    q
        [Hq, n, D] float32.
    k, v
        [Hkv, kv, D] and [Hkv, kv, Dv] float32, cold keys before hot ones.
    mask
        [n, kv] float32, additive.
    cold
        How many of the keys are cold.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    mask: NDArray[np.float32]
    cold: int
    info: LayerInfo


def problem_of(data: StepData, info: LayerInfo) -> Problem:
    """Join the parts of a step, dequantised."""
    ks = [watched("K as float32", as_float32(data.k))]
    vs = [watched("V as float32", as_float32(data.v))]
    masks = [data.mask]
    cold = 0
    if data.k_quant is not None and data.v_quant is not None and data.mask_quant is not None:
        cold = data.k_quant.shape[1]
        ks.insert(0, watched("K_quant dequantised", as_float32(data.k_quant)))
        vs.insert(0, watched("V_quant dequantised", as_float32(data.v_quant)))
        masks.insert(0, data.mask_quant)
    return Problem(
        q=watched("Q [head, query, dim]", data.q),
        k=watched("K, cold then hot", np.concatenate(ks, 1)),
        v=watched("V, cold then hot", np.concatenate(vs, 1)),
        mask=watched("mask, cold then hot", np.concatenate(masks, 1)),
        cold=cold,
        info=info,
    )


def sees_quantised(data: StepData) -> bool:
    """Whether some query sees a key or value of blocks, such as Q4_0, or what one stands for."""
    blocks = {role for role, name in data.stored.items() if mkv.formats.info(name).block_values > 1}
    for k, v, mask, roles in (
        (data.k, data.v, data.mask, {"k", "v"}),
        (data.k_quant, data.v_quant, data.mask_quant, {"k_quant", "v_quant"}),
    ):
        if k is None or v is None or mask is None:
            continue
        if (in_blocks(k) or in_blocks(v) or roles & blocks) and not np.isneginf(mask).all():
            return True
    return False


def attend_torch(problem: Problem, dtype: Any) -> NDArray[np.float64]:
    """Compute the output [n, Hq, Dv] with PyTorch in `dtype` (torch.float32 or float64).

    Rows that see no key are zeros. NaN and Inf in a key or value reach the rows that see it and no
    others: PyTorch by itself multiplies hidden values by 0, which makes NaN of them.
    """
    odd: NDArray[np.intp] = np.flatnonzero(~(_finite(problem.k) & _finite(problem.v)))
    if not odd.size:
        return _attend_torch(problem, dtype)
    seen = ~np.isneginf(problem.mask[:, odd])
    patterns, of_row = np.unique(seen, axis=0, return_inverse=True)
    if len(patterns) > _MOST_PATTERNS:  # many such keys: those who see one are taken to see all
        patterns, of_row = np.array([[False], [True]]), np.asarray(seen.any(1), np.intp)
    of_row = of_row.reshape(-1)
    n, heads = len(problem.mask), problem.q.shape[0]
    out = np.empty((n, heads, problem.v.shape[2]), np.float64)
    for index, pattern in enumerate(patterns):
        rows = np.flatnonzero(of_row == index)
        if not rows.size:
            continue
        hidden = odd[~np.broadcast_to(pattern, odd.shape)]
        k, v = np.array(problem.k), np.array(problem.v)
        k[:, hidden], v[:, hidden] = 0, 0
        part = dataclasses.replace(problem, q=problem.q[:, rows], k=k, v=v, mask=problem.mask[rows])
        out[rows] = _attend_torch(part, dtype)
    return out


def _finite(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell of each key of [Hkv, kv, D] whether all that it holds is finite."""
    return np.asarray(np.isfinite(rows).all((0, 2)))


def _attend_torch(problem: Problem, dtype: Any) -> NDArray[np.float64]:
    info = problem.info
    heads, n, _ = problem.q.shape
    out = np.empty((heads, n, problem.v.shape[2]), np.float64)
    of_group = _by_kv_head(out, problem)
    for piece in _pieces(problem):
        q, k, mask = _folded(problem, piece, dtype)
        v = torch.tensor(problem.v[piece.kv_heads], dtype=dtype)
        if info.logits_soft_cap or info.sinks is not None:
            part = _softmax(q, k, mask, problem, piece) @ v
        else:
            part = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=info.sm_scale
            )[0]
        part[:, torch.isneginf(mask).all(1)] = 0
        place = of_group[piece.kv_heads, piece.group, piece.queries]
        place[...] = part.double().numpy().reshape(place.shape)
    result = watched("PyTorch's [head, query, dim]", out).transpose(1, 0, 2)
    return watched("PyTorch's [query, head, dim]", result)


def magnitude(problem: Problem) -> NDArray[np.float64]:
    """Give what the output would be if nothing cancelled: the weighted sum of |v| [n, Hq, Dv].

    Rounding errors of an output are in proportion to it, however small the output itself is.
    """
    return attend_torch(dataclasses.replace(problem, v=np.abs(problem.v)), torch.float32)


def probabilities(problem: Problem) -> Iterator[NDArray[np.float32]]:
    """Give the softmax weights, some rows of a kv head or more at a time: [heads, rows, kv]."""
    for piece in _pieces(problem):
        q, k, mask = _folded(problem, piece, torch.float32)
        yield _softmax(q, k, mask, problem, piece).nan_to_num(0.0).numpy()


class _Piece(NamedTuple):
    """A part of a problem: of some kv heads, some of the query heads of each, and their queries."""

    kv_heads: slice
    group: slice
    queries: slice


def _pieces(problem: Problem) -> Iterator[_Piece]:
    """Cut a problem so that no piece has more logits than are held at a time."""
    heads, n, _ = problem.q.shape
    kv_heads, kv, _ = problem.k.shape
    ratio = heads // kv_heads
    queries = min(n, max(1, MOST_HELD // kv))
    group = min(ratio, max(1, MOST_HELD // (kv * queries)))
    together = max(1, MOST_HELD // (kv * queries * group)) if (queries, group) == (n, ratio) else 1
    for head in range(0, kv_heads, together):
        for member in range(0, ratio, group):
            for query in range(0, n, queries):
                yield _Piece(
                    slice(head, min(head + together, kv_heads)),
                    slice(member, min(member + group, ratio)),
                    slice(query, min(query + queries, n)),
                )


def _by_kv_head(rows: NDArray[Any], problem: Problem) -> NDArray[Any]:
    """View [Hq, ...] as [Hkv, Hq // Hkv, ...]: query head h reads kv head h // (Hq // Hkv)."""
    kv_heads = problem.k.shape[0]
    return rows.reshape(kv_heads, rows.shape[0] // kv_heads, *rows.shape[1:])


def _folded(problem: Problem, piece: _Piece, dtype: Any) -> tuple[Any, Any, Any]:
    """Give q [kv heads, rows, D], k [kv heads, kv, D] and the mask [rows, kv].

    The query heads that read a kv head are rows of one: its keys are not repeated for them.
    """
    q = _by_kv_head(problem.q, problem)[piece.kv_heads, piece.group, piece.queries]
    kv_heads, group, queries, width = q.shape
    mask = torch.tensor(np.array(problem.mask[piece.queries]), dtype=dtype)
    return (
        torch.tensor(q, dtype=dtype).reshape(kv_heads, group * queries, width),
        torch.tensor(problem.k[piece.kv_heads], dtype=dtype),
        mask.expand(group, *mask.shape).reshape(group * queries, -1),
    )


def _softmax(q: Any, k: Any, mask: Any, problem: Problem, piece: _Piece) -> Any:
    info = problem.info
    logits = q @ k.transpose(1, 2) * info.sm_scale
    if info.logits_soft_cap:
        logits = info.logits_soft_cap * torch.tanh(logits / info.logits_soft_cap)
    logits = logits + mask
    if info.sinks is None:
        return torch.softmax(logits, -1)
    sinks = _by_kv_head(np.array(info.sinks), problem)[piece.kv_heads, piece.group]
    queries = logits.shape[1] // sinks.shape[1]
    column = torch.tensor(sinks, dtype=q.dtype).repeat_interleave(queries, 1)[..., None]
    return torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1]


def attend_mixedkv(data: StepData, info: LayerInfo) -> NDArray[np.float32]:
    """Compute the output [n, Hq, Dv] with mixedkv's op, tier by tier, in the stored types."""
    heads, n, _ = data.q.shape
    state = mkv.AttentionState(num_qo_heads=heads, qo_len=n, head_dim=info.head_dim_v)
    options: dict[str, Any] = {
        "sm_scale": info.sm_scale,
        "logits_soft_cap": info.logits_soft_cap,
    }
    if data.k_quant is not None and data.v_quant is not None:
        state.update(data.q, data.k_quant, data.v_quant, mask=data.mask_quant, **options)
    state.update(data.q, data.k, data.v, mask=data.mask, **options)
    sinks = None if info.sinks is None else np.array(info.sinks, np.float32)
    out = np.asarray(state.finalize(sinks=sinks), np.float32)
    watched("mixedkv's [head, query, dim]", out)
    return watched("mixedkv's [query, head, dim]", out.transpose(1, 0, 2))


@contextmanager
def isa_selected(name: str) -> Iterator[None]:
    """Force an instruction set for a while."""
    before = mkv.isa.active()
    mkv.isa.select(name)
    try:
        yield
    finally:
        mkv.isa.select(before)
