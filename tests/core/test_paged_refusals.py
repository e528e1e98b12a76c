"""attention_paged() refuses what does not fit by the argument's own name, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal
from paged_cases import DIM, DIM_V, HEADS, make_batch


def set_at(position: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[position] = value
        return array

    return change


BAD_TABLES: dict[str, tuple[str, Callable[[np.ndarray], Any], str]] = {
    "page_beyond": ("indices", set_at(2, 99), r"indices\[2\] = 99"),
    "page_just_beyond": (
        "indices",
        set_at(1, 13),
        r"indices must be from 0 to 12.*indices\[1\] = 13",
    ),
    "page_negative": ("indices", set_at(0, -1), r"indices\[0\] = -1"),
    "indptr_start": ("indptr", set_at(0, 1), r"indptr must begin with 0, got indptr\[0\] = 1"),
    "indptr_descends": ("indptr", set_at(1, 11), r"indptr\[1\] = 11 and indptr\[2\] = 10"),
    "indptr_beyond": (
        "indptr",
        set_at(2, 11),
        r"indptr must end within indices, 10, got indptr\[2\] = 11",
    ),
    "indptr_short": (
        "indptr",
        lambda x: x[:-1],
        r"^indptr must have 3 entries, one more than the 2 sequences of last_page_len and q, got 2",
    ),
    "indptr_empty": ("indptr", lambda x: x[:0], "^indptr must have an entry more.*got none"),
    "indptr_2d": ("indptr", lambda x: [[0, 4], [4, 10]], r"^indptr must.*indptr\[0\] of shape"),
    "indices_ragged": (
        "indices",
        lambda x: [[*x[:4]], [*x[4:]]],
        r"^indices must have one axis, .* one after the other, got indices\[0\] of shape \(4,\)",
    ),
    "indices_partly_ragged": (
        "indices",
        lambda x: [*x[:4], [1, 2]],
        r"^indices must.*indices\[4\]",
    ),
    "indices_floats": (
        "indices",
        lambda x: [0, 1.5, *x[2:]],
        r"^indices must hold ints of 64 bits, got indices\[1\] = 1.5",
    ),
    "indices_none": ("indices", lambda x: [None, *x[1:]], r"^indices must.*indices\[0\] = None"),
    "indices_bools": ("indices", lambda x: [True] * 10, r"^indices must.*indices\[0\] = True"),
    "indices_vast": ("indices", lambda x: [2**70, *x[1:]], r"^indices must.*indices\[0\] = 1180"),
    "indices_text": ("indices", lambda x: "0123456789", "^indices must be a numpy array.*got str"),
    "last_short": (
        "last_page_len",
        lambda x: x[:-1],
        "^last_page_len must have an entry for each of the 2 sequences of indptr and q, got 1",
    ),
    "last_long": (
        "last_page_len",
        lambda x: [1, 1, 1],
        "^last_page_len must have an entry for each of the 2 sequences of indptr and q, got 3",
    ),
    "last_empty": ("last_page_len", lambda x: [], "^last_page_len must have an entry.*got 0"),
    "indptr_float": (
        "indptr",
        lambda x: x.astype(np.float32),
        "indptr must be int32 or int64, got float32",
    ),
    "indices_2d": (
        "indices",
        lambda x: x[None],
        r"indices must have one axis, got shape \(1, 10\)",
    ),
    "last_zero": (
        "last_page_len",
        set_at(1, 0),
        r"from 1 to page_size, 16, got last_page_len\[1\] = 0",
    ),
    "last_negative": ("last_page_len", set_at(0, -2), r"last_page_len\[0\] = -2"),
    "last_beyond": ("last_page_len", set_at(0, 17), r"last_page_len\[0\] = 17"),
    "last_uint8": (
        "last_page_len",
        lambda x: x.astype(np.uint8),
        "last_page_len must be int32 or int64",
    ),
}


@pytest.mark.parametrize(("name", "change", "match"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_paged_bad_table(
    rng: np.random.Generator, name: str, change: Callable[[np.ndarray], Any], match: str
) -> None:
    batch = make_batch(rng, [50, 90], 16)
    table = {key: getattr(batch, key) for key in ("indptr", "indices", "last_page_len")}
    table[name] = change(table[name])
    out = np.full((2, HEADS, DIM_V), 7.0, np.float32)
    with pytest.raises((ValueError, TypeError), match=match):
        mkv.attention_paged(normal(rng, 2, HEADS, DIM), batch.pages, **table, out=out)
    np.testing.assert_array_equal(out, 7.0)


BAD_PAGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "one": (lambda k, v: (k,), "kv_pages must be .* got 1 of them"),
    "none": (lambda k, v: None, "kv_pages must be .* got NoneType"),
    "one_array_4d": (lambda k, v: k, r"\[num_pages, 2, ...\] of 5 axes, got shape"),
    "k_3d": (
        lambda k, v: (k[0], v),
        r"k_pages must be \[num_pages, Hkv, page_size, D\], got shape",
    ),
    "fewer_v": (
        lambda k, v: (k, v[1:]),
        r"v_pages must have the pages, heads and page size of k_pages",
    ),
    "heads": (lambda k, v: (k[:, [0] * 4], v[:, [0] * 4]), "the heads of q must be a multiple"),
    "no_heads": (lambda k, v: (k[:, :0], v[:, :0]), "the heads of q must be a multiple"),
    "no_size": (lambda k, v: (k[:, :, :0], v[:, :, :0]), "pages must hold one key at least"),
    "k_dim": (lambda k, v: (k[..., :32], v), "k_pages must have q's head_dim 64, got 32"),
    "v_dim": (lambda k, v: (k, v[..., :0]), "the head_dim of v_pages must be from 1"),
    "int_pages": (
        lambda k, v: (np.zeros(k.shape, np.int32), v),
        "k_pages must be float32, float16",
    ),
    "q4_0_bytes": (
        lambda k, v: (np.zeros((*k.shape[:3], 35), np.uint8), v),
        "multiple of 18 bytes",
    ),
    "strided": (lambda k, v: (k.repeat(2, -1)[..., ::2], v), "contiguous in its last axis"),
    "float64": (lambda k, v: (k, v.astype(np.float64)), "v_pages must be float32, float16"),
}


@pytest.mark.parametrize(("change", "match"), BAD_PAGES.values(), ids=BAD_PAGES)
def test_paged_bad_pages(
    rng: np.random.Generator, change: Callable[[Any, Any], Any], match: str
) -> None:
    batch = make_batch(rng, [50, 90], 16)
    with pytest.raises((ValueError, TypeError), match=match):
        mkv.attention_paged(normal(rng, 2, HEADS, DIM), change(*batch.pages), *batch.table)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "queries": (
        {"qo_indptr": [0, 1, 3]},
        r"qo_indptr must end at the number of queries, 2, got qo_indptr\[2\] = 3",
    ),
    "queries_descend": ({"qo_indptr": [0, 3, 2]}, r"qo_indptr\[1\] = 3 and qo_indptr\[2\] = 2"),
    "queries_short": (
        {"qo_indptr": [0, 2]},
        "^qo_indptr must have 3 entries, .* 2 sequences of indptr and last_page_len, got 2",
    ),
    "queries_none": ({"qo_indptr": []}, "^qo_indptr must have an entry more.*got none"),
    "queries_ragged": ({"qo_indptr": [0, [1], 2]}, r"^qo_indptr must.*qo_indptr\[1\] of shape"),
    "layout": ({"layout": "DHN"}, "layout must be 'HND' or 'NHD', got 'DHN'"),
    "causal": ({"causal": 1}, "causal must be a bool"),
    "window": ({"window_left": -2}, "window_left must be from -1"),
    "scale": ({"sm_scale": float("nan")}, "sm_scale must be a finite number"),
    "soft_cap": ({"logits_soft_cap": -1.0}, "logits_soft_cap must be a finite number of 0 or more"),
    "sinks": ({"sinks": np.zeros(5, np.float32)}, r"sinks must have shape \(6,\), got \(5,\)"),
    "threads": ({"threads": 0}, "threads must be from 1"),
    "compute_type": ({"compute_type": "f8"}, "compute_type must be"),
    "out_shape": ({"out": np.zeros((2, HEADS, DIM), np.float32)}, "out must have shape"),
}


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_paged_bad_options(rng: np.random.Generator, options: dict[str, Any], match: str) -> None:
    batch = make_batch(rng, [50, 90], 16)
    with pytest.raises((ValueError, TypeError), match=match):
        mkv.attention_paged(normal(rng, 2, HEADS, DIM), batch.pages, *batch.table, **options)


def test_paged_bad_queries(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [50, 90], 16)
    with pytest.raises(ValueError, match=r"^q must have one query for each of the 2.*got 3"):
        mkv.attention_paged(normal(rng, 3, HEADS, DIM), batch.pages, *batch.table)
    table = (*batch.table[:2], batch.last_page_len[:1])
    with pytest.raises(ValueError, match="one batch, got indptr of 2, last_page_len of 1, q of 3"):
        mkv.attention_paged(normal(rng, 3, HEADS, DIM), batch.pages, *table)
    empty = tuple(pages[:0] for pages in batch.pages)
    with pytest.raises(ValueError, match=r"indices must name no page.*got indices\[0\] ="):
        mkv.attention_paged(normal(rng, 2, HEADS, DIM), empty, *batch.table)
    with pytest.raises(ValueError, match=r"q must be \[queries, Hq, D\], got shape"):
        mkv.attention_paged(normal(rng, 2, DIM), batch.pages, *batch.table)


def test_paged_out_overlaps(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [50, 90], 16, "f32", "f32", (DIM, DIM))
    q = normal(rng, 2, HEADS, DIM)
    with pytest.raises(ValueError, match="out must not share memory with q"):
        mkv.attention_paged(q, batch.pages, *batch.table, out=q)
    pool = batch.v_pages.reshape(-1)[: q.size].reshape(q.shape)
    with pytest.raises(ValueError, match="out must not share memory with v_pages"):
        mkv.attention_paged(q, batch.pages, *batch.table, out=pool)
