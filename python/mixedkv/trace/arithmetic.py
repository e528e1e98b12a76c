"""One step's attention, by PyTorch and by mixedkv's own op.

PyTorch's `scaled_dot_product_attention` is the judge wherever it can compute what the layer does;
a soft cap and learned sinks, which it does not know, take PyTorch's softmax and matrix products.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .format import LayerInfo, StepData
from .layout import as_float32, watched

_MOST_LOGITS = 1 << 24
"""Logits held at a time: heads are taken in turns where a step has more."""

_MOST_EXPANDED = 1 << 27
"""Values of one kv head's keys, repeated for its query heads, that a step may come to."""


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


def attend_torch(problem: Problem, dtype: Any) -> NDArray[np.float64]:
    """Compute the output [n, Hq, Dv] with PyTorch in `dtype` (torch.float32 or float64).

    Rows that see no key are zeros.
    """
    info = problem.info
    heads, n, _ = problem.q.shape
    ratio = heads // problem.k.shape[0]
    out = np.empty((heads, n, problem.v.shape[2]), np.float64)
    mask = torch.tensor(problem.mask, dtype=dtype)
    blind = torch.isneginf(mask).all(1)
    together = max(1, _MOST_LOGITS // max(1, mask.numel() * ratio))
    expanded = ratio * problem.k.shape[1] * max(problem.k.shape[2], problem.v.shape[2])
    if expanded > _MOST_EXPANDED:
        raise ValueError(
            f"keys of {problem.k.shape[1]} tokens for {ratio} query heads each are too many to "
            "recompute"
        )
    for first in range(0, problem.k.shape[0], together):
        kv = slice(first, first + together)
        qo = slice(first * ratio, (first + together) * ratio)
        q = torch.tensor(problem.q[qo], dtype=dtype)
        # Query head h reads kv head h // ratio.
        k = torch.tensor(problem.k[kv], dtype=dtype).repeat_interleave(ratio, 0)
        v = torch.tensor(problem.v[kv], dtype=dtype).repeat_interleave(ratio, 0)
        if info.logits_soft_cap or info.sinks is not None:
            probability = _softmax(q, k, mask, info, qo)
            part = probability @ v
        else:
            part = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=info.sm_scale
            )[0]
        part[:, blind] = 0
        out[qo] = part.double().numpy()
    result = watched("PyTorch's [head, query, dim]", out).transpose(1, 0, 2)
    return watched("PyTorch's [query, head, dim]", result)


def probabilities(problem: Problem) -> Iterator[NDArray[np.float32]]:
    """Give the softmax weights, kv head by kv head: [Hq // Hkv, n, kv] float32 each."""
    ratio = problem.q.shape[0] // problem.k.shape[0]
    mask = torch.tensor(problem.mask)
    for head in range(problem.k.shape[0]):
        qo = slice(head * ratio, (head + 1) * ratio)
        k = torch.tensor(problem.k[head : head + 1]).repeat_interleave(ratio, 0)
        weights = _softmax(torch.tensor(problem.q[qo]), k, mask, problem.info, qo)
        yield weights.nan_to_num(0.0).numpy()


def _softmax(q: Any, k: Any, mask: Any, info: LayerInfo, heads: slice) -> Any:
    logits = q @ k.transpose(1, 2) * info.sm_scale
    if info.logits_soft_cap:
        logits = info.logits_soft_cap * torch.tanh(logits / info.logits_soft_cap)
    logits = logits + mask
    if info.sinks is None:
        return torch.softmax(logits, -1)
    sinks = torch.tensor(info.sinks[heads], dtype=q.dtype)[:, None, None]
    logits = torch.cat([logits, sinks.expand(-1, logits.shape[1], 1)], -1)
    return torch.softmax(logits, -1)[..., :-1]


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
