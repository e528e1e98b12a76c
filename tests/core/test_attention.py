"""attention(): every option against the float64 reference, on every ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    DEBUG_ABS,
    KV_TYPES,
    TORCH_REL,
    as_kind,
    assert_close,
    assert_lse_close,
    normal,
    relative_error,
    tolerance,
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


# --- the debug case -------------------------------------------------------------------------------

DEBUG_Q = np.array([[[1, 0, 0, 0]]], np.float32)
DEBUG_K = np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32)
DEBUG_V = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]]], np.float32)
DEBUG_OUT = np.array([[[2.510163, 3.510163, 4.510163, 5.510163]]])
DEBUG_M, DEBUG_S = 0.5, 1.606531


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_attention_debug_case(isa: str, kind: str) -> None:
    k, v = as_kind(DEBUG_K, kind), as_kind(DEBUG_V, kind)
    out, lse = mkv.attention(DEBUG_Q, k, v, sm_scale=0.5, return_lse=True)
    np.testing.assert_allclose(out, DEBUG_OUT, rtol=0, atol=DEBUG_ABS)
    np.testing.assert_allclose(lse, DEBUG_M + np.log(DEBUG_S), rtol=0, atol=DEBUG_ABS)


@pytest.mark.parametrize("keys", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "0", "1"])
def test_reference_debug_case(keys: slice) -> None:
    """The oracle itself, whole and in parts."""
    st = ref.State.empty(1, 1, 1, 4)
    parts = [slice(0, 2)] if keys == slice(0, 2) else [keys, slice(1 - keys.start, 2 - keys.start)]
    for part in parts:
        st.update(DEBUG_Q[None], DEBUG_K[None, :, part], DEBUG_V[None, :, part], sm_scale=0.5)
    np.testing.assert_allclose(st.finalize()[0][0], DEBUG_OUT, rtol=0, atol=5e-7)
    np.testing.assert_allclose([st.M.item(), st.S.item()], [DEBUG_M, DEBUG_S], atol=5e-7)


# --- sizes and types ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("k_kind", KV_TYPES)
@pytest.mark.parametrize("v_kind", KV_TYPES)
def test_attention_types(
    isa: str, rng: np.random.Generator, sizes: tuple[int, ...], k_kind: str, v_kind: str
) -> None:
    check(*make(rng, sizes, k_kind, v_kind), tolerance(k_kind, v_kind))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_attention_head_dims(isa: str, rng: np.random.Generator, head_dim: int, kind: str) -> None:
    for head_dim_v in (head_dim, HEAD_DIMS[HEAD_DIMS.index(head_dim) - 1]):
        check(*make(rng, (1, 6, 2, 3, 70, head_dim, head_dim_v), kind, kind), tolerance(kind))


@pytest.mark.parametrize("head_dim", range(1, 36))
def test_attention_odd_head_dims(isa: str, rng: np.random.Generator, head_dim: int) -> None:
    check(*make(rng, (1, 2, 1, 3, 19, head_dim, 36 - head_dim), "f16", "f16"), tolerance("f16"))


@pytest.mark.parametrize("head_dim", range(32, 513, 32))
def test_attention_q4_0_head_dims(isa: str, rng: np.random.Generator, head_dim: int) -> None:
    head_dim_v = 544 - head_dim
    check(*make(rng, (1, 4, 2, 3, 40, head_dim, head_dim_v), "q4_0", "q4_0"), tolerance("q4_0"))


@pytest.mark.parametrize("kv_len", [1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 255, 256, 257, 511, 1025])
def test_attention_kv_lens(isa: str, rng: np.random.Generator, kv_len: int, kv_type: str) -> None:
    sizes = (1, 4, 2, 3, kv_len, 32, 64)
    check(*make(rng, sizes, kv_type, kv_type), tolerance(kv_type), causal=kv_len > 3)


@pytest.mark.parametrize("qo_len", [1, 2, 4, 5, 15, 16, 17, 33, 64, 65])
def test_attention_qo_lens(isa: str, rng: np.random.Generator, qo_len: int, kv_type: str) -> None:
    sizes = (1, 3, 1, qo_len, 70, 64, 32)
    check(*make(rng, sizes, kv_type, kv_type), tolerance(kv_type), causal=True)


@pytest.mark.parametrize("q_dtype", ["f32", "f16"])
def test_attention_query_types(
    isa: str, rng: np.random.Generator, q_dtype: str, kv_type: str
) -> None:
    q, k, v = make(rng, SIZES["gqa_9_3"], kv_type, kv_type)
    check(as_kind(q, q_dtype), k, v, tolerance(kv_type))


def test_attention_q4_0_is_near_its_dequantised_values(isa: str, rng: np.random.Generator) -> None:
    """The bound of the semantics, on sizes of a real model and many keys."""
    q, k, v = make(rng, (1, 8, 2, 1, 4096, 128, 128), "q4_0", "q4_0")
    want, _ = ref.attention(q, values_of(k), values_of(v))
    assert relative_error(mkv.attention(q, k, v), want) <= 1e-3


# --- options --------------------------------------------------------------------------------------


def options_for(rng: np.random.Generator, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    B, Hq, _, Lq, Lkv, _, _ = sizes
    additive = normal(rng, B, Hq, Lq, Lkv)
    additive[rng.random(additive.shape) < 0.3] = -np.inf
    boolean = rng.random((B, Hq, Lq, Lkv)) < 0.6
    slopes = (2.0 ** -np.linspace(1, 8, Hq)).astype(np.float32)
    sinks = normal(rng, Hq)
    return {
        "sm_scale": {"sm_scale": 0.37},
        "sm_scale_zero": {"sm_scale": 0.0},
        "sm_scale_negative": {"sm_scale": -0.2},
        "soft_cap": {"logits_soft_cap": 1.5},
        "soft_cap_large": {"logits_soft_cap": 50.0},
        "causal": {"causal": True},
        "window_0": {"window_left": 0},
        "window_3": {"window_left": 3},
        "window_right_0": {"window_right": 0},
        "window_right_4": {"window_right": 4},
        "window_both": {"window_left": 2, "window_right": 5},
        "window_both_0": {"window_left": 0, "window_right": 0},
        "window_right_causal": {"window_right": 4, "causal": True},
        "window_right_past_all": {"window_left": 3, "window_right": 10_000},
        "window_3_causal": {"window_left": 3, "causal": True},
        "window_past_all": {"window_left": 10_000, "causal": True},
        "mask_f32": {"mask": additive},
        "mask_f16": {"mask": additive.astype(np.float16)},
        "mask_bool": {"mask": boolean},
        "mask_causal": {"mask": additive, "causal": True},
        "mask_bool_window": {"mask": boolean, "window_left": 7},
        "alibi": {"alibi_slopes": slopes},
        "alibi_causal": {"alibi_slopes": slopes, "causal": True},
        "alibi_mask": {"alibi_slopes": slopes, "mask": additive},
        "alibi_negative_slopes_mask": {"alibi_slopes": -slopes, "mask": additive},
        "alibi_zero_slopes_mask": {"alibi_slopes": slopes * 0, "mask": additive},
        "alibi_mask_bool": {"alibi_slopes": slopes, "mask": boolean},
        "alibi_mask_bool_causal": {"alibi_slopes": slopes, "mask": boolean, "causal": True},
        "alibi_mask_causal": {"alibi_slopes": slopes, "mask": additive, "causal": True},
        "alibi_window": {"alibi_slopes": slopes, "window_left": 5},
        "alibi_window_right": {"alibi_slopes": slopes, "mask": boolean, "window_right": 2},
        "sinks": {"sinks": sinks},
        "sinks_above_all": {"sinks": sinks + 30},
        "sinks_below_all": {"sinks": sinks - 60},
        "sinks_causal": {"sinks": sinks, "causal": True},
        "all": {
            "sm_scale": 0.2,
            "logits_soft_cap": 5.0,
            "causal": True,
            "window_left": 9,
            "mask": additive,
            "alibi_slopes": slopes,
            "sinks": sinks,
        },
    }


OPTION_SIZES = ["prefill", "more_queries_than_keys", "gqa_9_3", "one_query"]
OPTION_NAMES = list(options_for(np.random.default_rng(0), SIZES["one_head"]))


@pytest.mark.parametrize("size", OPTION_SIZES)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_attention_option(
    isa: str, rng: np.random.Generator, option: str, size: str, kv_type: str
) -> None:
    q, k, v = make(rng, SIZES[size], kv_type, kv_type)
    check(q, k, v, tolerance(kv_type), **options_for(rng, SIZES[size])[option])


def test_attention_default_scale_is_that_of_head_dim(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    np.testing.assert_array_equal(mkv.attention(q, k, v), mkv.attention(q, k, v, sm_scale=32**-0.5))


def test_attention_window_sides(isa: str) -> None:
    """Keys p - W to p + R; a side that is not given is open, as FlashInfer and ONNX have it."""
    n = 9
    v = np.eye(n, dtype=np.float32)[None]
    q = k = np.zeros((1, n, 4), np.float32)
    for left in range(-1, n):
        for right in range(-1, n):
            both = mkv.attention(q, k, v, window_left=left, window_right=right)
            causal = mkv.attention(q, k, v, window_left=left, window_right=right, causal=True)
            for i in range(n):
                first = 0 if left < 0 else max(0, i - left)
                end = n if right < 0 else min(n, i + right + 1)
                assert list(np.nonzero(both[0, i])[0]) == list(range(first, end))
                assert list(np.nonzero(causal[0, i])[0]) == list(range(first, i + 1))


@pytest.mark.torch
@pytest.mark.parametrize(("left", "right"), [(3, -1), (-1, 2), (4, 0), (0, 0), (7, 5)])
def test_attention_window_as_torch_has_it(rng: np.random.Generator, left: int, right: int) -> None:
    """Against SDPA with the window as a mask; the last query stands at the last key."""
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, (2, 4, 4, 33, 150, 32, 64))
    distance = np.arange(150)[None, :] - (150 - 33 + np.arange(33))[:, None]
    seen = (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else True)
    seen = np.broadcast_to(seen, distance.shape)
    want = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)), attn_mask=torch.from_numpy(seen.copy())
    )
    got = mkv.attention(q, k, v, window_left=left, window_right=right)
    assert relative_error(got, want.numpy().astype(np.float64)) < 1e-5


@pytest.mark.parametrize(("left", "right"), [(50, 20), (-1, 20), (50, -1), (0, 0)])
@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
def test_attention_window_cuts_keys_off(
    rng: np.random.Generator, left: int, right: int, kind: str
) -> None:
    """Keys outside of every query's window are not even read: they may be anything."""
    sizes = (1, 4, 2, 5, 3000, 32, 32)
    q, k, v = make(rng, sizes, kind, kind)
    state = mkv.AttentionState(num_qo_heads=4, qo_len=5, head_dim=32)
    options = {"window_left": left, "window_right": right, "q_start": 1500, "kv_start": 0}
    state.update(q, k, v, **options)
    want, want_lse = state.finalize(return_lse=True)
    by_hand, _ = ref.attention(q, values_of(k), values_of(v), **options)
    assert_close(want, by_hand, rel=tolerance(kind))
    first, end = 0 if left < 0 else 1500 - left, 3000 if right < 0 else 1504 + right + 1
    for array in (k, v):
        array[:, :, :first] = 255 if kind == "q4_0" else np.nan
        array[:, :, end:] = 255 if kind == "q4_0" else np.nan
    again = mkv.AttentionState(num_qo_heads=4, qo_len=5, head_dim=32)
    again.update(q, k, v, **options)
    out, lse = again.finalize(return_lse=True)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)


