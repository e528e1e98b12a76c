"""The rows that attention reads, looked at: as they are stored, and as what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import DV, HKV, HQ, LAYERS, Cache, D, add, cold_positions, mixed, rows_for
from conftest import Q4_0_REL, assert_close, normal, relative_error

WIDE = 64
"""Whole blocks of every format."""


def wide_rows(pos: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """K and V [HKV, n, WIDE]; keys around a vector that they share."""
    shared = 3 * normal(np.random.default_rng(5), HKV, 1, WIDE)
    rows = [normal(np.random.default_rng([6, p]), 2, HKV, 1, WIDE) for p in pos]
    return shared + np.concatenate([x[0] for x in rows], 1), np.concatenate([x[1] for x in rows], 1)


def as_f32(rows: np.ndarray | mkv.QuantizedArray) -> np.ndarray:
    if isinstance(rows, mkv.QuantizedArray):
        return ref.dequantize_q4_0(rows.data)
    return rows.astype(np.float32)


def test_export_rows_gives_what_is_stored() -> None:
    cache = mixed(sink_tokens=2)
    add(cache, range(5))
    add(cache, range(5, 14))
    hot, cold = cache.export_rows(1, 0)
    tiers = cache.tiers(0)
    positions = cache.positions(0)
    assert 0 < len(cold.positions) < len(positions)
    np.testing.assert_array_equal(hot.positions, positions[~tiers])
    np.testing.assert_array_equal(cold.positions, positions[tiers])
    k, v = rows_for(positions.tolist(), 1)
    for exported, original in ((hot.k, k), (hot.v, v)):
        assert exported.dtype == np.float16
        np.testing.assert_array_equal(exported, original[:, ~tiers].astype(np.float16))
    for exported, original in ((cold.k, k), (cold.v, v)):
        assert exported.format == "q4_0"
        once = original[:, tiers].astype(np.float16)
        np.testing.assert_array_equal(exported.data, ref.quantize_q4_0(once))
    for rows, looked in ((hot.k, cache.keys(1, 0)), (hot.v, cache.values(1, 0))):
        np.testing.assert_array_equal(as_f32(rows), looked[:, ~tiers])
    np.testing.assert_array_equal(as_f32(cold.k), cache.keys(1, 0)[:, tiers])


@pytest.mark.parametrize("n", [0, 3, 40], ids=["committed", "in_hot", "longer_than_hot"])
@pytest.mark.parametrize("options", [
    {}, {"rotate": True}, {"center_keys": True}, {"rotate": True, "center_keys": True},
    {"rotate": True, "quantize": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "nl4", "nl3", "bf16"])
def test_export_rows_dequantised_is_what_attention_comes_to(
    n: int, options: dict[str, Any], kind: str, rng: np.random.Generator
) -> None:
    if options.get("quantize", True):
        options = {**options, "cold_k_type": kind, "cold_v_type": kind}
    sizes = {"hot_size": 8, "cold_size": 64, "group_size": 4}
    if not options.get("quantize", True):
        sizes = {"hot_size": 64}
    geometry = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": WIDE, "n_pad": 1}
    cache: Cache = mkv.MixedKVCache(**geometry, **sizes, **options)
    for first in (0, 7):
        own = range(first, first + 7)
        assert cache.find_slot(pos=own, seq_id=[0] * 7) is not None
        for layer in range(LAYERS):
            cache.store(layer, *wide_rows(own))
        cache.commit()
    pos = list(range(14, 14 + n))
    if n:
        assert cache.find_slot(pos=pos, seq_id=[0] * n) is not None
        with pytest.raises(ValueError, match="be stored before its rows are exported"):
            cache.export_rows(0, 0, dequantize=True)
        cache.store(0, *wide_rows(pos))
    hot, cold = cache.export_rows(0, 0, dequantize=True)
    k, v = (np.concatenate(pair, 1) for pair in ((cold.k, hot.k), (cold.v, hot.v)))
    at = np.concatenate([cold.positions, hot.positions])
    assert sorted(at) == list(range(14 + n))
    assert k.dtype == v.dtype == np.float32
    # What goes in is what comes out, but for what the formats lose.
    given = wide_rows(at.tolist())
    assert relative_error(k, given[0]) < 0.25
    assert relative_error(v, given[1]) < 0.25
    if n:
        q = normal(rng, HQ, n, WIDE)
        seen = at[None, :] <= np.array(pos)[:, None]
        want, _ = ref.attention(q, k, v, mask=seen)
        assert_close(cache.attend(0, q), want[0], Q4_0_REL)
        cache.restore()
    else:
        order = np.argsort(at)
        np.testing.assert_array_equal(k[:, order], cache.keys(0, 0))
        np.testing.assert_array_equal(v[:, order], cache.values(0, 0))


def test_export_rows_wants_to_know_how() -> None:
    with pytest.raises(TypeError, match="dequantize must be a bool, got int"):
        mixed().export_rows(0, 0, dequantize=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [3, 40], ids=["in_hot", "longer_than_hot"])
def test_export_rows_gives_what_a_pending_slot_attends(n: int, rng: np.random.Generator) -> None:
    cache = mixed()
    add(cache, range(14))
    cold_before = len(cold_positions(cache))
    pos = list(range(14, 14 + n))
    slot = cache.find_slot(pos=pos, seq_id=[0] * n)
    assert slot is not None
    assert (slot.num_cold > 0) == (n == 40)
    with pytest.raises(ValueError, match="be stored before its rows are exported"):
        cache.export_rows(0, 0)
    cache.store(0, *rows_for(pos))
    hot, cold = cache.export_rows(0, 0)
    assert len(cold.positions) == cold_before + slot.num_moved
    assert sorted([*hot.positions, *cold.positions]) == list(range(14 + n))
    assert set(pos) <= set(hot.positions.tolist())
    q = normal(rng, HQ, n, D)
    out = cache.attend(0, q)
    k = np.concatenate([as_f32(cold.k), as_f32(hot.k)], 1)
    v = np.concatenate([as_f32(cold.v), as_f32(hot.v)], 1)
    seen = np.concatenate([cold.positions, hot.positions])[None, :] <= np.array(pos)[:, None]
    want = mkv.attention(q, k, v, mask=seen)
    assert_close(out, want, Q4_0_REL)
    if slot.num_cold:
        cache.store(1, *rows_for(pos, 1))
        with pytest.raises(ValueError, match="be the one stored last"):
            cache.export_rows(0, 0)
    cache.restore()


def test_export_rows_of_one_sequence_alone() -> None:
    cache = mixed(n_seq_max=3)
    add(cache, range(3), 0)
    add(cache, range(2), 1)
    hot, cold = cache.export_rows(0, 1)
    assert hot.k.shape == (HKV, 2, D)
    assert hot.v.shape == (HKV, 2, DV)
    assert cold.k.shape == (HKV, 0, D)
    assert cache.export_rows(0, 2)[0].positions.size == 0
    with pytest.raises(ValueError, match="seq"):
        cache.export_rows(0, 3)
    with pytest.raises(ValueError, match="layer"):
        cache.export_rows(LAYERS, 0)
