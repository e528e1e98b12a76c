"""Carried state: what an accumulator holds before, between and beside what its rows see."""

from __future__ import annotations

import tracemalloc
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    F32_EPS,
    SPLIT_ABS,
    as_kind,
    assert_close,
    assert_lse_close,
    normal,
    relative_error,
    tolerance,
    values_of,
)
from state_cases import (
    DV,
    HKV,
    HQ,
    LKV,
    LQ,
    B,
    D,
    make,
    new_state,
    state_of,
)

# --- the accumulator ------------------------------------------------------------------------------


def test_state_garbage_in_acc_is_dropped_while_m_is_minus_inf(
    isa: str, rng: np.random.Generator, kv_type: str
) -> None:
    q, k, v = make(rng, kv_type)
    want = mkv.attention(q, k, v)
    for garbage in (np.nan, np.inf, -np.inf, 1e38):
        st = new_state()
        st.acc[...] = garbage
        st.update(q, k, v)
        np.testing.assert_array_equal(st.finalize(), want)


def test_state_garbage_in_acc_of_unseeing_rows_never_shows(
    isa: str, rng: np.random.Generator
) -> None:
    """Rows see their first key in different segments, over an acc of NaN."""
    q, k, v = make(rng, "f16")
    mask = np.zeros((LQ, LKV), bool)
    for i in range(LQ - 1):
        mask[i, 10 * i : 10 * i + 3] = True
    st = new_state()
    st.acc[...] = np.nan
    for i in range(0, LKV, 7):
        j = min(i + 7, LKV)
        st.update(q, k[:, :, i:j], v[:, :, i:j], mask=mask[:, i:j])
    want, want_lse = ref.attention(q, values_of(k), values_of(v), mask=mask)
    out, lse = st.finalize(return_lse=True)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    assert np.all(np.asarray(out)[:, :, LQ - 1] == 0)


@pytest.mark.parametrize("qo_len", [0, 1, 4])
@pytest.mark.parametrize("batch", [0, 2])
def test_state_without_rows_is_as_attention_has_it(
    rng: np.random.Generator, batch: int, qo_len: int
) -> None:
    q = normal(rng, batch, HQ, qo_len, D)
    k, v = normal(rng, batch, HKV, 9, D), normal(rng, batch, HKV, 9, DV)
    want, want_lse = mkv.attention(q, k, v, return_lse=True)
    st = new_state(batch=batch, qo_len=qo_len)
    assert st.finalize().shape == want.shape == (batch, HQ, qo_len, DV)
    st.update(q, k, v, causal=True, q_start=8, kv_start=0)
    twin = mkv.merge([st, st.copy()])
    twin.reset()
    st.update(q, k[:, :, :0], v[:, :, :0])
    assert twin.ms.shape == st.ms.shape == (batch, HQ * qo_len, 2)
    assert st.acc.shape == want.shape
    out, lse = st.finalize(return_lse=True, sinks=np.zeros(HQ, np.float32))
    assert out.shape == want.shape
    assert lse.shape == want_lse.shape == (batch, HQ, qo_len)


def test_state_and_attention_refuse_no_heads_alike() -> None:
    with pytest.raises(ValueError, match=r"num_qo_heads.*0"):
        new_state(num_qo_heads=0)
    none, k = np.ones((B, 0, LQ, D), np.float32), np.ones((B, HKV, LKV, D), np.float32)
    with pytest.raises(ValueError, match=r"heads of q.*0"):
        mkv.attention(none, k, k)
    with pytest.raises(ValueError, match=r"heads of q.*0"):
        new_state().update(none, k, k)