def test_attention_causal_aligns_last_with_last() -> None:
    q, k = np.zeros((1, 3, 4), np.float32), np.zeros((1, 7, 4), np.float32)
    out = mkv.attention(q, k, np.eye(7, dtype=np.float32)[None], causal=True)
    assert [int(np.count_nonzero(row)) for row in out[0]] == [5, 6, 7]


def test_attention_causal_queries_before_every_key_see_none(isa: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = make(rng, (1, 4, 2, 9, 4, 32, 32))
    out, lse = mkv.attention(q, k, v, causal=True, return_lse=True)
    assert np.all(out[:, :, :5] == 0)
    assert np.all(np.isneginf(lse[:, :, :5]))
    assert np.all(np.isfinite(lse[:, :, 5:]))


def test_attention_gqa_repeats_interleaved() -> None:
    """Query head h reads kv head h // ratio."""
    v = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 2, 4), np.float32)
    out = mkv.attention(np.zeros((6, 1, 4), np.float32), np.zeros((3, 2, 4), np.float32), v)
    np.testing.assert_array_equal(out[:, 0, 0], [0, 0, 1, 1, 2, 2])


def test_attention_alibi_adds_slope_times_distance() -> None:
    q, k = np.zeros((1, 1, 4), np.float32), np.zeros((1, 3, 4), np.float32)
    out = mkv.attention(
        q, k, np.eye(3, dtype=np.float32)[None], alibi_slopes=np.array([0.5], np.float32)
    )
    weights = np.exp([-1.0, -0.5, 0.0])
    np.testing.assert_allclose(out[0, 0], weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qo_len", [1, 6, 40])
def test_attention_alibi_beside_a_boolean_mask_is_the_mask_of_distances(
    isa: str, rng: np.random.Generator, qo_len: int, causal: bool
) -> None:
    """The same as without a mask where nothing is hidden, and as ggml's mask of distances."""
    q, k, v = make(rng, (1, 4, 2, qo_len, 70, 32, 32))
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    plain = mkv.attention(q, k, v, alibi_slopes=slopes, causal=causal)
    shown = np.ones((qo_len, 70), bool)
    np.testing.assert_array_equal(
        mkv.attention(q, k, v, alibi_slopes=slopes, causal=causal, mask=shown), plain
    )
    seen = rng.random((qo_len, 70)) < 0.5
    seen[:, 0] = True
    distance = np.arange(70)[None, :] - (70 - qo_len + np.arange(qo_len))[:, None]
    ggml = np.where(seen, distance, -np.inf).astype(np.float32)
    got = mkv.attention(q, k, v, alibi_slopes=slopes, causal=causal, mask=seen)
    assert_close(got, mkv.attention(q, k, v, alibi_slopes=slopes, causal=causal, mask=ggml))


@pytest.mark.parametrize("cap", [2.0**-127, 1e-46, 1e-300, 5e-324])
def test_attention_soft_cap_below_the_normal_numbers_is_refused(cap: float) -> None:
    q = np.ones((1, 2, 32), np.float32)
    for call in (
        lambda: mkv.attention(q, q, q, logits_soft_cap=cap),
        lambda: mkv.AttentionState(1, 2, 32).update(q, q, q, logits_soft_cap=cap),
    ):
        with pytest.raises(
            ValueError, match=rf"logits_soft_cap must be 0 .*1\.17549435e-38.*{cap}"
        ):
            call()


@pytest.mark.parametrize("cap", [2.0**-126, 1e-37, 1e-20, 1e38])
def test_attention_soft_caps_of_any_size_cap(
    isa: str, rng: np.random.Generator, cap: float
) -> None:
    """A tiny one makes all logits alike, though logit / cap overflows; a huge one does nothing."""
    q, k, v = make(rng, (1, 4, 2, 3, 40, 32, 32))
    out, lse = mkv.attention(q, k, v, logits_soft_cap=cap, return_lse=True)
    want, want_lse = ref.attention(q, k, v, logits_soft_cap=cap)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    if cap < 1:
        np.testing.assert_allclose(out, np.repeat(v.mean(2), 2, 1)[:, :, None] + 0 * out, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-46, 1e-300, -1e-46])
