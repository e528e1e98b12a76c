"""Carried state: splitting, continuing, merging, finalizing."""

from __future__ import annotations

import tracemalloc
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    DEBUG_ABS,
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


# --- the debug case, one key at a time ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("parts", [[(0, 2)], [(0, 1), (1, 2)], [(1, 2), (0, 1)]], ids=str)
def test_state_debug_case(isa: str, kind: str, parts: list[tuple[int, int]]) -> None:
    q = np.array([1, 0, 0, 0], np.float32).reshape(1, 1, 1, 4)
    k = as_kind(np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)[None, None], kind)
    v = as_kind(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)[None, None], kind)
    st = mkv.AttentionState(num_qo_heads=1, qo_len=1, head_dim=4, batch=1)
    for i, j in parts:
        st.update(q, k[:, :, i:j], v[:, :, i:j], sm_scale=0.5)
    want = [2.510163, 3.510163, 4.510163, 5.510163]
    np.testing.assert_allclose(st.finalize()[0, 0, 0], want, rtol=0, atol=DEBUG_ABS)
    np.testing.assert_allclose(st.ms[0, 0], [0.5, 1.606531], rtol=0, atol=DEBUG_ABS)


# --- segments against the whole -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_state_every_split_equals_whole(isa: str, rng: np.random.Generator, kind: str) -> None:
    q, k, v = make(rng, kind)
    whole = mkv.attention(q, k, v)
    want, want_lse = ref.attention(q, values_of(k), values_of(v))
    for at in range(LKV + 1):
        st = state_of(q, k[:, :, :at], v[:, :, :at])
        st.update(q, k[:, :, at:], v[:, :, at:])
        out, lse = st.finalize(return_lse=True)
        assert np.max(np.abs(out - whole)) < SPLIT_ABS, f"split at {at}"
        assert_close(out, want)
        assert_lse_close(lse, want_lse)


def test_state_every_split_equals_whole_q4_0(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, "q4_0")
    want, _ = ref.attention(q, values_of(k), values_of(v))
    for at in range(LKV + 1):
        st = state_of(q, k[:, :, :at], v[:, :, :at])
        st.update(q, k[:, :, at:], v[:, :, at:])
        assert relative_error(st.finalize(), want) <= tolerance("q4_0"), f"split at {at}"


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_state_one_key_at_a_time_equals_whole(
    isa: str, rng: np.random.Generator, kind: str
) -> None:
    q, k, v = make(rng, kind)
    st = new_state()
    for j in range(LKV):
        st.update(q, k[:, :, j : j + 1], v[:, :, j : j + 1])
    assert np.max(np.abs(st.finalize() - mkv.attention(q, k, v))) < SPLIT_ABS


def test_state_random_splits_with_options_equal_whole() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st_

    @given(st_.data())
    def run(data: st_.DataObject) -> None:
        draw = data.draw
        rng = np.random.default_rng(draw(st_.integers(0, 2**32), "seed"))
        kind = draw(st_.sampled_from(["f32", "f16"]))
        q, k, v = make(rng, kind)
        cuts = sorted(draw(st_.lists(st_.integers(0, LKV), max_size=6), "cuts"))
        edges = list(zip([0, *cuts], [*cuts, LKV], strict=True))
        if draw(st_.booleans(), "other order"):
            edges = draw(st_.permutations(edges))
        options: dict[str, Any] = {}
        if draw(st_.booleans()):
            options["causal"] = True
        if draw(st_.booleans()):
            options["window_left"] = draw(st_.integers(0, LKV))
        if draw(st_.booleans()):
            options["logits_soft_cap"] = 2.0
        mask = None
        if draw(st_.booleans()):
            mask = normal(rng, B, HQ, LQ, LKV)
            mask[rng.random(mask.shape) < 0.4] = -np.inf
        if mask is None and draw(st_.booleans()):
            options["alibi_slopes"] = (0.5 ** np.arange(HQ)).astype(np.float32)
        sinks = normal(rng, HQ) if draw(st_.booleans()) else None
        q_start = draw(st_.integers(-3, LKV + 3), "q_start")

        positions = {"q_start": q_start}
        state = new_state()
        for i, j in edges:
            state.update(
                q, k[:, :, i:j], v[:, :, i:j], kv_start=i, **positions, **options,
                mask=None if mask is None else mask[..., i:j],
            )  # fmt: skip
        out, lse = state.finalize(sinks=sinks, return_lse=True)
        want, want_lse = ref.attention(
            q, values_of(k), values_of(v),
            kv_start=0, mask=mask, sinks=sinks, **positions, **options,
        )  # fmt: skip
        assert np.max(np.abs(out - want)) < SPLIT_ABS
        assert_lse_close(lse, want_lse)

    run()


