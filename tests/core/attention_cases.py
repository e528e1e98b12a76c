"""What tests of attention() share: sizes, inputs, and the comparison with the reference."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import reference as ref
from conftest import (
    as_kind,
    assert_close,
    assert_lse_close,
    normal,
    values_of,
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

# (B, Hq, Hkv, Lq, Lkv, D, Dv): within a case all sizes differ wherever they can.
SIZES = {
    "one_query": (1, 6, 2, 1, 77, 64, 64),
    "prefill": (2, 6, 3, 13, 45, 32, 96),
    "more_queries_than_keys": (3, 4, 2, 19, 5, 64, 32),
    "one_head": (2, 1, 1, 5, 300, 96, 64),
    "gqa_9_3": (1, 9, 3, 7, 33, 64, 128),
    "gqa_8_1": (1, 8, 1, 4, 1030, 128, 96),
    "no_gqa": (2, 5, 5, 3, 17, 32, 64),
}
HEAD_DIMS = [4, 8, 32, 64, 80, 96, 128, 512]


def make(
    rng: np.random.Generator, sizes: tuple[int, ...], k_kind: str = "f32", v_kind: str = "f32"
) -> Arrays:
    """q f32, k and v of their kinds."""
    B, Hq, Hkv, Lq, Lkv, D, Dv = sizes
    q = normal(rng, B, Hq, Lq, D)
    k = as_kind(normal(rng, B, Hkv, Lkv, D), k_kind)
    return q, k, as_kind(normal(rng, B, Hkv, Lkv, Dv), v_kind)


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, rel: float, **options: Any) -> None:
    """Library against reference, out and lse."""
    want, want_lse = ref.attention(values_of(q), values_of(k), values_of(v), **options)
    out, lse = mkv.attention(q, k, v, return_lse=True, **options)
    assert out.dtype == np.float32
    assert lse.dtype == np.float32
    if q.ndim == 3:
        want, want_lse = want[0], want_lse[0]
    assert_close(out, want, rel)
    assert_lse_close(lse, want_lse, rel)
    np.testing.assert_array_equal(mkv.attention(q, k, v, **options), out)