def test_attention_scale_below_f32_counts_as_zero(rng: np.random.Generator, scale: float) -> None:
    q, k, v = make(rng, (1, 4, 2, 3, 40, 32, 32))
    assert_close(mkv.attention(q, k, v, sm_scale=scale), ref.attention(q, k, v, sm_scale=scale)[0])


def test_attention_soft_cap_bounds_logits(isa: str) -> None:
    q, k = np.full((1, 1, 4), 1e4, np.float32), np.full((1, 2, 4), 1e4, np.float32)
    k[0, 1] *= -1
    v = np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32)
    out = mkv.attention(q, k, v, logits_soft_cap=1.0)
    weights = np.exp([1.0, -1.0])
    np.testing.assert_allclose(out[0, 0, :2], weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("offset", [-3e4, 0.0, 3e4], ids=["low", "zero", "high"])
def test_attention_large_logits_do_not_overflow(isa: str, offset: float) -> None:
    q = np.ones((1, 1, 8), np.float32)
    k = np.zeros((1, 200, 8), np.float32)
    k[0, :, 0] = offset + np.linspace(-2, 2, 200)
    v = np.random.default_rng(1).standard_normal((1, 200, 8)).astype(np.float32)
    want, want_lse = ref.attention(q, k, v, sm_scale=1.0)
    out, lse = mkv.attention(q, k, v, sm_scale=1.0, return_lse=True)
    np.testing.assert_allclose(out, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want_lse[0], rtol=1e-6)


# --- masks: shapes and strides --------------------------------------------------------------------

MASK_SHAPES: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "full": lambda B, H, q, k: (B, H, q, k),
    "one_head": lambda B, H, q, k: (B, 1, q, k),
    "one_batch": lambda B, H, q, k: (1, H, q, k),
    "3d": lambda B, H, q, k: (H, q, k),
    "2d": lambda B, H, q, k: (q, k),
    "1d_keys": lambda B, H, q, k: (k,),
    "padding": lambda B, H, q, k: (B, 1, 1, k),
    "column": lambda B, H, q, k: (B, 1, q, 1),
}