def test_state_update_of_whole_equals_attention_bit_for_bit(
    isa: str, rng: np.random.Generator, kv_type: str
) -> None:
    q, k, v = make(rng, kv_type)
    out, lse = mkv.attention(q, k, v, return_lse=True)
    got, got_lse = state_of(q, k, v).finalize(return_lse=True)
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(got_lse, lse)


@pytest.mark.parametrize("kv_len", [1, 300, 5000])
def test_state_update_of_long_whole_equals_attention_bit_for_bit(
    isa: str, rng: np.random.Generator, kv_len: int
) -> None:
    q, k, v = normal(rng, 1, 4, 1, 64), normal(rng, 1, 2, kv_len, 64), normal(rng, 1, 2, kv_len, 32)
    sinks = normal(rng, 4)
    st = mkv.AttentionState(num_qo_heads=4, qo_len=1, head_dim=32, batch=1)
    st.update(q, k, v, sm_scale=0.2)
    np.testing.assert_array_equal(
        st.finalize(sinks=sinks), mkv.attention(q, k, v, sm_scale=0.2, sinks=sinks)
    )


def test_state_causal_update_equals_attention_bit_for_bit(rng: np.random.Generator) -> None:
    q, k, v = make(rng, "f16")
    st = state_of(q, k, v, causal=True, q_start=LKV - LQ, kv_start=0)
    np.testing.assert_array_equal(st.finalize(), mkv.attention(q, k, v, causal=True))


@pytest.mark.parametrize("start", [1000, -1000, 2**31 - 10, -(2**35), 2**40 - 30], ids=str)
def test_state_positions_matter_by_their_difference_alone(
    rng: np.random.Generator, start: int
) -> None:
    q, k, v = make(rng)
    slopes = (0.5 ** np.arange(HQ)).astype(np.float32)
    options = {"causal": True, "window_left": 9, "alibi_slopes": slopes}
    a = state_of(q, k, v, q_start=20, kv_start=0, **options)
    b = state_of(q, k, v, q_start=start + 20, kv_start=start, **options)
    same_state(a, b)


def test_state_mixed_segments_of_all_kinds(isa: str, rng: np.random.Generator) -> None:
    """Cold, hot and new keys in one row, K and V of different kinds."""
    q = normal(rng, B, HQ, LQ, D)
    state, want = new_state(), ref.State.empty(B, HQ, LQ, DV)
    kinds = [("q4_0", "q4_0"), ("f16", "f16"), ("f32", "f32"), ("q4_0", "f16"), ("f16", "q4_0")]
    for i, (k_kind, v_kind) in enumerate(kinds):
        k = as_kind(normal(rng, B, HKV, 7 + i, D), k_kind)
        v = as_kind(normal(rng, B, HKV, 7 + i, DV), v_kind)
        state.update(q, k, v)
        want.update(q, values_of(k), values_of(v))
    out, lse = state.finalize(return_lse=True)
    want_out, want_lse = want.finalize()
    assert_close(out, want_out, tolerance("q4_0"))
    assert_lse_close(lse, want_lse, tolerance("q4_0"))


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


# --- views and layout -----------------------------------------------------------------------------


def test_state_initial_values() -> None:
    st = new_state()
    assert st.M.shape == st.S.shape == (B, HQ, LQ)
    assert st.acc.shape == (B, HQ, LQ, DV)
    assert st.ms.shape == (B, HQ * LQ, 2)
    for x in (st.M, st.S, st.acc, st.ms):
        assert x.dtype == np.float32
    assert np.all(np.isneginf(st.M))
    assert np.all(st.S == 0)


