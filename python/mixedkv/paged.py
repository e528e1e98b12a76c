"""Attention over keys and values in pages, as FlashInfer and vLLM keep them.

Pages of all sequences lie in one pool; a sequence is a list of page numbers. A batch of sequences
comes as such lists one after the other (``indices``), where each begins (``indptr``), and how many
keys each one's last page holds (``last_page_len``).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import (
    FLOATS,
    Array,
    Result,
    boolean,
    check_target,
    check_threads,
    is_tensor,
    shown,
    to_numpy,
)
from ._options import (
    MAX_HEAD_DIM,
    ComputeType,
    check_compute_type,
    check_layout,
    finite,
    lse_like,
    per_head,
    soft_cap,
    window,
)
from .formats import Format
from .quantized import QuantizedArray, row_width, rows_of

__all__ = ["attention_paged"]

F32 = np.dtype(np.float32)
_I64 = np.dtype(np.int64)
_INTEGERS = (np.dtype(np.int32), _I64)


def attention_paged(
    q: Array,
    kv_pages: Any,
    indptr: Array,
    indices: Array,
    last_page_len: Array,
    *,
    qo_indptr: Array | None = None,
    sm_scale: float | None = None,
    causal: bool = False,
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
    """Return the attention of a batch of sequences, each over the keys in its own pages.

    The bits are those of :func:`mixedkv.attention` over the same keys side by side, whatever the
    pages' size and order, and whatever else is in the batch. Pages are read where they are.

    Parameters
    ----------
    q
        Queries [B, Hq, D], one a sequence; or, with qo_indptr, [total, Hq, D], those of one
        sequence after those of another. float32 or float16 (torch also bfloat16).
    kv_pages
        (k_pages, v_pages), each [num_pages, Hkv, page_size, D] (NHD: [num_pages, page_size, Hkv,
        D]; Dv for D in v_pages), or one array [num_pages, 2, ...] of both. float32, float16 (torch
        also bfloat16), a :class:`mixedkv.QuantizedArray`, or bare Q4_0 rows (uint8). In any
        strides, but a row's values side by side.
    indptr
        [B + 1] from 0 on: sequence b has the pages ``indices[indptr[b]:indptr[b + 1]]``. None at
        all is no mistake: zeros, and an lse of -inf.
    indices
        Page numbers [indptr[-1]] or more, in the order of the sequences' keys; a page may serve
        several.
    last_page_len
        [B]: keys in each sequence's last page, from 1 to page_size; of a sequence without pages,
        anything.
    qo_indptr
        [B + 1] from 0 on: sequence b has the queries ``q[qo_indptr[b]:qo_indptr[b + 1]]``.
    causal
        Show a query the keys up to its own position only; a sequence's last query stands at its
        last key.
    sm_scale, window_left, window_right, logits_soft_cap, alibi_slopes, sinks, threads, compute_type
        As in :func:`mixedkv.attention`.
    layout
        Of the pages: "HND" or "NHD".
    return_lse
        Return (out, lse) with lse float32 [total, Hq], natural log; -inf where no key was seen.
    out
        Preallocated result [total, Hq, Dv].

    Indices are int32 or int64, numpy or torch, or lists of ints.

    Returns
    -------
    The result [total, Hq, Dv], torch in q's dtype or numpy in float32; zeros in rows that see no
    key.

    Raises
    ------
    ValueError
        Where shapes, page numbers or options don't fit; the message names the argument and its
        value.
    TypeError
        Where a dtype or a type does not fit.
    """
    check_layout(layout)
    causal, return_lse = boolean(causal, "causal"), boolean(return_lse, "return_lse")
    q_array = to_numpy(q, "q", FLOATS)
    if q_array.ndim != 3:
        raise ValueError(f"q must be [queries, Hq, D], got shape {q_array.shape}")
    num_queries, num_qo_heads, head_dim = q_array.shape
    k_pages, v_pages = (_Pages(x, name, layout) for x, name in _keys_and_values(kv_pages))
    _check_pages(k_pages, v_pages, num_qo_heads, head_dim)

    starts = _integers(indptr, "indptr")
    numbers = _integers(indices, "indices")
    last = _integers(last_page_len, "last_page_len")
    if qo_indptr is None:
        queries = np.arange(num_queries + 1, dtype=_I64)
    else:
        queries = _integers(qo_indptr, "qo_indptr")
    _check_batch(starts, last, queries, qo_indptr is not None)

    shape = (num_queries, num_qo_heads, v_pages.width)
    result = Result(q, shape, out)
    if out is not None:
        check_target(result.array, {}, "out")
    lse = np.empty(shape[:2], np.float32) if return_lse else None
    _core.attend_paged(
        q_array,
        k_pages.array,
        v_pages.array,
        k_pages.format.name,
        v_pages.format.name,
        queries,
        starts,
        numbers,
        last,
        result.array,
        lse,
        per_head(alibi_slopes, "alibi_slopes", num_qo_heads),
        per_head(sinks, "sinks", num_qo_heads),
        1.0 / math.sqrt(head_dim) if sm_scale is None else finite(sm_scale, "sm_scale"),
        soft_cap(logits_soft_cap),
        causal,
        window(window_left),
        window(window_right, "window_right"),
        check_threads(threads),
        check_compute_type(compute_type),
    )
    return result.get() if lse is None else (result.get(), lse_like(q, lse))


def _keys_and_values(kv_pages: Any) -> tuple[tuple[Any, str], tuple[Any, str]]:
    """Return k_pages and v_pages and how messages name them."""
    if isinstance(kv_pages, (tuple, list)):
        if len(kv_pages) != 2:
            raise ValueError(
                f"kv_pages must be (k_pages, v_pages) or one array, got {len(kv_pages)} of them"
            )
        return (kv_pages[0], "k_pages"), (kv_pages[1], "v_pages")
    shape = getattr(kv_pages, "shape", None)
    if shape is None:
        raise TypeError(
            "kv_pages must be (k_pages, v_pages) or one array [num_pages, 2, ...], got "
            f"{shown(kv_pages)}"
        )
    if len(shape) != 5 or shape[1] != 2:
        raise ValueError(
            f"kv_pages as one array must be [num_pages, 2, ...] of 5 axes, got shape {tuple(shape)}"
        )
    return (kv_pages[:, 0], "kv_pages[:, 0]"), (kv_pages[:, 1], "kv_pages[:, 1]")


class _Pages:
    """Pages of keys or of values: a view [num_pages, Hkv, page_size, row], its format and width."""

    def __init__(self, x: Any, name: str, layout: str) -> None:
        array, self.format = _rows(x, name)
        if array.ndim != 4:
            order = "Hkv, page_size" if layout == "HND" else "page_size, Hkv"
            raise ValueError(f"{name} must be [num_pages, {order}, D], got shape {array.shape}")
        self.name = name
        self.shape = array.shape
        self.array = array if layout == "HND" else array.swapaxes(1, 2)
        self.width = row_width(array, self.format, name)


def _rows(x: Any, name: str) -> tuple[NDArray[Any], Format]:
    """Return rows as the core takes them, and their format; never a copy."""
    data = x.data if isinstance(x, QuantizedArray) else x
    array, kind = rows_of(x, name)
    if array.size and array.__array_interface__["data"][0] != _address(data):
        raise ValueError(
            f"{name} must be aligned and contiguous in its last axis, since pages are not copied"
        )
    return array, kind


def _address(x: Array) -> int:
    return int(x.data_ptr() if is_tensor(x) else x.__array_interface__["data"][0])


def _check_pages(k: _Pages, v: _Pages, num_qo_heads: int, head_dim: int) -> None:
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{v.name} must have the pages, heads and page size of {k.name}, {k.shape[:3]}, got "
            f"{v.shape[:3]}"
        )
    _, num_kv_heads, page_size, _ = k.array.shape
    if not num_kv_heads or not num_qo_heads or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of {k.name}, got {num_qo_heads} and "
            f"{num_kv_heads}"
        )
    if not page_size:
        raise ValueError(f"pages must hold one key at least, got {k.name} of shape {k.shape}")
    if k.width != head_dim:
        raise ValueError(
            f"{k.name} must have q's head_dim {head_dim}, got {k.width} (shape {k.shape})"
        )
    for name, width in (("q", head_dim), (v.name, v.width)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(
                f"the head_dim of {name} must be from 1 to {MAX_HEAD_DIM}, got {width}"
            )


def _integers(x: Array, name: str) -> NDArray[np.int64]:
    """Return a list of integers as a contiguous int64 array."""
    if isinstance(x, (list, tuple)):
        nested = next((i for i, one in enumerate(x) if np.ndim(one) != 0), None)
        if nested is not None:
            raise ValueError(
                f"{name} must have one axis, that of all sequences one after the other, got "
                f"{name}[{nested}] of shape {np.shape(x[nested])}"
            )
        wrong = next((i for i, one in enumerate(x) if not _is_integer(one)), None)
        if wrong is not None:
            raise TypeError(f"{name} must hold ints of 64 bits, got {name}[{wrong}] = {x[wrong]!r}")
        x = np.array([int(one) for one in x], _I64)
    array = to_numpy(x, name, _INTEGERS)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {array.shape}")
    return np.ascontiguousarray(array, _I64)


def _is_integer(x: Any) -> bool:
    if isinstance(x, (bool, np.bool_)) or not hasattr(x, "__index__"):
        return False
    return -(2**63) <= int(x) < 2**63


def _check_batch(
    starts: NDArray[np.int64], last: NDArray[np.int64], queries: NDArray[np.int64], listed: bool
) -> None:
    """Refuse whichever of three arguments does not have the number of sequences of the others."""
    for name, offsets in (("indptr", starts), ("qo_indptr", queries)):
        if not len(offsets):
            raise ValueError(f"{name} must have an entry more than there are sequences, got none")
    batch = {
        "indptr": len(starts) - 1,
        "last_page_len": len(last),
        "qo_indptr" if listed else "q": len(queries) - 1,
    }
    if len(set(batch.values())) == 1:
        return
    if len(set(batch.values())) == len(batch):
        each = ", ".join(f"{name} of {n}" for name, n in batch.items())
        raise ValueError(f"indptr, last_page_len and the queries must be of one batch, got {each}")
    odd = next(name for name, n in batch.items() if [*batch.values()].count(n) == 1)
    agree = [name for name in batch if name != odd]
    wanted = batch[agree[0]]
    of = f"the {wanted} sequences of {agree[0]} and {agree[1]}"
    if odd.endswith("indptr"):
        raise ValueError(
            f"{odd} must have {wanted + 1} entries, one more than {of}, got {batch[odd] + 1}"
        )
    what = "one query" if odd == "q" else "an entry"
    hint = " (qo_indptr tells of several)" if odd == "q" else ""
    raise ValueError(f"{odd} must have {what} for each of {of}{hint}, got {batch[odd]}")
