"""Batches of sequences in pages, for the tests of attention_paged()."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from conftest import as_kind, normal

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
