"""Carried state: segments, in every split and of every kind, give what the whole gives."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    DEBUG_ABS,
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
    same_state,
    state_of,
)

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
