"""Attention with carried state: flash attention that continues from segment to segment.

For a query row, and logits ``x`` of the keys seen so far, the state is ``M = max(x)``,
``S = sum(exp(x - M))`` and ``acc = sum(exp(x - M) * v)``; the result is ``acc / S`` and
``lse = M + ln S`` (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The accumulator is reset only while M is -inf.

Arrays are numpy arrays or torch CPU tensors. Keys and values may be float32, float16, bfloat16
(torch), or a :class:`mixedkv.QuantizedArray` of any format, each on its own; bare uint8 is Q4_0.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ._arrays import Array, Result, boolean, check_target
from ._options import F32, ComputeType, Inputs, Options, check_layout, lse_like, per_head
from .state import AttentionState, merge, merge_state, merge_states

__all__ = ["AttentionState", "attention", "merge", "merge_state", "merge_states"]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    sm_scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    window_left: int = -1,
    window_right: int = -1,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    layout: Literal["HND", "NHD"] = "HND",
    return_lse: bool = False,
    out: Array | None = None,
    threads: int | None = None,
    compute_type: ComputeType = "f32",
) -> Any:
    """Return the attention of all queries over all keys.

    Parameters
    ----------
    q
        Queries [B, Hq, Lq, D], float32 or float16 (torch also bfloat16). A leading B may be left
        out, in q, k and v alike.
    k, v
        Keys [B, Hkv, Lkv, D] and values [B, Hkv, Lkv, Dv], plain, a
        :class:`mixedkv.QuantizedArray`, or bare Q4_0 rows (uint8, last axis ``D // 32 * 18``), read
        as they are. Query head h reads kv head ``h // (Hq // Hkv)``. A batch of 1, in k, v or
        both, serves every row of q's batch, without a copy.
    sm_scale
        Factor of the logits; None: ``1 / sqrt(D)``. Below float32's range it counts as 0.
    causal
        Show a query the keys up to its own position only; the last query stands at the last key.
    mask
        Additive (float32, float16) or boolean (true = attend), broadcast to [B, Hq, Lq, Lkv]; an
        entry of -inf removes the key.
    window_left, window_right
        W >= 0 and R >= 0: show a query at position p the keys p - W to p + R; -1: that side is
        open. With causal nothing after p is shown, whatever window_right is.
    logits_soft_cap
        c > 0: logits become ``c * tanh(logit / c)``, before the mask; 0: none. c is
        float32, from its smallest normal number, 2**-126, on.
    alibi_slopes
        [Hq]: adds ``slope * (key position - query position)``, beside a boolean mask too. An
        additive mask is taken to hold the distances itself, as in ggml: it is multiplied by slope,
        and nothing else is added, causal or not.
    sinks
        [Hq]: learned logits without a value that take part in the softmax's sum.
    layout
        "HND", or "NHD" for q, k, v and the result as [B, L, H, D].
    return_lse
        Return (out, lse) with lse float32 [B, Hq, Lq], natural log; -inf where no key was seen.
    out
        Preallocated result of q's shape with Dv for D. It must not share memory with anything that
        is read: q, k, v, mask, alibi_slopes, sinks.
    threads
        Threads to use; None: :func:`mixedkv.get_num_threads`. The bits don't depend on it.
    compute_type
        "f32", or "bf16" to let queries, keys, weights and values be rounded to bfloat16 (8 bits of
        mantissa) in the products of many query rows: faster where the instruction set in use has
        it (:func:`mixedkv.isa.compute_types`), f32 elsewhere, for single queries, and where the
        last few rows of a prefill are too few to profit. Sums, softmax and state stay f32. A logit
        is then off by some 2^-7 of ``|sm_scale| * sum(|q_i * k_i|)`` at most, and the result by
        some 3e-3 of its norm on data like that of models; magnitudes near 1e-38 may count as 0.
        Whether bf16 is faster depends on the processor: "auto" takes it where it is, by a trial of
        some milliseconds at the first prefill of the process, and f32 elsewhere
        (:func:`mixedkv.isa.auto_compute_type`).

    Returns
    -------
    The result [B, Hq, Lq, Dv], torch in q's dtype or numpy in float32; zeros in rows that see no
    key.

    Raises
    ------
    ValueError
        Where shapes or options don't fit; the message names the argument and its value.
    TypeError
        Where a dtype or a type does not fit.
    """
    check_layout(layout)
    return_lse = boolean(return_lse, "return_lse")
    shapes = Inputs(q, k, v, nhd=layout == "NHD")
    options = Options(
        shapes,
        sm_scale,
        mask,
        causal,
        window_left,
        window_right,
        logits_soft_cap,
        alibi_slopes,
        threads,
        compute_type,
    )
    sink_array = per_head(sinks, "sinks", shapes.num_qo_heads)
    out_shape = shapes.out_shape(nhd=layout == "NHD")
    result = Result(q, out_shape, out)
    if out is not None:
        check_target(result.array, {}, "out")
    lse = np.empty((shapes.batch, shapes.num_qo_heads, shapes.qo_len), F32) if return_lse else None
    out_array = result.array if shapes.batched else result.array[np.newaxis]
    # The last query stands at the last key.
    start = shapes.kv_len - shapes.qo_len
    options.run(
        shapes,
        q_start=start,
        kv_start=0,
        out=out_array.swapaxes(1, 2) if layout == "NHD" else out_array,
        lse=lse,
        sinks=sink_array,
    )
    if lse is None:
        return result.get()
    return result.get(), lse_like(q, lse if shapes.batched else lse[0])
