"""Infinities and NaN among values that a row sees: they count by their weight as computed.

A weight below the smallest normal float32, e^-87.3 of the largest, is 0, and a weight of 0 brings
nothing in, whatever its value holds: with one query or many, causal or not, in rows or packed
tiles, in f32 or bf16 arithmetic, cut in one way or another, on every instruction set alike.
"""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import as_kind, assert_close, normal, values_of

HQ, HKV, D, DV = 4, 2, 32, 64
#: Where the bad value is, and the key that outweighs it.
AT, HEAVY = 5, 9
NOTHING, SOMETHING = (177.0, 100.0, 88.0), (86.0, 40.0, 0.0)
BAD = (np.inf, -np.inf, np.nan)


def make(
    rng: np.random.Generator, gap: float, qo_len: int, kv_len: int, kind: str
) -> tuple[np.ndarray, ...]:
    """Logits are 0, but for key HEAVY's, which is gap."""
    q = np.zeros((1, HQ, qo_len, D), np.float32)
    q[..., 0] = 1
    k = np.zeros((1, HKV, kv_len, D), np.float16)
    k[:, :, HEAVY, 0] = gap
    return q, k, as_kind(normal(rng, 1, HKV, kv_len, DV), kind)


def spoil(v: np.ndarray, bad: float) -> np.ndarray:
    """v with one bad value in kv head 1, or, in blocks, a bad scale."""
    v = v.copy()
    if v.dtype == np.uint8:
        v[0, 1, AT, :2] = np.array([bad], np.float16).view(np.uint8)
    else:
        v[0, 1, AT, 7] = bad
    return v


