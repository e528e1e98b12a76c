"""What tests of carried state share: sizes, states of whole inputs, and comparing two."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
from conftest import (
    F32_EPS,
    as_kind,
    assert_close,
    normal,
)

B, HQ, HKV, LQ, LKV, D, DV = 2, 6, 3, 5, 41, 32, 64
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def make(rng: np.random.Generator, k_kind: str = "f32", v_kind: str | None = None) -> Arrays:
    q = normal(rng, B, HQ, LQ, D)
    k = as_kind(normal(rng, B, HKV, LKV, D), k_kind)
    return q, k, as_kind(normal(rng, B, HKV, LKV, DV), v_kind or k_kind)


def new_state(**sizes: int) -> mkv.AttentionState:
    return mkv.AttentionState(
        **{"num_qo_heads": HQ, "qo_len": LQ, "head_dim": DV, "batch": B, **sizes}
    )


def state_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> mkv.AttentionState:
    st = new_state()
    st.update(q, k, v, **options)
    return st


def same_state(a: mkv.AttentionState, b: mkv.AttentionState) -> None:
    np.testing.assert_array_equal(a.M, b.M)
    np.testing.assert_array_equal(a.S, b.S)
    seen = np.isfinite(a.M)
    np.testing.assert_array_equal(np.asarray(a.acc)[seen], np.asarray(b.acc)[seen])


def close_states(a: Any, b: Any, rel: float = 64 * F32_EPS) -> None:
    """The same rows, whichever maximum each of them is kept against."""
    seen = np.isfinite(np.asarray(b.M))
    np.testing.assert_array_equal(np.isfinite(np.asarray(a.M)), seen)
    for x in (a, b):
        assert np.all(np.asarray(x.S)[~seen] == 0)
    am, bm = np.asarray(a.M, np.float64)[seen], np.asarray(b.M, np.float64)[seen]
    assert_close(np.asarray(a.S)[seen] * np.exp(am - bm), np.asarray(b.S)[seen], rel)
    assert_close(np.asarray(a.acc)[seen] * np.exp(am - bm)[:, None], np.asarray(b.acc)[seen], rel)
