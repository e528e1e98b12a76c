"""attention_paged(): pages give the bits of the same keys side by side, and float64's values."""

from __future__ import annotations

import itertools
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    KV_TYPES,
    assert_close,
    assert_lse_close,
    normal,
    tolerance,
    values_of,
)
from paged_cases import DIM, DIM_V, HEADS, KV_HEADS, Batch, make_batch

PAGE_SIZES = (1, 3, 16, 17, 64)


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