@pytest.mark.parametrize("case", MASK_SHAPES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bool"])
def test_attention_mask_broadcasts(rng: np.random.Generator, case: str, kind: str) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    shape = MASK_SHAPES[case](2, 6, 13, 45)
    mask = rng.random(shape) < 0.7
    if kind != "bool":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(
            np.float32 if kind == "f32" else np.float16
        )
    check(q, k, v, tolerance("f32"), mask=mask)


@pytest.mark.parametrize("kind", ["f32", "f16", "bool"])
def test_attention_mask_strided_views(rng: np.random.Generator, kind: str) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    dtype = {"f32": np.float32, "f16": np.float16, "bool": bool}[kind]
    big = (rng.standard_normal((6, 90, 2, 26)) > -0.5).astype(dtype)
    mask = big.transpose(2, 0, 3, 1)[:, :, ::2, ::-2]
    assert mask.shape == (2, 6, 13, 45)
    check(q, k, v, tolerance("f32"), mask=mask)


def test_attention_fully_masked_rows_give_zeros(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    mask = np.ones((13, 45), bool)
    mask[[0, 4, 12]] = False
    sinks = normal(rng, 6)
    for options in ({}, {"sinks": sinks}):
        out, lse = mkv.attention(q, k, v, mask=mask, return_lse=True, **options)
        assert np.all(out[:, :, ~mask.any(1)] == 0)
        assert np.all(np.isneginf(lse[:, :, ~mask.any(1)]))
        assert np.all(np.isfinite(lse[:, :, mask.any(1)]))


# --- strides and layouts --------------------------------------------------------------------------

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # [B, H, L, D] values in another order in memory
    "token_major": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "dim_major": lambda x: np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
    "fortran": np.asfortranarray,
    "padded_rows": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
    "every_other_row": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
    "all_rows_one": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "batch_broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: (
        np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("size", ["one_query", "prefill"])
@pytest.mark.parametrize("view", VIEWS)
def test_attention_strided_inputs_same_bits(
    isa: str, rng: np.random.Generator, view: str, kv_type: str, size: str
) -> None:
    """Few query rows and many take different ways through the kernels."""
    q, k, v = make(rng, SIZES[size], kv_type, kv_type)
    q, k, v = VIEWS[view](q), VIEWS[view](k), VIEWS[view](v)
    want = mkv.attention(
        np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v), causal=True
    )
    np.testing.assert_array_equal(mkv.attention(q, k, v, causal=True), want)


def test_attention_nhd_is_hnd_transposed(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    want, want_lse = mkv.attention(q, k, v, causal=True, return_lse=True)
    nhd = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    out, lse = mkv.attention(*nhd, layout="NHD", causal=True, return_lse=True)
    assert out.shape == (2, 13, 6, 96)
    assert lse.shape == (2, 6, 13)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3), want)
    np.testing.assert_array_equal(lse, want_lse)
    out = mkv.attention(*(x[0] for x in nhd), layout="NHD", causal=True)
    np.testing.assert_array_equal(out.transpose(1, 0, 2), want[0])