@pytest.mark.parametrize("kinds", [("f32", "f32"), ("f16", "q4_0"), ("q4_0", "f16")], ids=str)
@pytest.mark.parametrize("shared", ["k", "v", "kv"])
@pytest.mark.parametrize("qo_len", [1, 20])
def test_one_batch_of_keys_serves_all_rows_of_q(
    rng: np.random.Generator, kinds: tuple[str, str], shared: str, qo_len: int
) -> None:
    batch = 3
    q = normal(rng, batch, HQ, qo_len, D)
    k = as_kind(normal(rng, 1 if "k" in shared else batch, HKV, LKV, D), kinds[0])
    v = as_kind(normal(rng, 1 if "v" in shared else batch, HKV, LKV, DV), kinds[1])
    mask = rng.random((batch, 1, qo_len, LKV)) < 0.7
    full_k = np.repeat(k, batch // len(k), axis=0)
    full_v = np.repeat(v, batch // len(v), axis=0)
    want = mkv.attention(q, full_k, full_v, mask=mask)
    np.testing.assert_array_equal(mkv.attention(q, k, v, mask=mask), want)
    by_hand, _ = ref.attention(q, values_of(full_k), values_of(full_v), mask=mask)
    assert_close(want, by_hand, rel=tolerance(*kinds))
    nhd = [x.swapaxes(1, 2) for x in (q, k, v)]
    np.testing.assert_array_equal(mkv.attention(*nhd, mask=mask, layout="NHD").swapaxes(1, 2), want)
    st = new_state(batch=batch, qo_len=qo_len)
    st.update(q, k[:, :, :11], v[:, :, :11], mask=mask[..., :11])
    st.update(q, full_k[:, :, 11:], v[:, :, 11:], mask=mask[..., 11:])
    assert_close(st.finalize(), by_hand, rel=tolerance(*kinds))


def test_one_batch_of_keys_is_not_copied(rng: np.random.Generator) -> None:
    q, k = normal(rng, 512, 2, 1, 64), normal(rng, 1, 1, 4096, 64)
    tracemalloc.start()
    out = mkv.attention(q, k, k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes + k.nbytes
    assert_close(out[7], mkv.attention(q[7], k[0], k[0]))
    assert mkv.attention(q[:0], k, k).shape == (0, 2, 1, 64)


@pytest.mark.torch
def test_one_batch_of_keys_in_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 5, 32), torch.randn(1, 4, 9, 32), torch.randn(1, 4, 9, 64)
    want = torch.nn.functional.scaled_dot_product_attention(q, k.expand(3, -1, -1, -1), v)
    got = mkv.attention(q, k, v)
    assert relative_error(got.numpy(), want.numpy()) < 1e-5


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_of_another_batch_are_refused(name: str) -> None:
    q, k = np.ones((4, 2, 1, 8), np.float32), np.ones((4, 2, 3, 8), np.float32)
    arrays = {"k": k, "v": k} | {name: k[:2]}
    with pytest.raises(ValueError, match=f"{name} must have q's batch 4, or 1, got 2"):
        mkv.attention(q, **arrays)
    with pytest.raises(ValueError, match="k must have q's batch 1, got 4"):
        mkv.attention(q[:1], k, k)


def test_state_finalize_of_garbage_that_saw_nothing_is_zero() -> None:
    st = new_state()
    st.acc[...] = np.nan
    out, lse = st.finalize(return_lse=True)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_state_finite_m_never_resets(isa: str, rng: np.random.Generator) -> None:
    """However low M is, what was accumulated stays."""
    q, k, v = make(rng)
    low = np.full((LQ, LKV), -1e30, np.float32)
    st = state_of(q, k, v, mask=low)
    assert np.all(np.isfinite(st.M))
    assert np.all(st.M < -1e29)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    st.update(q, k, v, mask=np.full((LQ, LKV), -np.inf, np.float32))
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)
    st.update(q, k, v, mask=low)
    np.testing.assert_allclose(st.S, 2 * before[1], rtol=1e-6)
    st.acc[...] = np.nan  # finite M: this counts as seen
    st.update(q, k, v, mask=low)
    assert np.isnan(st.finalize()).all()


@pytest.mark.parametrize("how", ["mask_bool", "mask_f32", "causal", "window", "no_keys"])
def test_state_segment_without_visible_keys_leaves_state(
    isa: str, rng: np.random.Generator, how: str
) -> None:
    q, k, v = make(rng)
    options: dict[str, Any] = {
        "mask_bool": {"mask": np.zeros((LQ, LKV), bool)},
        "mask_f32": {"mask": np.full((LQ, LKV), -np.inf, np.float32)},
        "causal": {"causal": True, "q_start": 0, "kv_start": LQ},
        "window": {"window_left": 3, "q_start": 100, "kv_start": 0},
        "no_keys": {},
    }[how]
    if how == "no_keys":
        k, v = k[:, :, :0], v[:, :, :0]
    fresh = state_of(q, k, v, **options)
    assert np.all(np.isneginf(fresh.M))
    assert np.all(fresh.S == 0)
    _, k1, v1 = make(rng)
    st = state_of(q, k1, v1)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    st.update(q, k, v, **options)
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("times", [2, 3, 10])
def test_state_same_keys_again_multiply_s(
    isa: str, rng: np.random.Generator, times: int, kv_type: str
) -> None:
    q, k, v = make(rng, kv_type)
    once, again = state_of(q, k, v), state_of(q, k, v)
    for _ in range(times - 1):
        again.update(q, k, v)
    np.testing.assert_array_equal(again.M, once.M)
    np.testing.assert_allclose(again.S, times * np.asarray(once.S), rtol=times * 4 * F32_EPS)
    assert np.max(np.abs(again.finalize() - once.finalize())) < SPLIT_ABS