def expect(out: np.ndarray, clean: np.ndarray, nothing: bool, kind: str, seen: Any = None) -> None:
    """Rows of kv head 1 that see the bad key have it in its columns; others keep their bits."""
    rows = np.zeros(out.shape[:3], bool)
    if not nothing:
        rows[:, 2:, slice(None) if seen is None else seen] = True
    np.testing.assert_array_equal(out[~rows], clean[~rows])
    columns = np.zeros(out.shape[3], bool)
    columns[slice(0, 32) if kind == "q4_0" else 7] = True
    assert not np.isfinite(out[rows][:, columns]).any()
    np.testing.assert_allclose(out[rows][:, ~columns], clean[rows][:, ~columns], 1e-4, 1e-6)


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
@pytest.mark.parametrize("qo_len", [1, 3, 40], ids=["one", "few", "many"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_seen_value_counts_by_its_weight(
    isa: str, rng: np.random.Generator, kind: str, qo_len: int, causal: bool
) -> None:
    kv_len = max(qo_len, 20)
    visible = np.arange(kv_len - qo_len, kv_len)
    for gap in (*NOTHING, *SOMETHING):
        q, k, v = make(rng, gap, qo_len, kv_len, kind)
        options: dict[str, Any] = {"sm_scale": 1.0, "causal": causal}
        clean = mkv.attention(q, k, v, **options)
        assert_close(clean, ref.attention(q, k, values_of(v), **options)[0])
        for bad in BAD:
            out = mkv.attention(q, k, spoil(v, bad), **options)
            if causal:
                # What sees the bad key, but not the heavy one, has it whatever the gap.
                early = (visible >= AT) & (visible < HEAVY)
                late = visible >= HEAVY
                expect(out, clean, False, kind, early if gap in NOTHING else early | late)
            else:
                expect(out, clean, gap in NOTHING, kind)


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_seen_value_counts_by_its_weight_in_bf16(
    isa: str, rng: np.random.Generator, kind: str, causal: bool
) -> None:
    if "bf16" not in mkv.isa.compute_types():
        pytest.skip(f"{isa} has no arithmetic in bf16")
    for gap in (*NOTHING, *SOMETHING):
        q, k, v = make(rng, gap, 40, 40, kind)
        options: dict[str, Any] = {"sm_scale": 1.0, "causal": causal, "compute_type": "bf16"}
        clean = mkv.attention(q, k, v, **options)
        for bad in BAD:
            out = mkv.attention(q, k, spoil(v, bad), **options)
            if causal:
                rows = np.arange(40)
                seen = (rows >= AT) & ((rows < HEAVY) if gap in NOTHING else True)
                expect(out, clean, False, kind, seen)
            else:
                expect(out, clean, gap in NOTHING, kind)


@pytest.mark.parametrize("qo_len", [1, 12])
@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
def test_a_seen_value_counts_by_its_weight_in_segments(
    isa: str, rng: np.random.Generator, kind: str, qo_len: int
) -> None:
    """The heavy key before the bad one, after it, or in another state."""
    for gap in (177.0, 100.0, *SOMETHING):  # a pair's weight is that of all its keys
        q, k, v = make(rng, gap, qo_len, 12, kind)
        for bad in BAD:
            outs = []
            for values in (v, spoil(v, bad)):
                states = [
                    mkv.AttentionState(num_qo_heads=HQ, qo_len=qo_len, head_dim=DV)
                    for _ in range(4)
                ]
                parts = [(slice(0, 7), slice(7, 12)), (slice(7, 12), slice(0, 7))]
                for state, order in zip(states, parts, strict=False):
                    for part in order:
                        state.update(q, k[:, :, part], values[:, :, part], sm_scale=1.0)
                for state, part in zip(states[2:], parts[0], strict=True):
                    state.update(q, k[:, :, part], values[:, :, part], sm_scale=1.0)
                pairs = [state.finalize(return_lse=True) for state in states[2:]]
                outs.append(
                    [
                        states[0].finalize(),
                        states[1].finalize(),
                        mkv.merge(states[2:]).finalize(),
                        mkv.merge(states[:1:-1]).finalize(),
                        mkv.merge_state(*pairs[0], *pairs[1])[0],
                        mkv.merge_state(*pairs[1], *pairs[0])[0],
                    ]
                )
            for clean, out in zip(*outs, strict=True):
                expect(out, clean, gap in NOTHING, kind)


@pytest.mark.parametrize("qo_len", [1, 20])
def test_a_seen_value_counts_by_its_weight_in_pieces(
    isa: str, rng: np.random.Generator, qo_len: int
) -> None:
    """Long runs are cut; the bad key lies in another piece than the heavy one."""
    q, k, v = make(rng, 0.0, qo_len, 3000, "f16")
    for gap in (177.0, 40.0):
        k[:, :, 2900, 0] = gap
        clean = mkv.attention(q, k, v, sm_scale=1.0)
        for bad in BAD:
            out = mkv.attention(q, k, spoil(v, bad), sm_scale=1.0)
            expect(out, clean, gap == 177.0, "f16")
            for threads in (1, 3):
                again = mkv.attention(q, k, spoil(v, bad), sm_scale=1.0, threads=threads)
                np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_sink_that_outweighs_all_leaves_nothing(isa: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    q, k, v = make(rng, 0.0, 2, 12, kind)
    for sink, nothing in ((177.0, True), (40.0, False)):
        sinks = np.full(HQ, sink, np.float32)
        clean = mkv.attention(q, k, v, sm_scale=1.0, sinks=sinks)
        for bad in BAD:
            out = mkv.attention(q, k, spoil(v, bad), sm_scale=1.0, sinks=sinks)
            expect(out, clean, nothing, kind)


@pytest.mark.parametrize("n", [1, 12], ids=["decode", "prefill"])
def test_a_seen_value_counts_by_its_weight_in_a_cold_tier(
    isa: str, rng: np.random.Generator, n: int
) -> None:
    """Packed tiles: the bad value is in a block that moved to cold."""
    for gap in (177.0, 88.0, 86.0, 40.0):
        outs = []
        for bad in (None, *BAD):
            cache = mkv.MixedKVCache(
                num_layers=1, num_kv_heads=HKV, head_dim=D, head_dim_v=DV, hot_size=32,
                cold_size=64, group_size=8, threshold=0.5, n_pad=8,
            )  # fmt: skip
            q, k, v = make(np.random.default_rng(2), gap, n, 30 + n, "f16")
            v = v if bad is None else spoil(v, bad)
            cache.append(range(30), [0] * 30, [k[0, :, :30]], [v[0, :, :30]])
            assert cache.tiers(0)[[AT, HEAVY]].all()
            cache.find_slot(pos=range(30, 30 + n), seq_id=[0] * n)
            cache.store(0, k[0, :, 30:], v[0, :, 30:])
            outs.append(cache.attend(0, q[0], sm_scale=1.0)[None])
        for out in outs[1:]:
            expect(out, outs[0], gap >= 88.0, "q4_0")