def test_attention_leading_batch_left_out(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, (1, 6, 3, 13, 45, 32, 64), kv_type, kv_type)
    out, lse = mkv.attention(q[0], k[0], v[0], return_lse=True)
    assert out.shape == (6, 13, 64)
    assert lse.shape == (6, 13)
    want, want_lse = mkv.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want_lse[0])


def test_attention_batch_rows_are_independent(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    both = mkv.attention(q, k, v, causal=True)
    for b in range(2):
        np.testing.assert_array_equal(mkv.attention(q[b], k[b], v[b], causal=True), both[b])


def test_attention_out_is_filled_and_returned(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    want = mkv.attention(q, k, v)
    out = np.full(want.shape, np.nan, np.float32)
    assert mkv.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, want)
    got, lse = mkv.attention(q, k, v, out=out, return_lse=True)
    assert got is out
    assert lse.shape == want.shape[:3]


def test_attention_out_strided(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    whole = np.full((2, 13, 6, 100), 7, np.float32)
    mkv.attention(q, k, v, out=whole.transpose(0, 2, 1, 3)[..., :96])
    np.testing.assert_array_equal(whole[..., :96].transpose(0, 2, 1, 3), mkv.attention(q, k, v))
    assert np.all(whole[..., 96:] == 7)


def test_attention_leaves_inputs_alone(rng: np.random.Generator, kv_type: str) -> None:
    arrays = make(rng, SIZES["prefill"], kv_type, kv_type)
    for x in arrays:
        x.flags.writeable = False
    before = [x.copy() for x in arrays]
    mkv.attention(*arrays, causal=True)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kv_len", [0])
def test_attention_without_keys_gives_zeros(rng: np.random.Generator, kv_len: int) -> None:
    q, k, v = make(rng, (2, 4, 2, 3, kv_len, 32, 64))
    out, lse = mkv.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 3, 64)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_attention_without_queries_is_empty(rng: np.random.Generator) -> None:
    q, k, v = make(rng, (2, 4, 2, 0, 5, 32, 64))
    out, lse = mkv.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 0, 64)
    assert lse.shape == (2, 4, 0)