def test_state_ms_layout(rng: np.random.Generator) -> None:
    """M first, then S; row index head * qo_len + position."""
    st = state_of(*make(rng))
    for b, h, i in np.ndindex(B, HQ, LQ):
        assert st.ms[b, h * LQ + i, 0] == st.M[b, h, i]
        assert st.ms[b, h * LQ + i, 1] == st.S[b, h, i]


def test_state_views_are_writable_and_shared(rng: np.random.Generator) -> None:
    st = new_state()
    st.M[1, 2, 3] = 5.0
    st.S[1, 2, 3] = 7.0
    np.testing.assert_array_equal(st.ms[1, 2 * LQ + 3], [5.0, 7.0])
    st.ms[0, 1 * LQ + 4] = [1.0, 2.0]
    assert st.M[0, 1, 4] == 1.0
    assert st.S[0, 1, 4] == 2.0
    st.acc[0, 1, 4] = 6.0
    out, lse = st.finalize(return_lse=True)
    np.testing.assert_array_equal(out[0, 1, 4], np.full(DV, 3.0))
    np.testing.assert_allclose(lse[0, 1, 4], 1.0 + np.log(2.0), rtol=1e-6)


def test_state_carried_by_hand_into_another(rng: np.random.Generator) -> None:
    """M, S and acc are all there is: written into a new state they continue."""
    q, k, v = make(rng)
    st = state_of(q, k[:, :, :20], v[:, :, :20])
    other = new_state()
    other.ms[...], other.acc[...] = st.ms, st.acc
    for x in (st, other):
        x.update(q, k[:, :, 20:], v[:, :, 20:])
    same_state(st, other)


