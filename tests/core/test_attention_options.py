"""attention(): every option, alone and together, against the float64 reference, on every ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from attention_cases import HEAD_DIMS, SIZES, check, make
from conftest import (
    KV_TYPES,
    assert_close,
    assert_lse_close,
    normal,
    relative_error,
    tolerance,
    values_of,
)

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
