"""attention(): NaN and infinity reach what sees them and nothing else."""

from __future__ import annotations

import mixedkv as mkv
import numpy as np
import pytest
from attention_cases import SIZES, make

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


@pytest.mark.parametrize("bad", BAD_VALUES, ids=BAD_IDS)
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_attention_bad_slope_or_sink_reaches_its_head_alone(
    isa: str, rng: np.random.Generator, name: str, bad: float, kv_type: str
) -> None:
    """They are data, as q, k and v are: a sink of -inf is none, any other spoils its head."""
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    values = rng.uniform(0.1, 1, q.shape[1]).astype(np.float32)
    want = mkv.attention(q, k, v, causal=True, **{name: values})
    values[2] = bad
    out = mkv.attention(q, k, v, causal=True, **{name: values})
    hit = np.zeros(out.shape[:3], bool)
    hit[:, 2] = True
    np.testing.assert_array_equal(out[~hit], want[~hit])
    if name == "sinks" and bad == -np.inf:
        without = mkv.attention(q, k, v, causal=True)
        np.testing.assert_array_equal(out[hit], without[hit])
    else:
        assert np.isnan(out[hit]).all()