def test_state_acc_is_unnormalised(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    close_states(state_of(q, k, v), ref.State.of(q, k, v))


def test_state_update_without_batch(rng: np.random.Generator) -> None:
    q, k, v = (x[:1] for x in make(rng))
    want, want_lse = mkv.attention(q, k, v, return_lse=True)
    st = new_state(batch=1)
    st.update(q[0], k[0], v[0])
    out, lse = st.finalize(return_lse=True)
    assert out.shape == (HQ, LQ, DV)
    assert lse.shape == (HQ, LQ)
    np.testing.assert_array_equal(out, want[0])
    st.update(q, k, v)
    assert st.finalize().shape == (1, HQ, LQ, DV)
    np.testing.assert_allclose(want_lse[0], lse)


def test_state_update_does_not_write_inputs(rng: np.random.Generator) -> None:
    arrays = make(rng)
    for x in arrays:
        x.flags.writeable = False
    state_of(*arrays)


def test_state_threads_same_bits(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, kv_type)
    one = state_of(q, k, v, threads=1)
    for threads in (2, 5):
        same_state(state_of(q, k, v, threads=threads), one)


# --- finalize -------------------------------------------------------------------------------------


def test_state_finalize_before_any_update_gives_zeros() -> None:
    out, lse = new_state().finalize(return_lse=True)
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    assert out.shape == (B, HQ, LQ, DV)
    assert np.all(out == 0)
    assert lse.shape == (B, HQ, LQ)
    assert np.all(np.isneginf(lse))


def test_state_finalize_twice_gives_the_same_and_keeps_state(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    a = st.finalize(sinks=normal(rng, HQ))
    b = st.finalize()
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(b, mkv.attention(q, k, v))
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_state_sinks_enter_once(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st, want = new_state(), ref.State.empty(B, HQ, LQ, DV)
    for i in range(0, LKV, 10):
        st.update(q, k[:, :, i : i + 10], v[:, :, i : i + 10])
        want.update(q, k[:, :, i : i + 10], v[:, :, i : i + 10])
    for shift in (-80.0, 0.0, 80.0):
        sinks = normal(rng, HQ) + np.float32(shift)
        out, lse = st.finalize(sinks=sinks, return_lse=True)
        want_out, want_lse = want.finalize(sinks)
        np.testing.assert_allclose(out, want_out, atol=SPLIT_ABS)
        assert_lse_close(lse, want_lse)


def test_state_sinks_of_empty_rows_change_nothing(rng: np.random.Generator) -> None:
    out, lse = new_state().finalize(sinks=normal(rng, HQ), return_lse=True)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_state_finalize_into_out(rng: np.random.Generator) -> None:
    st = state_of(*make(rng))
    out = np.full((B, HQ, LQ, DV), np.nan, np.float32)
    assert st.finalize(out=out) is out
    np.testing.assert_array_equal(out, st.finalize())


def test_state_reset(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    st.reset()
    assert np.all(np.isneginf(st.M))
    assert np.all(st.S == 0)
    st.update(q, k, v)
    np.testing.assert_array_equal(st.finalize(), mkv.attention(q, k, v))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_state_gives_what_q_was(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in make(rng))
    st = new_state()
    st.update(q, k, v)
    out, lse = st.finalize(return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    want, _ = ref.attention(*(x.double().numpy() for x in (q, k, v)))
    assert relative_error(out.float().numpy(), want) <= max(float(torch.finfo(dtype).eps), 1e-6)
    assert isinstance(lse, torch.Tensor)


# --- merge ----------------------------------------------------------------------------------------


def three_states(rng: np.random.Generator) -> tuple[list[mkv.AttentionState], ref.State]:
    q, k, v = make(rng, "f16")
    whole = ref.State.of(q, values_of(k), values_of(v))
    cuts = [(0, 9), (9, 30), (30, LKV)]
    return [state_of(q, k[:, :, i:j], v[:, :, i:j]) for i, j in cuts], whole


def test_merge_gives_the_union(rng: np.random.Generator) -> None:
    states, whole = three_states(rng)
    before = [np.array(x) for s in states for x in (s.M, s.S, s.acc)]
    merged = mkv.merge(states)
    close_states(merged, whole)
    after = [x for s in states for x in (s.M, s.S, s.acc)]
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_merge_order_is_rounding(rng: np.random.Generator, order: tuple[int, ...]) -> None:
    states, whole = three_states(rng)
    close_states(mkv.merge([states[i] for i in order]), whole)


def test_merge_in_place_and_grouping(rng: np.random.Generator) -> None:
    (a, b, c), whole = three_states(rng)
    b.merge_(c)
    a.merge_(b)
    close_states(a, whole)


def test_merge_empty_is_neutral(rng: np.random.Generator) -> None:
    (a, *_), _ = three_states(rng)
    keep = [np.array(x) for x in (a.M, a.S, a.acc)]
    empty = new_state()
    empty.acc[...] = np.nan
    a.merge_(empty)
    for x, y in zip((a.M, a.S, a.acc), keep, strict=True):
        np.testing.assert_array_equal(x, y)
    empty.merge_(a)
    same_state(empty, a)
    same_state(mkv.merge([a]), a)
    garbage = new_state()
    garbage.acc[...] = np.nan
    both = mkv.merge([garbage, new_state(), garbage])
    assert np.all(np.isneginf(both.M))
    assert np.all(both.finalize() == 0)


def test_merge_rows_are_empty_one_by_one(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    left = np.zeros((LQ, LKV), bool)
    left[:2, :5] = True
    right = np.zeros((LQ, LKV), bool)
    right[1:4, 9:20] = True
    a, b = state_of(q, k, v, mask=left), state_of(q, k, v, mask=right)
    a.acc[:, :, 2:] = np.nan
    b.acc[:, :, 0] = np.nan
    b.acc[:, :, 4:] = np.nan
    out, lse = mkv.merge([a, b]).finalize(return_lse=True)
    want, want_lse = ref.attention(q, k, v, mask=left | right)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)


def test_merge_continues(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    merged = mkv.merge([state_of(q, k[:, :, i:j], v[:, :, i:j]) for i, j in ((0, 10), (10, 20))])
    merged.update(q, k[:, :, 20:], v[:, :, 20:])
    assert np.max(np.abs(merged.finalize() - mkv.attention(q, k, v))) < SPLIT_ABS


def test_merge_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="qo_len=6"):
        new_state().merge_(new_state(qo_len=LQ + 1))
    with pytest.raises(ValueError, match="head_dim=128"):
        mkv.merge([new_state(), new_state(head_dim=DV * 2)])
    with pytest.raises(ValueError, match="states"):
        mkv.merge([])
    with pytest.raises((TypeError, ValueError)):
        mkv.merge([new_state(), None])


def test_merge_with_itself_doubles_s(rng: np.random.Generator) -> None:
    st = state_of(*make(rng))
    before, out = np.array(st.S), st.finalize()
    st.merge_(st)
    np.testing.assert_allclose(st.S, 2 * before, rtol=2 * F32_EPS)
    np.testing.assert_allclose(st.finalize(), out, rtol=1e-5, atol=1e-6)


# --- merge_state, merge_states --------------------------------------------------------------------


def parts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three normalised results, and what they should merge to."""
    q, k, v = make(rng)
    pairs = [
        mkv.attention(q, k[:, :, i:j], v[:, :, i:j], return_lse=True)
        for i, j in ((0, 3), (3, 30), (30, LKV))
    ]
    want, want_lse = ref.attention(q, k, v)
    return np.stack([o for o, _ in pairs]), np.stack([s for _, s in pairs]), want, want_lse


def test_merge_states_gives_the_union(isa: str, rng: np.random.Generator) -> None:
    outs, lses, want, want_lse = parts(rng)
    out, lse = mkv.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    again, again_lse = ref.merge_states(outs, lses)
    assert_close(out, again)
    assert_lse_close(lse, again_lse)


def test_merge_state_of_two_is_merge_states(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    a = mkv.merge_state(outs[0], lses[0], outs[1], lses[1])
    b = mkv.merge_states(outs[:2], lses[:2])
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def test_merge_states_of_one_is_itself(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    out, lse = mkv.merge_states(outs[:1], lses[:1])
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])


def test_merge_states_empty_is_neutral_whatever_it_holds(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    lses[1, :, 2] = -np.inf
    outs[1, :, 2] = np.nan
    lses[:, 0, 0, 0] = -np.inf
    out, lse = mkv.merge_states(outs, lses)
    want, want_lse = ref.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    assert np.all(out[0, 0, 0] == 0)


@pytest.mark.parametrize("nothing", [-np.inf, np.inf], ids=["minus_inf", "plus_inf"])
@pytest.mark.parametrize("held", [0.0, 7.0, np.nan, np.inf], ids=str)
def test_merge_state_either_infinity_is_neutral(
    isa: str, rng: np.random.Generator, nothing: float, held: float
) -> None:
    """FlashAttention 2 and vLLM say +inf where this library says -inf."""
    out, lse = normal(rng, 5, 16), normal(rng, 5)
    empty, empty_lse = np.full((5, 16), held, np.float32), np.full(5, nothing, np.float32)
    for pair in ((out, lse, empty, empty_lse), (empty, empty_lse, out, lse)):
        got, got_lse = mkv.merge_state(*pair)
        np.testing.assert_array_equal(got, out)
        np.testing.assert_array_equal(got_lse, lse)
    for other in (-np.inf, np.inf):
        got, got_lse = mkv.merge_state(empty, empty_lse, empty, np.full(5, other, np.float32))
        np.testing.assert_array_equal(got, np.zeros((5, 16)))
        assert np.all(np.isneginf(got_lse))


def test_merge_states_of_many_with_both_infinities(isa: str, rng: np.random.Generator) -> None:
    outs, lses = normal(rng, 6, 4, 8), normal(rng, 6, 4)
    lses[[0, 2, 5], :3] = np.inf
    lses[[1, 2], 1:] = -np.inf
    outs[~np.isfinite(lses)] = np.nan
    out, lse = mkv.merge_states(outs, lses)
    want, want_lse = ref.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    used = [np.isfinite(lses[:, i]) for i in range(4)]
    by_hand = [np.log(np.exp(lses[u, i].astype(float)).sum()) for i, u in enumerate(used)]
    np.testing.assert_allclose(lse, by_hand, rtol=1e-6)


@pytest.mark.parametrize("other", [0.5, np.nan, np.inf, -np.inf], ids=str)
def test_merge_state_nan_stays_nan(isa: str, other: float) -> None:
    one, lse = np.ones((1, 8), np.float32), np.full(1, np.nan, np.float32)
    other_lse = np.full(1, other, np.float32)
    for pair in ((one, lse, one, other_lse), (one, other_lse, one, lse)):
        got, got_lse = mkv.merge_state(*pair)
        assert np.isnan(got).all()
        assert np.isnan(got_lse).all()


def test_merge_of_a_maximum_of_plus_infinity_is_nan(rng: np.random.Generator) -> None:
    """No update writes one: a logit of +inf makes the row NaN. Who writes one by hand gets NaN."""
    q, k, v = make(rng)
    whole, odd = state_of(q, k, v), state_of(q, k, v)
    odd.M[0, 0, 0] = np.inf
    for a, b in ((whole, odd), (odd, whole)):
        out, lse = a.copy().merge_(b).finalize(return_lse=True)
        assert np.isnan(out[0, 0, 0]).all()
        assert np.isnan(lse[0, 0, 0])
        assert np.isfinite(out[1]).all()


def test_merge_state_any_leading_shape(rng: np.random.Generator) -> None:
    for shape in ((4,), (3, 5), (2, 3, 4)):
        outs, lses = normal(rng, 2, *shape, 8), normal(rng, 2, *shape)
        out, lse = mkv.merge_state(outs[0], lses[0], outs[1], lses[1])
        want, want_lse = ref.merge_states(outs, lses)
        assert_close(out, want)
        assert_lse_close(lse, want_lse)


def test_merge_states_strided(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    want = mkv.merge_states(outs, lses)
    outs2 = np.ascontiguousarray(outs.transpose(0, 1, 3, 2, 4)).transpose(0, 1, 3, 2, 4)
    lses2 = np.ascontiguousarray(lses.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    got = mkv.merge_states(outs2, lses2)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.torch
def test_merge_states_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    outs, lses, _, _ = parts(rng)
    want, want_lse = mkv.merge_states(outs, lses)
    out, lse = mkv.merge_states(torch.from_numpy(outs), torch.from_numpy(lses))
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), want)
    np.testing.assert_array_equal(lse.numpy(), want_lse)


def test_merge_states_refuses_shapes_that_do_not_fit(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    with pytest.raises(ValueError, match="lses"):
        mkv.merge_states(outs, lses[:2])
    with pytest.raises(ValueError, match="outs"):
        mkv.merge_states(outs[:0], lses[:0])
    with pytest.raises(ValueError, match="out_b"):
        mkv.merge_state(outs[0], lses[0], outs[1, :1], lses[1, :1])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_left": 3},
        {"window_right": 3},
        {"alibi_slopes": np.ones(HQ, np.float32)},
        {"alibi_slopes": np.ones(HQ, np.float32), "mask": np.ones((LQ, LKV), bool)},
    ],
    ids=["causal", "window", "window_right", "alibi", "alibi_mask_bool"],
)
@pytest.mark.parametrize("given", [{}, {"q_start": 3}, {"kv_start": 0}], ids=["none", "q", "kv"])
def test_state_update_requires_positions(
    rng: np.random.Generator, options: dict[str, Any], given: dict[str, int]
) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    with pytest.raises(ValueError, match="kv_start" if "q_start" in given else "q_start"):
        st.update(q, k, v, **options, **given)
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("field", ["num_qo_heads", "qo_len", "head_dim", "batch"])
@pytest.mark.parametrize("value", [-1, 1 << 60, 2.5, "3"], ids=str)
def test_state_refuses_bad_sizes(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError, MemoryError, OverflowError)):
        new_state(**{field: value})


def test_state_update_refuses_other_shapes(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = new_state()
    for bad in (
        (q[:1], k, v),
        (q[:, :3], k, v),
        (q[:, :, :2], k, v),
        (q[..., :16], k, v),
        (q, k, v[..., :32]),
        (q, np.repeat(k, 2, axis=0), v),
    ):
        with pytest.raises(ValueError, match=r"q|k|v"):
            st.update(*bad)
    assert np.all(np.isneginf(st.M))