# --- NaN and infinity -----------------------------------------------------------------------------

BAD_VALUES = [np.nan, np.inf, -np.inf]
BAD_IDS = ["nan", "inf", "-inf"]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=BAD_IDS)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("hide", ["mask_bool", "mask_f32", "causal", "window"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_attention_hidden_key_does_not_leak(
    isa: str, rng: np.random.Generator, bad: float, where: str, hide: str, kind: str
) -> None:
    """One key is bad in one kv head; rows that don't see it keep every bit."""
    sizes = (2, 6, 3, 13, 45, 32, 64)
    q, k, v = make(rng, sizes, kind, kind)
    at = 40
    seen = np.ones((13, 45), bool)
    if hide == "causal":
        seen, options = np.tril(seen, 32), {"causal": True}
    elif hide == "window":
        seen = np.tril(seen, 33) & np.triu(seen, 29)
        options = {"window_left": 3, "window_right": 1}
    else:
        seen[::2, at] = False
        bias = np.where(seen, 0, -np.inf).astype(np.float32)
        options = {"mask": seen if hide == "mask_bool" else bias}
    want = mkv.attention(q, k, v, **options)
    (k if where == "k" else v)[1, 1, at] = bad
    out = mkv.attention(q, k, v, **options)
    hit = np.zeros((2, 6, 13), bool)
    hit[1, 2:4] = seen[:, at]
    np.testing.assert_array_equal(out[~hit], want[~hit])
    if not (where == "k" and np.isinf(bad)):
        assert not np.isfinite(out[hit]).any()


@pytest.mark.parametrize("bad", BAD_VALUES, ids=BAD_IDS)
def test_attention_bad_query_reaches_its_row_alone(
    isa: str, rng: np.random.Generator, bad: float, kv_type: str
) -> None:
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    want = mkv.attention(q, k, v, causal=True)
    q[1, 2, 5] = bad
    out = mkv.attention(q, k, v, causal=True)
    hit = np.zeros(out.shape[:3], bool)
    hit[1, 2, 5] = True
    np.testing.assert_array_equal(out[~hit], want[~hit])
    if np.isnan(bad):
        assert np.isnan(out[hit]).all()


def test_attention_hidden_q4_0_block_with_nan_scale_does_not_leak(
    isa: str, rng: np.random.Generator
) -> None:
    q, k, v = make(rng, SIZES["prefill"], "q4_0", "q4_0")
    mask = np.ones((13, 45), bool)
    mask[:7, 20] = False
    want = mkv.attention(q, k, v, mask=mask)
    for x in (k, v):
        x[:, :, 20, :2] = np.array([np.nan], np.float16).view(np.uint8)
    out = mkv.attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[:, :, :7], want[:, :, :7])
    assert np.isnan(out[:, :, 7:]).any(axis=-1).all()


def test_attention_fully_masked_row_over_nan_gives_zeros(
    isa: str, rng: np.random.Generator
) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    k[:], v[:] = np.nan, np.nan
    mask = np.zeros((13, 45), bool)
    out, lse = mkv.attention(q, k, v, mask=mask, return_lse=True)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_attention_nan_in_mask_reaches_its_row_alone(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    mask = np.zeros((13, 45), np.float32)
    want = mkv.attention(q, k, v, mask=mask)
    mask[3, 7] = np.nan
    out = mkv.attention(q, k, v, mask=mask)
    assert np.isnan(out[:, :, 3]).all()
    rest = np.arange(13) != 3
    np.testing.assert_array_equal(out[:, :, rest], want[:, :, rest])


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 2, 1, 5000, 64, 64),
        (1, 3, 1, 1, 20_000, 32, 32),
        (2, 6, 3, 70, 300, 32, 96),
        (1, 8, 1, 33, 1500, 32, 64),
    ],
    ids=["decode", "decode_long_one_head", "prefill", "prefill_few_tiles_long_context"],
)
def test_attention_threads_same_bits(
    isa: str, rng: np.random.Generator, sizes: tuple[int, ...], kv_type: str
) -> None:
    q, k, v = make(rng, sizes, kv_type, kv_type)
    one, one_lse = mkv.attention(q, k, v, causal=True, return_lse=True, threads=1)
    for threads in (2, 5):
        out, lse = mkv.attention(q, k, v, causal=True, return_lse=True, threads=threads)
        np.testing.assert_array_equal(out, one)
        np.testing.assert_array_equal(lse, one_lse)


