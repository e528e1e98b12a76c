"""attention_paged(): pages give the bits of the same keys side by side, and float64's values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    KV_TYPES,
    as_kind,
    assert_close,
    assert_lse_close,
    normal,
    tolerance,
    values_of,
)

PAGE_SIZES = (1, 3, 16, 17, 64)
HEADS, KV_HEADS, DIM, DIM_V = 6, 2, 64, 96


@dataclass
class Batch:
    """Sequences of keys and values [Hkv, len, row], and the same in pages."""

    keys: list[np.ndarray]
    values: list[np.ndarray]
    k_pages: np.ndarray
    v_pages: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray

    @property
    def pages(self) -> tuple[np.ndarray, np.ndarray]:
        return self.k_pages, self.v_pages

    @property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.indptr, self.indices, self.last_page_len


def make_batch(
    rng: np.random.Generator,
    lengths: list[int],
    page_size: int,
    k_kind: str = "f16",
    v_kind: str = "f16",
    dims: tuple[int, int] = (DIM, DIM_V),
) -> Batch:
    """Random sequences, in pages (HND) that lie anywhere in a pool whose other places hold NaN."""
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + 3
    indices = rng.permutation(num_pages)[: sum(counts)].astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    sides: list[tuple[list[np.ndarray], np.ndarray]] = []
    for kind, dim in ((k_kind, dims[0]), (v_kind, dims[1])):
        rows = [as_kind(normal(rng, KV_HEADS, n, dim), kind) for n in lengths]
        nothing = as_kind(np.full((KV_HEADS, page_size, dim), np.nan, np.float32), kind)
        pool = np.stack([nothing] * num_pages)
        for sequence, first in zip(rows, indptr, strict=False):
            for j in range(sequence.shape[1]):
                pool[indices[first + j // page_size], :, j % page_size] = sequence[:, j]
        sides.append((rows, pool))
    last = [
        n - (count - 1) * page_size if n else 0 for n, count in zip(lengths, counts, strict=True)
    ]
    (keys, k_pages), (values, v_pages) = sides
    return Batch(keys, values, k_pages, v_pages, indptr, indices, np.array(last, np.int32))


def side_by_side(q: np.ndarray, batch: Batch, qo_lens: list[int], **options: Any) -> Any:
    """What attention() gives for each sequence alone: out [total, Hq, Dv], lse [total, Hq]."""
    outs, lses, first = [], [], 0
    for k, v, n in zip(batch.keys, batch.values, qo_lens, strict=True):
        one = q[first : first + n].swapaxes(0, 1)
        out, lse = mkv.attention(one, k, v, return_lse=True, **options)
        outs.append(out.swapaxes(0, 1))
        lses.append(lse.T)
        first += n
    return np.concatenate(outs), np.concatenate(lses)


def expect_same(q: np.ndarray, batch: Batch, qo_lens: list[int] | None, **options: Any) -> None:
    """The same bits in pages as side by side, with one thread and with two, in one call."""
    lens = [1] * len(batch.keys) if qo_lens is None else qo_lens
    want, want_lse = side_by_side(q, batch, lens, **options)
    qo_indptr = None if qo_lens is None else np.concatenate([[0], np.cumsum(qo_lens)])
    for threads in (1, 2):
        out, lse = mkv.attention_paged(
            q,
            batch.pages,
            *batch.table,
            qo_indptr=qo_indptr,
            return_lse=True,
            threads=threads,
            **options,
        )
        assert out.dtype == lse.dtype == np.float32
        np.testing.assert_array_equal(out.view(np.uint32), want.view(np.uint32))
        np.testing.assert_array_equal(lse, want_lse)


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("k_kind", KV_TYPES)
@pytest.mark.parametrize("v_kind", KV_TYPES)
def test_paged_decode(
    isa: str, rng: np.random.Generator, page_size: int, k_kind: str, v_kind: str
) -> None:
    batch = make_batch(rng, [70, 1, 0, 333, 16], page_size, k_kind, v_kind)
    expect_same(normal(rng, 5, HEADS, DIM), batch, None)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window_left": 20},
        {"window_left": 20, "window_right": 3},
        {"causal": True, "compute_type": "bf16"},
        {"logits_soft_cap": 2.0, "sm_scale": 0.3},
    ],
    ids=["all", "causal", "window", "window_both", "bf16", "soft_cap"],
)
def test_paged_ragged(
    isa: str, rng: np.random.Generator, page_size: int, kind: str, options: dict[str, Any]
) -> None:
    qo_lens = [3, 0, 40, 1, 7, 2]
    batch = make_batch(rng, [50, 9, 290, 0, 5, 64], page_size, kind, kind)
    expect_same(normal(rng, sum(qo_lens), HEADS, DIM), batch, qo_lens, **options)


def test_paged_slopes_and_sinks(isa: str, rng: np.random.Generator) -> None:
    qo_lens = [3, 5]
    batch = make_batch(rng, [50, 90], 16)
    slopes, sinks = normal(rng, HEADS), normal(rng, HEADS)
    q = normal(rng, 8, HEADS, DIM)
    expect_same(q, batch, qo_lens, causal=True, alibi_slopes=slopes, sinks=sinks)


@pytest.mark.parametrize("kind", KV_TYPES)
def test_paged_long_sequences(isa: str, rng: np.random.Generator, kind: str) -> None:
    """Long enough to be cut into pieces, each sequence as if it came alone."""
    batch = make_batch(rng, [5000, 300, 2900], 17, kind, kind)
    expect_same(normal(rng, 3, HEADS, DIM), batch, None, causal=True)


def test_paged_pages_shared_and_repeated(isa: str, rng: np.random.Generator) -> None:
    """Two sequences with a prefix in common, and one that has a page twice."""
    pool = make_batch(rng, [64], 16)
    indices = [2, 0, 1, 2, 0, 3, 1, 1]
    indptr, last = [0, 3, 6, 8], [16, 5, 16]
    k, v = ([p[i] for i in indices] for p in (np.nan_to_num(x, nan=0.5) for x in pool.pages))
    ends = list(zip(itertools.pairwise(indptr), last, strict=True))
    batch = Batch(
        [np.concatenate(k[a:b], axis=1)[:, : 16 * (b - a - 1) + n] for (a, b), n in ends],
        [np.concatenate(v[a:b], axis=1)[:, : 16 * (b - a - 1) + n] for (a, b), n in ends],
        *(np.nan_to_num(x, nan=0.5) for x in pool.pages),
        np.array(indptr),
        np.array(indices),
        np.array(last),
    )
    expect_same(normal(rng, 3, HEADS, DIM), batch, None)


# --- against float64 ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["all", "causal"])
def test_paged_reference(
    isa: str, rng: np.random.Generator, kind: str, options: dict[str, Any]
) -> None:
    lengths, qo_lens = [50, 0, 290, 5], [3, 2, 20, 9]
    batch = make_batch(rng, lengths, 16, kind, kind)
    q = normal(rng, sum(qo_lens), HEADS, DIM)
    starts = np.concatenate([[0], np.cumsum(qo_lens)])
    out, lse = mkv.attention_paged(
        q, batch.pages, *batch.table, qo_indptr=starts, return_lse=True, **options
    )
    for b, (first, end) in enumerate(itertools.pairwise(starts)):
        if lengths[b] == 0:
            np.testing.assert_array_equal(out[first:end], 0.0)
            np.testing.assert_array_equal(lse[first:end], -np.inf)
            continue
        one = q[first:end].swapaxes(0, 1)
        want, want_lse = ref.attention(
            values_of(one), values_of(batch.keys[b]), values_of(batch.values[b]), **options
        )
        assert_close(out[first:end].swapaxes(0, 1), want[0], tolerance(kind))
        assert_lse_close(lse[first:end].T, want_lse[0], tolerance(kind))


# --- how pages may come -------------------------------------------------------------------------


def test_paged_layouts(rng: np.random.Generator) -> None:
    """HND, NHD, one array of both, gaps between pages, pages in reverse: the same bits."""
    batch = make_batch(rng, [50, 90], 16, dims=(DIM, DIM))
    q = normal(rng, 2, HEADS, DIM)
    want = mkv.attention_paged(q, batch.pages, *batch.table)

    def check(kv_pages: Any, table: Any = batch.table, **options: Any) -> None:
        out = mkv.attention_paged(q, kv_pages, *table, **options)
        np.testing.assert_array_equal(out, want)

    k, v = batch.pages
    check(list(batch.pages))
    check(np.stack(batch.pages, axis=1))
    check((np.ascontiguousarray(k.swapaxes(1, 2)), v.swapaxes(1, 2)), layout="NHD")
    check(np.stack([k.swapaxes(1, 2), v.swapaxes(1, 2)], axis=1), layout="NHD")
    wide = np.zeros((len(k), 3, 40, DIM + 2), np.float16)  # strides that share little
    wide[:, :2, 5:37:2, :DIM] = k
    check((wide[:, :2, 5:37:2, :DIM], v))
    backwards = len(k) - 1 - batch.indices
    check((k[::-1], v[::-1]), (batch.indptr, backwards, batch.last_page_len))
    check(batch.pages, [x.astype(np.int64) for x in batch.table])
    check(batch.pages, [x.tolist() for x in batch.table])
    longer = np.append(batch.indices, [-5, 10**6])  # what lies beyond indptr's end is not looked at
    check(batch.pages, (batch.indptr, longer, batch.last_page_len))


def test_paged_out(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [50, 90], 16)
    q = normal(rng, 2, HEADS, DIM)
    want = mkv.attention_paged(q, batch.pages, *batch.table)
    out = np.full((2, HEADS, 2 * DIM_V), 7.0, np.float32)[..., :DIM_V]
    assert mkv.attention_paged(q, batch.pages, *batch.table, out=out) is out
    np.testing.assert_array_equal(out, want)


def test_paged_nothing(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [], 16)
    out, lse = mkv.attention_paged(
        np.empty((0, HEADS, DIM), np.float32), batch.pages, *batch.table, return_lse=True
    )
    assert out.shape == (0, HEADS, DIM_V)
    assert lse.shape == (0, HEADS)
    empty = (
        np.empty((0, KV_HEADS, 16, DIM), np.float16),
        np.empty((0, KV_HEADS, 16, DIM_V), np.float16),
    )
    out = mkv.attention_paged(normal(rng, 2, HEADS, DIM), empty, [0, 0, 0], [], [0, 9])
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_paged_torch(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    batch = make_batch(rng, [50, 90], 16, "f32", "f32")
    q = torch.from_numpy(normal(rng, 2, HEADS, DIM)).to(dtype)
    pages = tuple(torch.from_numpy(x).to(dtype) for x in batch.pages)
    table = [torch.from_numpy(x) for x in batch.table]
    out, lse = mkv.attention_paged(q, pages, *table, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    same = [x.float().numpy() for x in (q, *pages)]
    want, want_lse = mkv.attention_paged(same[0], same[1:], *batch.table, return_lse=True)
    assert_close(out.double().numpy(), want, 1e-6 if name == "float32" else 5e-3)
    assert_lse_close(lse.numpy(), want_lse, 1e-6)


# --- what is refused ----------------------------------------------------------------------------


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
    "indptr_short": ("indptr", lambda x: x[:-1], r"indptr must have an entry more .* 3, got 2"),
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
    "queries_short": ({"qo_indptr": [0, 2]}, "qo_indptr must have an entry more"),
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
    with pytest.raises(ValueError, match="one query for each of 2 sequences"):
        mkv.attention_paged(normal(rng, 3, HEADS, DIM), batch.pages, *batch.table)
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