def test_attention_long_decode(isa: str, rng: np.random.Generator, kv_type: str) -> None:
    """Long enough to be cut into chunks and merged."""
    check(*make(rng, (1, 6, 2, 1, 9001, 32, 64), kv_type, kv_type), tolerance(kv_type))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_few_tiles_over_long_context(
    isa: str, rng: np.random.Generator, kv_type: str, causal: bool
) -> None:
    """Query rows make several tiles, but so few that their keys are cut as well."""
    q, k, v = make(rng, (1, 8, 1, 33, 1500, 32, 64), kv_type, kv_type)
    check(q, k, v, tolerance(kv_type), causal=causal)
    state = mkv.AttentionState(num_qo_heads=8, qo_len=33, head_dim=64)
    state.update(q, k, v, causal=causal, q_start=1500 - 33, kv_start=0)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(q, k, v, causal=causal))


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_equals_torch_sdpa(isa: str, rng: np.random.Generator, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, (2, 9, 3, 65, 65, 64, 64), "f16", "f16")
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q),
        torch.from_numpy(k).float(),
        torch.from_numpy(v).float(),
        is_causal=causal,
        enable_gqa=True,
    )
    assert relative_error(mkv.attention(q, k, v, causal=causal), want.numpy()) < TORCH_REL


@pytest.mark.torch
def test_attention_equals_torch_sdpa_with_mask(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, (2, 6, 2, 13, 45, 96, 32), "f16", "f16")
    mask = rng.random((2, 1, 13, 45)) < 0.7
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q),
        torch.from_numpy(k).float(),
        torch.from_numpy(v).float(),
        attn_mask=torch.from_numpy(mask),
        enable_gqa=True,
        scale=0.3,
    )
    got = mkv.attention(q, k, v, mask=mask, sm_scale=0.3)
    assert relative_error(got, want.numpy()) < TORCH_REL


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_attention_torch_in_torch_out(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in make(rng, SIZES["prefill"]))
    out, lse = mkv.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert out.shape == (2, 6, 13, 96)
    assert isinstance(lse, torch.Tensor)
    assert lse.shape == (2, 6, 13)
    want, want_lse = ref.attention(*(x.double().numpy() for x in (q, k, v)), causal=True)
    eps = float(torch.finfo(dtype).eps)
    assert relative_error(out.float().numpy(), want) <= max(eps, tolerance("f32"))
    if name == "float32":
        assert_lse_close(lse.numpy(), want_lse)


@pytest.mark.torch
def test_attention_torch_strided_and_q4_0(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, SIZES["prefill"], "q4_0", "f16")
    want = mkv.attention(q, k, v)
    tq = torch.from_numpy(q).transpose(1, 2).contiguous().transpose(1, 2)
    tv = torch.from_numpy(v).transpose(1, 2).contiguous().transpose(1, 2)
    out = mkv.attention(tq, torch.from_numpy(k), tv)
    np.testing.assert_array_equal(out.numpy(), want)
    into = torch.full((2, 6, 13, 96), float("nan"))
    assert mkv.attention(tq, torch.from_numpy(k), tv, out=into) is into
    np.testing.assert_array_equal(into.numpy(), want)


@pytest.mark.torch
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_attention_torch_refuses_to_lose_a_gradient(rng: np.random.Generator, which: int) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in make(rng, SIZES["prefill"])]
    want = mkv.attention(*tensors)
    tensors[which].requires_grad_()
    with pytest.raises(ValueError, match=f"{'qkv'[which]}.*grad"):
        mkv.attention(*tensors)
    with torch.no_grad():
        assert torch.equal(mkv.attention(*tensors), want)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_attention_torch_mask(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, name)) for x in make(rng, SIZES["prefill"]))
    seen = torch.from_numpy(rng.random((2, 1, 13, 45)) < 0.7)
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))
    out = mkv.attention(q, k, v, mask=seen)
    torch.testing.assert_close(mkv.attention(q, k, v, mask=bias), out, rtol=0, atol=0)


# --- random cases ---------------------------------------------------------------------------------


def test_attention_hypothesis_options_together() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = data.draw
        rng = np.random.default_rng(draw(st.integers(0, 2**32), "seed"))
        hkv, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        kinds = draw(st.sampled_from(KV_TYPES)), draw(st.sampled_from(KV_TYPES))
        dims = [draw(st.sampled_from([32, 64, 96] if k == "q4_0" else HEAD_DIMS)) for k in kinds]
        sizes = (
            draw(st.integers(1, 2)),
            hkv * ratio,
            hkv,
            draw(st.integers(1, 40)),
            draw(st.integers(1, 300)),
            dims[0],
            dims[1],
        )
        q, k, v = make(rng, sizes, *kinds)
        pool = options_for(rng, sizes)
        options: dict[str, Any] = {}
        if draw(st.booleans()):
            options["causal"] = True
        if draw(st.booleans()):
            options["window_left"] = draw(st.integers(0, 20))
        for name in ("mask_f32", "mask_bool", "alibi", "sinks", "soft_cap", "sm_scale"):
            if draw(st.booleans(), name) and not (name == "mask_bool" and "mask" in options):
                options.update(pool[name])
        check(q, k, v, tolerance(*kinds), **options)

    run()


# --- very many keys ------------------------------------------------------------------------------

MANY_KEYS_REL = 1e-5


def many_keys_error(
    num_heads: int, kv_len: int, qo_len: int, kind: str, first_logit: float
) -> float:
    """Largest relative error where one heavy key stands before one row repeated, V = 0.1.

    Equal terms are the worst case of a long sum: every addition is rounded to the same side.
    """
    k = np.zeros((1, 1, kv_len, 8), np.float16)
    v = np.full((1, 1, kv_len, 8), 0.1, np.float16)
    k[..., 0, 0], v[..., 0, :] = first_logit, 1.0
    q = np.zeros((1, num_heads, qo_len, 8), np.float32)
    q[..., 0] = 1.0
    heavy, rest = np.exp(np.float64(k[0, 0, 0, 0])), float(kv_len - 1)
    want = (heavy + rest * np.float64(v[0, 0, 1, 0])) / (heavy + rest)
    want_lse = np.log(heavy + rest)
    k, v = (np.broadcast_to(as_kind(x, kind), (1, num_heads, kv_len, 8)) for x in (k, v))
    out, lse = mkv.attention(q, k, v, sm_scale=1.0, return_lse=True)
    return float(max(np.abs(out / want - 1).max(), np.abs(lse - want_lse).max()))


@pytest.mark.parametrize("first_logit", [0.0, 11.0, 14.0])
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize(("num_heads", "qo_len"), [(1, 1), (64, 1), (2, 20)])
def test_attention_many_keys(
    isa: str, num_heads: int, qo_len: int, kind: str, first_logit: float
) -> None:
    assert many_keys_error(num_heads, 131072, qo_len, kind, first_logit) <= MANY_KEYS_REL


@pytest.mark.parametrize("num_heads", [1, 64])
def test_attention_a_million_keys(num_heads: int) -> None:
    assert many_keys_error(num_heads, 1 << 20, 1, "f16", 11.0) <= MANY_KEYS_REL
