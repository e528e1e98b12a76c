"""The caches, case by case: what stands in the semantics, one test for each sentence."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    F32_REL,
    Q4_0_REL,
    assert_close,
    assert_lse_close,
    normal,
    relative_error,
    tolerance,
)

LAYERS, HQ, HKV, D, DV = 2, 6, 2, 32, 64
Cache = Any


def mixed(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> Cache:
    shape = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": D, "head_dim_v": DV}
    sizes = {"hot_size": hot, "cold_size": cold, "group_size": group, "n_pad": 1}
    return mkv.MixedKVCache(**{**shape, **sizes, **options})


def unified(hot: int = 16, cold: int = 0, group: int = 0, **options: Any) -> Cache:
    shape = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": D, "head_dim_v": DV}
    return mkv.UnifiedKVCache(**{**shape, "size": hot, "n_pad": 1, **options})


def one_tier(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> Cache:
    return mixed(hot, cold, group, quantize=False, **options)


MAKERS = {"mixed": mixed, "unified": unified, "mixed_one_tier": one_tier}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Cache]:
    """Each kind of cache, for what they have in common."""
    maker: Callable[..., Cache] = request.param
    return maker


def rows_for(pos: Sequence[int], layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that depend on position and layer alone: k [Hkv, n, D], v [Hkv, n, Dv]."""
    ks, vs = [], []
    for p in pos:
        rng = np.random.default_rng([p, layer])
        ks.append(normal(rng, HKV, D))
        vs.append(normal(rng, HKV, DV))
    return np.stack(ks, 1), np.stack(vs, 1)


def add(cache: Cache, pos: Sequence[int], seq: Any = 0) -> Any:
    """find_slot, store, commit; returns the slot, or None where there is no room."""
    pos = list(pos)
    slot = cache.find_slot(pos=pos, seq_id=[seq] * len(pos)) if pos else None
    if slot is not None:
        for layer in range(LAYERS):
            cache.store(layer, *rows_for(pos, layer))
        cache.commit()
    return slot


def cold_positions(cache: Cache, seq: int = 0) -> list[int]:
    return [int(p) for p, c in zip(cache.positions(seq), cache.tiers(seq), strict=True) if c]


def hot_positions(cache: Cache, seq: int = 0) -> list[int]:
    return [int(p) for p, c in zip(cache.positions(seq), cache.tiers(seq), strict=True) if not c]


def snapshot(cache: Cache, seqs: int = 1) -> list[Any]:
    """Everything that can be seen of a cache but the time that it took."""
    stats = dataclasses.asdict(cache.stats())
    for name in ("seconds", "books_bytes"):
        del stats[name]
    seen: list[Any] = [len(cache), stats]
    for seq in range(seqs):
        seen += [list(cache.positions(seq)), list(cache.tiers(seq))]
        for layer in range(LAYERS):
            seen += [cache.keys(layer, seq).tobytes(), cache.values(layer, seq).tobytes()]
    return seen


# --- a ubatch -------------------------------------------------------------------------------------


def test_cache_new_is_empty(make: Callable[..., Cache]) -> None:
    cache = make()
    assert len(cache) == 0
    assert cache.seq_pos_min(0) == cache.seq_pos_max(0) == -1
    assert cache.positions(0).dtype == np.int64
    assert cache.positions(0).shape == (0,)
    assert cache.tiers(0).dtype == bool
    assert cache.tiers(0).shape == (0,)
    assert cache.keys(0, 0).shape == (HKV, 0, D)
    assert cache.values(0, 0).shape == (HKV, 0, DV)
    stats = cache.stats()
    assert (stats.hot_tokens, stats.cold_tokens, stats.tokens_seen, stats.moved) == (0, 0, 0, 0)


def test_cache_empty_is_true(make: Callable[..., Cache]) -> None:
    """`if cache:` asks whether there is one."""
    assert make()
    assert "16" in repr(make())


def test_cache_slot_says_what_it_plans(make: Callable[..., Cache]) -> None:
    slot = make().find_slot(pos=[0, 1, 2], seq_id=[0, 0, 0])
    assert isinstance(slot, mkv.Slot)
    assert (slot.num_tokens, slot.num_hot, slot.num_cold, slot.num_moved) == (3, 3, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        slot.num_hot = 1


def test_cache_stores_and_gives_back(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, range(5))
    assert len(cache) == 5
    assert list(cache.positions(0)) == [0, 1, 2, 3, 4]
    assert (cache.seq_pos_min(0), cache.seq_pos_max(0)) == (0, 4)
    for layer in range(LAYERS):
        k, v = rows_for(range(5), layer)
        assert cache.keys(layer, 0).dtype == np.float32
        np.testing.assert_array_equal(cache.keys(layer, 0), ref.stored_as(k, "f16"))
        np.testing.assert_array_equal(cache.values(layer, 0), ref.stored_as(v, "f16"))


def test_cache_gives_back_in_order_of_position(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, [5, 1])
    add(cache, [3, 0, 4])
    assert list(cache.positions(0)) == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(
        cache.keys(1, 0), ref.stored_as(rows_for([0, 1, 3, 4, 5], 1)[0], "f16")
    )


def test_cache_same_position_twice_is_legal_older_first(make: Callable[..., Cache]) -> None:
    cache = make()
    first, second = (
        normal(np.random.default_rng(1), HKV, 1, D),
        normal(np.random.default_rng(2), HKV, 1, D),
    )
    for k in (first, second):
        cache.append([7], [0], [k] * LAYERS, [np.zeros((HKV, 1, DV), np.float32)] * LAYERS)
    assert list(cache.positions(0)) == [7, 7]
    np.testing.assert_array_equal(
        cache.keys(0, 0), ref.stored_as(np.concatenate([first, second], 1), "f16")
    )


def test_cache_pending_tokens_are_not_there_yet(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, [0, 1])
    cache.find_slot(pos=[2, 3], seq_id=[0, 0])
    assert len(cache) == 2
    assert list(cache.positions(0)) == [0, 1]
    assert cache.keys(0, 0).shape == (HKV, 2, D)
    assert cache.seq_pos_max(0) == 1
    assert cache.stats().tokens_seen == 2
    cache.commit()
    assert len(cache) == 4
    assert cache.seq_pos_max(0) == 3
    assert cache.stats().tokens_seen == 4


def test_cache_layer_not_stored_holds_zeros(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, range(4))
    cache.seq_rm(0)  # so that the cells are not fresh ones
    cache.find_slot(pos=[0, 1], seq_id=[0, 0])
    cache.store(1, *rows_for([0, 1], 1))
    cache.commit()
    assert np.all(cache.keys(0, 0) == 0)
    assert np.all(cache.values(0, 0) == 0)
    np.testing.assert_array_equal(cache.keys(1, 0), ref.stored_as(rows_for([0, 1], 1)[0], "f16"))


def test_cache_long_ubatch_layer_not_stored_holds_zeros_in_both_tiers() -> None:
    cache = mixed(hot=8, cold=32)
    add(cache, range(30))
    cache.seq_rm(0)
    cache.find_slot(pos=range(20), seq_id=[0] * 20)
    cache.store(1, *rows_for(range(20), 1))
    cache.commit()
    assert cache.tiers(0).any()
    assert not cache.tiers(0).all()
    assert np.all(cache.keys(0, 0) == 0)
    assert np.all(cache.values(0, 0) == 0)
    assert np.all(cache.keys(1, 0).any(axis=-1))


def test_cache_store_twice_the_last_one_wins(make: Callable[..., Cache]) -> None:
    cache = make()
    cache.find_slot(pos=[0], seq_id=[0])
    cache.store(0, *rows_for([5]))
    cache.store(0, *rows_for([9]))
    cache.commit()
    np.testing.assert_array_equal(cache.keys(0, 0), ref.stored_as(rows_for([9])[0], "f16"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("hot", ["f32", "f16", "q4_0"])
def test_cache_store_converts_to_the_type_of_hot(dtype: type[np.generic], hot: str) -> None:
    k, v = (x.astype(dtype) for x in rows_for(range(3)))
    for cache in (mixed(hot_k_type=hot, hot_v_type=hot), unified(k_type=hot, v_type=hot)):
        cache.append([0, 1, 2], [0, 0, 0], [k] * LAYERS, [v] * LAYERS)
        np.testing.assert_array_equal(cache.keys(0, 0), ref.stored_as(k, hot))
        np.testing.assert_array_equal(cache.values(1, 0), ref.stored_as(v, hot))


@pytest.mark.parametrize(
    "types", [("f32", "f16"), ("f16", "f32"), ("q4_0", "f16"), ("f16", "q4_0")]
)
def test_cache_k_and_v_types_are_apart(types: tuple[str, str]) -> None:
    cache = mixed(hot=4, hot_k_type=types[0], hot_v_type=types[1], cold_k_type=types[1],
                  cold_v_type=types[0])  # fmt: skip
    add(cache, range(20))
    k, v = rows_for(range(20))
    cold = cache.tiers(0)
    hot_k, hot_v = (ref.stored_as(x, t) for x, t in zip((k, v), types, strict=True))
    want_k = np.where(cold[:, None], ref.stored_as(hot_k, types[1]), hot_k)
    want_v = np.where(cold[:, None], ref.stored_as(hot_v, types[0]), hot_v)
    np.testing.assert_array_equal(cache.keys(0, 0), want_k)
    np.testing.assert_array_equal(cache.values(0, 0), want_v)


def test_cache_store_strided_rows(make: Callable[..., Cache]) -> None:
    """Token-major rows and transposed views, as models have them."""
    k, v = rows_for(range(3))
    wide = np.zeros((3, HKV, 2 * D), np.float32)
    wide[..., :D] = k.transpose(1, 0, 2)
    cache = make()
    cache.find_slot(pos=[0, 1, 2], seq_id=[0] * 3)
    cache.store(0, wide.transpose(1, 0, 2)[..., :D], np.asfortranarray(v))
    cache.commit()
    np.testing.assert_array_equal(cache.keys(0, 0), ref.stored_as(k, "f16"))
    np.testing.assert_array_equal(cache.values(0, 0), ref.stored_as(v, "f16"))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_cache_store_and_attend_torch(make: Callable[..., Cache], name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    k, v = (torch.from_numpy(x).to(dtype) for x in rows_for(range(3)))
    q = torch.randn(HQ, 3, D).to(dtype)
    cache = make()
    cache.find_slot(pos=[0, 1, 2], seq_id=[0] * 3)
    cache.store(0, k.transpose(0, 1).contiguous().transpose(0, 1), v)
    out, lse = cache.attend(0, q, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert out.shape == (HQ, 3, DV)
    assert isinstance(lse, torch.Tensor)
    assert lse.shape == (HQ, 3)
    want, _ = ref.attention(
        q.double().numpy(),
        ref.stored_as(k.float().numpy(), "f16"),
        ref.stored_as(v.float().numpy(), "f16"),
        causal=True,
    )
    assert relative_error(out.float().numpy(), want[0]) <= max(
        float(torch.finfo(dtype).eps), F32_REL
    )


def test_cache_accepts_positions_and_owners_in_many_forms(make: Callable[..., Cache]) -> None:
    cache = make(n_seq_max=3)
    forms: list[tuple[Any, Any]] = [
        ([0], [0]),
        ((1,), (0,)),
        (np.array([2]), np.array([0], np.int32)),
        (range(3, 4), [{0}]),
        ([np.int64(4)], [frozenset({0, 2})]),
    ]
    for pos, seq_id in forms:
        assert cache.find_slot(pos=pos, seq_id=seq_id) is not None
        cache.commit()
    assert list(cache.positions(0)) == [0, 1, 2, 3, 4]
    assert list(cache.positions(2)) == [4]


# --- commit, restore ------------------------------------------------------------------------------


def test_cache_restore_forgets_the_ubatch(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, range(5))
    before = snapshot(cache)
    cache.find_slot(pos=[5, 6], seq_id=[0, 0])
    cache.store(0, *rows_for([5, 6]))
    cache.restore()
    assert snapshot(cache) == before
    assert add(cache, [5, 6]) is not None
    assert len(cache) == 7


def test_cache_restore_puts_moved_tokens_back_bit_for_bit() -> None:
    cache = mixed(hot=16, threshold=1.0, sinks=1)
    for p in range(16):
        add(cache, [p])
    before, k = snapshot(cache), cache.keys(1, 0)
    for n in (1, 3, 12, 15):
        slot = cache.find_slot(pos=range(16, 16 + n), seq_id=[0] * n)
        assert slot.num_moved >= n
        assert cache.tiers(0).sum() == slot.num_moved
        assert not np.array_equal(cache.keys(1, 0), k)  # they are quantised now
        for layer in range(LAYERS):
            cache.store(layer, *rows_for(range(16, 16 + n), layer))
            cache.attend(layer, np.ones((HQ, n, D), np.float32))
        cache.restore()
        assert snapshot(cache) == before


def test_cache_restore_of_a_long_ubatch() -> None:
    cache = mixed(hot=8, cold=32)
    add(cache, range(12))
    before = snapshot(cache)
    slot = cache.find_slot(pos=range(12, 30), seq_id=[0] * 18)
    assert slot.num_cold > 0
    assert cache.stats().scratch_bytes > 0
    cache.store(0, *rows_for(range(12, 30)))
    cache.restore()
    assert snapshot(cache) == before
    assert cache.stats().scratch_bytes == 0


def test_cache_after_restore_it_goes_on_as_if_nothing_had_been() -> None:
    a, b = mixed(hot=8, cold=32, group=4, sinks=1), mixed(hot=8, cold=32, group=4, sinks=1)
    for i in range(12):
        if a.find_slot(pos=[100 + i] * (i + 1), seq_id=[0] * (i + 1)) is not None:
            a.restore()
        for cache in (a, b):
            add(cache, range(3 * i, 3 * i + 3))
        assert snapshot(a) == snapshot(b)


def test_cache_none_where_it_does_not_fit_and_nothing_changed(make: Callable[..., Cache]) -> None:
    cache = make(hot=8, cold=8)
    add(cache, range(6))
    before = snapshot(cache)
    assert cache.find_slot(pos=range(6, 36), seq_id=[0] * 30) is None
    assert snapshot(cache) == before
    with pytest.raises(ValueError, match="slot"):
        cache.commit()  # there is no slot
    assert add(cache, [6]) is not None


def test_cache_one_tier_never_moves() -> None:
    for cache in (unified(hot=8), one_tier(hot=8, cold=64)):
        for p in range(8):
            assert add(cache, [p]) is not None
        assert add(cache, [8]) is None
        stats = cache.stats()
        assert (stats.hot_tokens, stats.cold_tokens, stats.moved) == (8, 0, 0)
        assert (stats.cold_size, stats.cold_bytes, stats.journal_bytes) == (0, 0, 0)
        assert not cache.tiers(0).any()


# --- when and what moves --------------------------------------------------------------------------


def test_cache_trigger_is_strictly_above_the_level() -> None:
    """hot 10, threshold 0.8: nothing moves at 8, min(9 // 4, group) at 9."""
    cache = mixed(hot=10, cold=40, group=8)
    for p in range(8):
        add(cache, [p])
    assert cache.stats().moved == 0
    add(cache, [8])
    stats = cache.stats()
    assert (stats.moved, stats.events, stats.hot_tokens, stats.cold_tokens) == (2, 1, 7, 2)
    assert cold_positions(cache) == [0, 1]


@pytest.mark.parametrize(
    ("hot", "threshold", "level"),
    [(10, 0.8, 8), (9, 0.8, 7), (16, 0.5, 8), (7, 1.0, 7), (8, 0.01, 0), (64, 0.8, 51)],
)
def test_cache_level_is_rounded_down(hot: int, threshold: float, level: int) -> None:
    cache = mixed(hot=hot, cold=200, group=1, threshold=threshold)
    add(cache, range(hot))
    assert cache.stats().hot_tokens == level


def test_cache_group_size_bounds_a_batch() -> None:
    """60 of 64 in use, level 51: batches of two until 50 are left."""
    cache = mixed(hot=64, cold=64, group=2)
    add(cache, range(60))
    stats = cache.stats()
    assert (stats.hot_tokens, stats.moved, stats.events) == (50, 10, 5)
    assert cold_positions(cache) == list(range(10))


def test_cache_a_quarter_bounds_a_batch() -> None:
    """60 of 64, group 100: one batch of 15."""
    cache = mixed(hot=64, cold=64, group=100)
    add(cache, range(60))
    assert (cache.stats().hot_tokens, cache.stats().events) == (45, 1)


def test_cache_tiny_hot_still_moves_one() -> None:
    """Of three in use a quarter is none; one moves all the same."""
    cache = mixed(hot=3, cold=8, threshold=0.7)
    add(cache, range(3))
    assert (cache.stats().moved, cache.stats().hot_tokens) == (1, 2)


def test_cache_moves_first_in_first_out_over_sequences() -> None:
    """By age, not by position: a young short sequence beside a long one stays hot."""
    cache = mixed(hot=16, cold=64, group=4, n_seq_max=2)
    for p in range(9):
        add(cache, [100 + p], 0)
    for p in range(4):
        add(cache, [p], 1)
    assert cold_positions(cache, 0) == [100, 101, 102]
    assert cold_positions(cache, 1) == []


def test_cache_moves_by_position_inside_a_ubatch() -> None:
    cache = mixed(hot=8, cold=32, group=8)
    add(cache, [5, 2, 7, 0, 6, 1, 3])
    assert cold_positions(cache) == [0]
    for p in (4, 8, 9, 10):
        add(cache, [p])
    assert cold_positions(cache) == [0, 1, 2, 3, 5]  # 4 came later


def test_cache_moves_never_by_cell() -> None:
    """Freed cells are used again; what lies in them is young."""
    cache = mixed(hot=8, cold=32, group=2)
    add(cache, range(6))
    cache.seq_rm(0, 0, 3)
    add(cache, [50, 51, 52])
    assert cold_positions(cache) == []
    add(cache, [53])
    assert cold_positions(cache) == [3]


def test_cache_order_is_kept_over_restores() -> None:
    cache = mixed(hot=8, cold=32, group=1)
    add(cache, range(6))
    cache.find_slot(pos=[6, 7, 8, 9], seq_id=[0] * 4)
    cache.restore()
    add(cache, [6])
    assert cold_positions(cache) == [0]


def test_cache_pinned_sinks_stay_hot() -> None:
    cache = mixed(hot=16, cold=200, group=8, sinks=3)
    for p in range(150):
        add(cache, [p])
    assert hot_positions(cache)[:3] == [0, 1, 2]
    hot = hot_positions(cache)[3:]
    assert hot == list(range(150 - len(hot), 150))


def test_cache_pins_are_first_positions_of_every_sequence() -> None:
    cache = mixed(hot=16, cold=200, group=8, sinks=2, n_seq_max=3)
    for p in range(50):
        for s in range(3):
            add(cache, [p], s)
    for s in range(3):
        assert hot_positions(cache, s)[:2] == [0, 1]


def test_cache_pins_follow_positions_as_they_are_now() -> None:
    cache = mixed(hot=16, cold=64, group=8, sinks=2)
    add(cache, range(10, 16))
    cache.seq_add(0, 10, 12, -10)  # 10, 11 become 0, 1
    for p in range(16, 60):
        add(cache, [p])
    assert hot_positions(cache)[:2] == [0, 1]
    cache.seq_add(0, 0, 2, 100)
    for p in range(60, 80):
        add(cache, [p])
    assert {100, 101} <= set(cold_positions(cache))


def test_cache_pins_count_as_occupied() -> None:
    """Level 12, 4 pinned: 13 in use move 13 // 4."""
    cache = mixed(hot=16, cold=64, group=8, sinks=4)
    add(cache, range(13))
    assert cold_positions(cache) == [4, 5, 6]


def test_cache_find_slot_moves_whole_batches_until_it_fits() -> None:
    cache = mixed(hot=16, cold=64, group=2, threshold=1.0)
    add(cache, range(15))
    slot = cache.find_slot(pos=range(15, 20), seq_id=[0] * 5)
    assert slot.num_moved == 4
    assert cache.stats().events == 2
    cache.restore()
    cache = mixed(hot=16, cold=64, group=3, threshold=1.0)
    add(cache, range(15))
    assert cache.find_slot(pos=range(15, 20), seq_id=[0] * 5).num_moved == 6


def test_cache_full_cold_lets_hot_fill_up() -> None:
    """commit never fails: it moves what cold can take."""
    cache = mixed(hot=8, cold=4, group=4)
    for p in range(12):
        assert add(cache, [p]) is not None
    stats = cache.stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (8, 4)
    assert add(cache, [12]) is None
    cache.seq_rm(0, 0, 2)
    assert add(cache, [12, 13]) is not None
    assert add(cache, [14]) is None


def test_cache_moved_tokens_are_quantised_exactly_once() -> None:
    cache = mixed(hot=8, cold=128, group=4)
    for p in range(100):
        add(cache, [p])
    for layer in range(LAYERS):
        k, v = (ref.stored_as(x, "f16") for x in rows_for(range(100), layer))
        cold = cache.tiers(0)[:, None]
        np.testing.assert_array_equal(
            cache.keys(layer, 0), np.where(cold, ref.stored_as(k, "q4_0"), k)
        )
        np.testing.assert_array_equal(
            cache.values(layer, 0), np.where(cold, ref.stored_as(v, "q4_0"), v)
        )
    assert cache.stats().moved == cache.stats().cold_tokens


def test_cache_move_does_not_fail_for_a_value() -> None:
    """A block with a NaN stays visible as what it was: every value of it reads NaN."""
    cache = mixed(hot=4, cold=16)
    k, v = rows_for(range(3))
    k[1, 0, 5], v[0, 1, 40] = np.nan, np.inf
    cache.append([0, 1, 2], [0] * 3, [k] * LAYERS, [v] * LAYERS)
    add(cache, range(3, 12))
    assert list(cache.tiers(0)[:3]) == [True] * 3
    keys, values = cache.keys(0, 0), cache.values(0, 0)
    assert np.isnan(keys[1, 0]).all()
    assert np.isfinite(np.delete(keys[1], 0, 0)).all()
    assert np.isnan(values[0, 1, 32:]).all()
    assert np.isfinite(values[0, 1, :32]).all()
    assert np.isfinite(keys[0]).all()
    assert np.isfinite(values[1]).all()


# --- long ubatches --------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("n", [17, 40, 60])
def test_cache_long_ubatch_keeps_the_newest_up_to_the_level(
    sinks: int, before: int, n: int
) -> None:
    cache = mixed(hot=16, cold=64, group=8, sinks=sinks)
    add(cache, range(before))
    slot = add(cache, range(before, before + n))
    total, level = before + n, 12
    assert slot.num_tokens == n
    assert slot.num_hot + slot.num_cold == n
    assert slot.num_moved == max(before - sinks, 0)
    want = [*range(sinks), *range(total - level + sinks, total)]
    assert hot_positions(cache) == want
    stats = cache.stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (level, total - level)
    assert stats.moved == total - level
    moves = max(before - sinks, 0)
    assert stats.events == -(-moves // 8) - (-slot.num_cold // 8)


def test_cache_long_ubatch_fills_hot_where_cold_is_too_small() -> None:
    cache = mixed(hot=16, cold=8, group=8)
    assert add(cache, range(24)) is not None
    assert (cache.stats().hot_tokens, cache.stats().cold_tokens) == (16, 8)
    cache = mixed(hot=16, cold=8, group=8)
    assert add(cache, range(25)) is None


def test_cache_long_ubatch_by_position_not_by_index(rng: np.random.Generator) -> None:
    cache = mixed(hot=16, cold=64)
    add(cache, [int(p) for p in rng.permutation(50)])
    assert hot_positions(cache) == list(range(38, 50))


@pytest.mark.parametrize("sinks", [0, 2])
def test_cache_long_ubatch_is_attended_in_the_hot_type(
    isa: str, rng: np.random.Generator, sinks: int
) -> None:
    """f32 hot: nothing of its own ubatch is rounded when attended, all of cold's is after."""
    n = 50
    cache = mixed(hot=16, cold=64, hot_k_type="f32", hot_v_type="f32", sinks=sinks)
    q = normal(rng, HQ, n, D)
    cache.find_slot(pos=range(n), seq_id=[0] * n)
    for layer in range(LAYERS):
        k, v = rows_for(range(n), layer)
        cache.store(layer, k, v)
        want, want_lse = ref.attention(q, k, v, causal=True)
        out, lse = cache.attend(layer, q, return_lse=True)
        assert_close(out, want[0])
        assert_lse_close(lse, want_lse[0])
    cache.commit()
    k, _ = rows_for(range(n), 1)
    cold = cache.tiers(0)[:, None]
    np.testing.assert_array_equal(cache.keys(1, 0), np.where(cold, ref.stored_as(k, "q4_0"), k))


def test_cache_long_ubatch_ends_as_short_ones_would() -> None:
    """What lies in cold has the same bits, whichever way it came there."""
    a, b = mixed(hot=16, cold=64), mixed(hot=16, cold=64)
    add(a, range(50))
    for p in range(50):
        add(b, [p])
    both = [p for p in cold_positions(a) if p in cold_positions(b)]
    assert len(both) >= 35
    for layer in range(LAYERS):
        np.testing.assert_array_equal(a.keys(layer, 0)[:, both], b.keys(layer, 0)[:, both])
        np.testing.assert_array_equal(a.values(layer, 0)[:, both], b.values(layer, 0)[:, both])


def test_cache_long_ubatch_attend_comes_before_the_next_store(rng: np.random.Generator) -> None:
    cache = mixed(hot=8, cold=32)
    q = normal(rng, HQ, 20, D)
    cache.find_slot(pos=range(20), seq_id=[0] * 20)
    cache.store(0, *rows_for(range(20), 0))
    first = cache.attend(0, q)
    cache.store(1, *rows_for(range(20), 1))
    with pytest.raises(ValueError, match="layer"):
        cache.attend(0, q)
    cache.attend(1, q)
    cache.store(0, *rows_for(range(20), 0))
    np.testing.assert_array_equal(cache.attend(0, q), first)
    cache.commit()


def test_cache_short_ubatch_attends_layers_in_any_order(rng: np.random.Generator) -> None:
    cache = mixed()
    q = normal(rng, HQ, 2, D)
    cache.find_slot(pos=[0, 1], seq_id=[0, 0])
    for layer in range(LAYERS):
        cache.store(layer, *rows_for([0, 1], layer))
    a = [cache.attend(layer, q) for layer in (1, 0, 1)]
    np.testing.assert_array_equal(a[0], a[2])
    assert not np.array_equal(a[0], a[1])


# --- attention ------------------------------------------------------------------------------------


def step(cache: Cache, model: ref.MixedCacheModel, rng: np.random.Generator, pos: Sequence[int],
         seq: Any = 0, rel: float | None = None, **options: Any) -> None:  # fmt: skip
    """One ubatch through both, attended and compared."""
    pos = list(pos)
    owners = [seq] * len(pos) if isinstance(seq, (int, set)) else list(seq)
    assert cache.find_slot(pos=pos, seq_id=owners) is not None
    assert model.find_slot(pos, owners) is not None
    if rel is None:
        rel = tolerance("q4_0") if cache.stats().cold_tokens else F32_REL
    for layer in range(LAYERS):
        k, v = normal(rng, HKV, len(pos), D), normal(rng, HKV, len(pos), DV)
        q = normal(rng, HQ, len(pos), D)
        for it in (cache, model):
            it.store(layer, k, v)
        out, lse = cache.attend(layer, q, return_lse=True, **options)
        want, want_lse = model.attend(layer, q, **options)
        assert_close(out, want, rel)
        assert_lse_close(lse, want_lse, rel)
    cache.commit()
    model.commit()


def twins(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> tuple[Cache, Any]:
    model = ref.MixedCacheModel(
        num_layers=LAYERS, num_kv_heads=HKV, head_dim=D, head_dim_v=DV,
        hot_size=hot, cold_size=cold, group_size=group, **options,
    )  # fmt: skip
    return mixed(hot, cold, group, **options), model


@pytest.mark.parametrize("sinks", [0, 2])
def test_cache_prefill_and_decode_equal_model(
    isa: str, rng: np.random.Generator, sinks: int
) -> None:
    cache, model = twins(sinks=sinks)
    step(cache, model, rng, range(40), rel=Q4_0_REL)
    for p in range(40, 70):
        step(cache, model, rng, [p], rel=Q4_0_REL)
    assert list(cache.tiers(0)) == model.tiers(0)


OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"sm_scale": 0.4},
    "soft_cap": {"logits_soft_cap": 2.0},
    "window": {"window_left": 4},
    "window_0": {"window_left": 0},
    "alibi": {"alibi_slopes": np.geomspace(0.5, 0.01, HQ).astype(np.float32)},
    "sinks": {"sinks": np.linspace(-2, 2, HQ).astype(np.float32)},
    "all": {
        "sm_scale": 0.4,
        "logits_soft_cap": 2.0,
        "window_left": 20,
        "alibi_slopes": np.geomspace(0.5, 0.01, HQ).astype(np.float32),
        "sinks": np.linspace(-2, 2, HQ).astype(np.float32),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_cache_attend_option(isa: str, rng: np.random.Generator, option: str) -> None:
    cache, model = twins()
    step(cache, model, rng, range(30), rel=Q4_0_REL, **OPTIONS[option])
    for p in range(30, 36):
        step(cache, model, rng, [p], rel=Q4_0_REL, **OPTIONS[option])


@pytest.mark.parametrize("override", [None, -1, 0, 9])
def test_cache_window_of_the_configuration_and_override(
    rng: np.random.Generator, override: int | None
) -> None:
    cache, model = twins(window_left=3)
    for pos in (range(14), range(14, 30), [30], [31]):
        step(cache, model, rng, pos, rel=Q4_0_REL, window_left=override)


def test_cache_pinned_sinks_do_not_widen_a_window(rng: np.random.Generator) -> None:
    cache, model = twins(sinks=4, window_left=5)
    step(cache, model, rng, range(30), rel=Q4_0_REL)
    v = np.zeros((HKV, 1, DV), np.float32)
    cache.find_slot(pos=[30], seq_id=[0])
    cache.store(0, np.zeros((HKV, 1, D), np.float32), v)
    _, lse = cache.attend(0, np.zeros((HQ, 1, D), np.float32), return_lse=True)
    np.testing.assert_allclose(lse, np.log(6.0), rtol=1e-6)  # 25 to 30: window_left + 1 keys


def test_cache_sequences_see_their_own_alone(isa: str, rng: np.random.Generator) -> None:
    cache, model = twins(n_seq_max=3)
    for i in range(15):
        step(cache, model, rng, [i, i, i], [0, 1, 2], rel=Q4_0_REL)
    step(cache, model, rng, [15, 40, 16, 15], [0, 2, 0, 1], rel=Q4_0_REL)


@pytest.mark.parametrize("cold", [160, 112], ids=["room_for_tiles", "short_of_room"])
def test_cache_four_sequences_side_by_side_equal_model(
    isa: str, rng: np.random.Generator, cold: int
) -> None:
    """In cold each has tiles of its own while there are any; then they share."""
    cache, model = twins(hot=32, cold=cold, group=8, n_seq_max=4)
    step(cache, model, rng, [p for p in range(16) for _ in range(4)], [0, 1, 2, 3] * 16,
         rel=Q4_0_REL)  # fmt: skip
    for p in range(16, 26):
        step(cache, model, rng, [p] * 4, [3, 1, 0, 2], rel=Q4_0_REL)
    for it in (cache, model):  # a hole, and room for others in it
        it.seq_rm(1, 0, 12)
        it.seq_cp(0, 1, 4, 8)
    for p in range(26, 34):
        step(cache, model, rng, [p] * 4, [0, 1, 2, {2, 3}], rel=Q4_0_REL)
    for seq in range(4):
        assert list(cache.tiers(seq)) == model.tiers(seq)
    assert cache.stats().cold_tokens > 80


def test_cache_nan_of_another_sequence_does_not_leak(isa: str, rng: np.random.Generator) -> None:
    """Neither from hot nor from cold, nor from a later position of its own sequence."""
    cache = mixed(hot=16, cold=64, n_seq_max=2)
    bad = (
        [np.full((HKV, 8, D), np.nan, np.float32)] * LAYERS,
        [np.full((HKV, 8, DV), np.nan, np.float32)] * LAYERS,
    )
    for i in range(4):
        add(cache, range(8 * i, 8 * i + 8), 0)
        cache.append(list(range(8 * i, 8 * i + 8)), [1] * 8, *bad)
    assert cache.tiers(1).any()
    assert not cache.tiers(1).all()
    cache.append([40, 41], [0, 0], *[[x[:, :2] for x in rows] for rows in bad])
    cache.find_slot(pos=[32, 33, 39], seq_id=[0, 0, 0])
    cache.store(0, *rows_for([32, 33, 39]))
    assert np.isfinite(cache.attend(0, normal(rng, HQ, 3, D))).all()
    cache.commit()
    cache.find_slot(pos=[40], seq_id=[0])
    cache.store(0, *rows_for([40]))
    assert np.isnan(cache.attend(0, normal(rng, HQ, 1, D))).all()


def test_cache_shared_token_sees_what_its_smallest_owner_sees(rng: np.random.Generator) -> None:
    cache, model = twins(n_seq_max=3)
    for s in (0, 1, 2):
        step(cache, model, rng, range(5), s)
    step(cache, model, rng, [5], {1, 2})
    step(cache, model, rng, [6, 6], [{0, 2}, {2, 1}])
    assert list(cache.positions(2)) == [0, 1, 2, 3, 4, 5, 6, 6]


def test_cache_equal_positions_see_one_another(rng: np.random.Generator) -> None:
    cache, model = twins()
    step(cache, model, rng, [3, 3, 3])
    step(cache, model, rng, [3, 2, 3])


def test_cache_positions_with_gaps_and_backwards(rng: np.random.Generator) -> None:
    cache, model = twins()
    step(cache, model, rng, [1000, 10, 2**31 - 1, 500])
    step(cache, model, rng, [400, 2**31 - 1, 0])
    step(cache, model, rng, [999], window_left=600)


def test_cache_attend_equals_attention_over_its_rows(isa: str, rng: np.random.Generator) -> None:
    """What the cache gives is what attention() gives on the rows that it shows."""
    cache = mixed(hot=16, cold=64)
    add(cache, range(40))
    q = normal(rng, HQ, 3, D)
    cache.find_slot(pos=[40, 41, 42], seq_id=[0] * 3)
    cache.store(0, *rows_for([40, 41, 42]))
    out = cache.attend(0, q)
    cache.commit()
    k = np.concatenate(
        [cache.keys(0, 0)[:, :40], ref.stored_as(rows_for([40, 41, 42])[0], "f16")], 1
    )
    v = np.concatenate(
        [cache.values(0, 0)[:, :40], ref.stored_as(rows_for([40, 41, 42])[1], "f16")], 1
    )
    # Moves at commit touch tokens below 40 alone; those were read as they were before.
    before = mixed(hot=16, cold=64)
    add(before, range(40))
    k[:, :40], v[:, :40] = before.keys(0, 0), before.values(0, 0)
    assert relative_error(out, np.asarray(mkv.attention(q, k, v, causal=True))) <= Q4_0_REL


def test_cache_attend_into_out(make: Callable[..., Cache], rng: np.random.Generator) -> None:
    cache = make()
    cache.find_slot(pos=[0, 1, 2], seq_id=[0] * 3)
    cache.store(0, *rows_for(range(3)))
    q = normal(rng, HQ, 3, D)
    want = cache.attend(0, q)
    out = np.full((HQ, 3, DV), np.nan, np.float32)
    assert cache.attend(0, q, out=out) is out
    np.testing.assert_array_equal(out, want)
    wide = np.zeros((3, HQ, DV + 1), np.float32)
    cache.attend(0, q, out=wide.transpose(1, 0, 2)[..., :DV])
    np.testing.assert_array_equal(wide.transpose(1, 0, 2)[..., :DV], want)
    assert np.all(wide[..., DV] == 0)


def test_cache_attend_query_strides_and_types(
    make: Callable[..., Cache], rng: np.random.Generator
) -> None:
    cache = make()
    cache.find_slot(pos=[0, 1, 2], seq_id=[0] * 3)
    cache.store(0, *rows_for(range(3)))
    q = normal(rng, HQ, 3, D).astype(np.float16)
    want = cache.attend(0, q)
    assert want.dtype == np.float32
    np.testing.assert_array_equal(cache.attend(0, q.astype(np.float32)), want)
    np.testing.assert_array_equal(cache.attend(0, np.asfortranarray(q)), want)
    token_major = np.ascontiguousarray(q.transpose(1, 0, 2)).transpose(1, 0, 2)
    np.testing.assert_array_equal(cache.attend(0, token_major), want)


def test_cache_attend_twice_gives_the_same_and_changes_nothing(rng: np.random.Generator) -> None:
    cache = mixed()
    add(cache, range(20))
    cache.find_slot(pos=[20], seq_id=[0])
    cache.store(0, *rows_for([20]))
    q, before = normal(rng, HQ, 1, D), snapshot(cache)
    np.testing.assert_array_equal(cache.attend(0, q), cache.attend(0, q))
    assert snapshot(cache) == before


def test_cache_attend_any_number_of_query_heads(rng: np.random.Generator) -> None:
    cache = mixed()
    cache.find_slot(pos=[0, 1], seq_id=[0, 0])
    k, v = rows_for([0, 1])
    cache.store(0, k, v)
    for heads in (HKV, 3 * HKV, 8 * HKV):
        q = normal(rng, heads, 2, D)
        want, _ = ref.attention(q, ref.stored_as(k, "f16"), ref.stored_as(v, "f16"), causal=True)
        assert_close(cache.attend(0, q), want[0])


def test_cache_attend_threads_same_bits(isa: str, rng: np.random.Generator) -> None:
    cache = mixed(hot=512, cold=4096, group=256)
    cache.find_slot(pos=range(3000), seq_id=[0] * 3000)
    for layer in range(LAYERS):
        cache.store(layer, normal(rng, HKV, 3000, D), normal(rng, HKV, 3000, DV))
    cache.commit()
    cache.find_slot(pos=[3000, 3001], seq_id=[0, 0])
    cache.store(0, *rows_for([3000, 3001]))
    q = normal(rng, HQ, 2, D)
    one, one_lse = cache.attend(0, q, return_lse=True, threads=1)
    for threads in (2, 5):
        out, lse = cache.attend(0, q, return_lse=True, threads=threads)
        np.testing.assert_array_equal(out, one)
        np.testing.assert_array_equal(lse, one_lse)


@pytest.mark.parametrize("head_dims", [(4, 12), (80, 96), (7, 1)], ids=str)
def test_cache_head_dims_without_q4_0(rng: np.random.Generator, head_dims: tuple[int, int]) -> None:
    d, dv = head_dims
    for cache in (
        unified(head_dim=d, head_dim_v=dv),
        one_tier(head_dim=d, head_dim_v=dv),
        mixed(head_dim=d, head_dim_v=dv, cold_k_type="f16", cold_v_type="f32"),
    ):
        cache.find_slot(pos=range(9), seq_id=[0] * 9)
        k, v, q = normal(rng, HKV, 9, d), normal(rng, HKV, 9, dv), normal(rng, HQ, 9, d)
        cache.store(0, k, v)
        want, _ = ref.attention(q, ref.stored_as(k, "f16"), ref.stored_as(v, "f16"), causal=True)
        assert_close(cache.attend(0, q), want[0])
        cache.commit()
        np.testing.assert_array_equal(cache.keys(0, 0), ref.stored_as(k, "f16"))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_cache_head_dims_with_q4_0(isa: str, rng: np.random.Generator, head_dim: int) -> None:
    cache = mixed(head_dim=head_dim, head_dim_v=None)
    k, v = normal(rng, HKV, 30, head_dim), normal(rng, HKV, 30, head_dim)
    cache.append(range(30), [0] * 30, [k] * LAYERS, [v] * LAYERS)
    cache.find_slot(pos=[30], seq_id=[0])
    new_k, new_v = normal(rng, HKV, 1, head_dim), normal(rng, HKV, 1, head_dim)
    cache.store(0, new_k, new_v)
    q = normal(rng, HQ, 1, head_dim)
    keys = np.concatenate([cache.keys(0, 0), ref.stored_as(new_k, "f16")], 1)
    values = np.concatenate([cache.values(0, 0), ref.stored_as(new_v, "f16")], 1)
    want, _ = ref.attention(q, keys, values)
    assert_close(cache.attend(0, q), want[0], tolerance("q4_0"))


def test_cache_layers_are_apart(make: Callable[..., Cache]) -> None:
    cache = make(num_layers=5)
    cache.find_slot(pos=[0], seq_id=[0])
    for layer in range(5):
        cache.store(layer, *rows_for([0], layer))
    cache.commit()
    for layer in range(5):
        np.testing.assert_array_equal(
            cache.keys(layer, 0), ref.stored_as(rows_for([0], layer)[0], "f16")
        )


# --- layer filter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer_filter",
    [lambda layer: layer % 2 == 1, [1, 3], {3, 1}, (3, 1)],
    ids=["call", "list", "set", "tuple"],
)
def test_cache_layer_filter_keeps_numbers(make: Callable[..., Cache], layer_filter: Any) -> None:
    cache = make(num_layers=4, layer_filter=layer_filter)
    whole = make(num_layers=4)
    assert cache.stats().hot_bytes * 2 == whole.stats().hot_bytes
    cache.find_slot(pos=[0, 1], seq_id=[0, 0])
    for layer in (1, 3):
        cache.store(layer, *rows_for([0, 1], layer))
    for layer in (0, 2):
        with pytest.raises(ValueError, match=f"layer.*{layer}"):
            cache.store(layer, *rows_for([0, 1], layer))
    cache.commit()
    for layer in (1, 3):
        np.testing.assert_array_equal(
            cache.keys(layer, 0), ref.stored_as(rows_for([0, 1], layer)[0], "f16")
        )
    with pytest.raises(ValueError, match="layer"):
        cache.keys(0, 0)


def test_cache_layer_filter_append_takes_the_layers_that_are_kept() -> None:
    cache = mixed(num_layers=4, layer_filter=[0, 2])
    parts = [rows_for([0, 1], layer) for layer in (0, 2)]
    cache.append([0, 1], [0, 0], [k for k, _ in parts], [v for _, v in parts])
    np.testing.assert_array_equal(cache.keys(2, 0), ref.stored_as(parts[1][0], "f16"))


# --- append ---------------------------------------------------------------------------------------


def test_cache_append_is_find_slot_store_commit(make: Callable[..., Cache]) -> None:
    a, b = make(), make()
    add(a, range(9))
    parts = [rows_for(range(9), layer) for layer in range(LAYERS)]
    b.append(range(9), [0] * 9, [k for k, _ in parts], [v for _, v in parts])
    assert snapshot(a) == snapshot(b)
    c = make()
    c.append(range(9), [0] * 9, np.stack([k for k, _ in parts]), np.stack([v for _, v in parts]))
    assert snapshot(c) == snapshot(b)


def test_cache_append_raises_cache_full_and_changes_nothing(make: Callable[..., Cache]) -> None:
    cache = make(hot=8, cold=8)
    add(cache, range(5))
    before = snapshot(cache)
    k, v = rows_for(range(5, 40))
    with pytest.raises(mkv.CacheFull, match="35"):
        cache.append(range(5, 40), [0] * 35, [k] * LAYERS, [v] * LAYERS)
    assert snapshot(cache) == before
    assert add(cache, [5]) is not None


@pytest.mark.parametrize("wrong", ["layers", "heads", "tokens", "dim", "dtype"])
def test_cache_append_of_wrong_rows_leaves_no_slot(make: Callable[..., Cache], wrong: str) -> None:
    cache = make()
    add(cache, range(5))
    before = snapshot(cache)
    k, v = rows_for([5, 6])
    ks, vs = [k] * LAYERS, [v] * LAYERS
    if wrong == "layers":
        vs = vs[:1]
    else:
        bad = {
            "heads": v[:1],
            "tokens": v[:, :1],
            "dim": v[..., :5],
            "dtype": v.astype(np.float64),
        }[wrong]
        vs = [v, bad]
    with pytest.raises((ValueError, TypeError)):
        cache.append([5, 6], [0, 0], ks, vs)
    assert snapshot(cache) == before
    assert add(cache, [5]) is not None


# --- sequences ------------------------------------------------------------------------------------


@pytest.fixture
def two(make: Callable[..., Cache]) -> Cache:
    """Positions 0 to 5 of sequence 0, 0 to 3 of sequence 1, of three; some in cold."""
    cache = make(hot=20, cold=64, n_seq_max=3)
    if isinstance(cache, mkv.MixedKVCache) and cache.stats().cold_size:
        cache = mixed(hot=8, cold=64, n_seq_max=3)
    for p in range(6):
        add(cache, [p], 0)
        if p < 4:
            add(cache, [p], 1)
    return cache


@pytest.mark.parametrize(
    ("p0", "p1", "left"),
    [
        (-1, -1, []),
        (0, -1, []),
        (2, -1, [0, 1]),
        (-1, 2, [2, 3, 4, 5]),
        (2, 4, [0, 1, 4, 5]),
        (4, 2, [0, 1, 2, 3, 4, 5]),
        (3, 3, [0, 1, 2, 3, 4, 5]),
        (6, 99, [0, 1, 2, 3, 4, 5]),
        (-7, 1, [1, 2, 3, 4, 5]),
        (0, 2**40, []),
    ],
)
def test_cache_seq_rm_range(two: Cache, p0: int, p1: int, left: list[int]) -> None:
    two.seq_rm(0, p0, p1)
    assert list(two.positions(0)) == left
    assert list(two.positions(1)) == [0, 1, 2, 3]
    assert len(two) == len(left) + 4
    assert (two.seq_pos_min(0), two.seq_pos_max(0)) == ((left[0], left[-1]) if left else (-1, -1))


def test_cache_seq_rm_of_every_sequence(two: Cache) -> None:
    two.seq_cp(1, 2)
    two.seq_rm(-1, 2, 4)
    for seq, left in ((0, [0, 1, 4, 5]), (1, [0, 1]), (2, [0, 1])):
        assert list(two.positions(seq)) == left
    two.seq_rm(-1)
    assert len(two) == 0


def test_cache_seq_cp_shares_cells(two: Cache) -> None:
    n, stats = len(two), two.stats()
    two.seq_cp(0, 2, 1, 4)
    assert len(two) == n
    assert list(two.positions(2)) == [1, 2, 3]
    np.testing.assert_array_equal(two.keys(1, 2), two.keys(1, 0)[:, 1:4])
    assert two.stats().hot_tokens == stats.hot_tokens
    two.seq_rm(0)
    assert list(two.positions(2)) == [1, 2, 3]
    assert len(two) == 3 + 4
    two.seq_rm(2)
    assert len(two) == 4


def test_cache_seq_cp_onto_itself_is_nothing(two: Cache) -> None:
    before = snapshot(two, 3)
    two.seq_cp(0, 0)
    assert snapshot(two, 3) == before


def test_cache_seq_cp_adds_to_what_dst_has(two: Cache) -> None:
    two.seq_cp(0, 1, 4, -1)
    assert list(two.positions(1)) == [0, 1, 2, 3, 4, 5]


def test_cache_seq_keep(two: Cache) -> None:
    two.seq_cp(0, 2, 0, 2)
    two.seq_cp(1, 2, 2, 4)
    two.seq_keep(2)
    assert list(two.positions(2)) == [0, 1, 2, 3]
    assert len(two) == 4
    assert len(two.positions(0)) == len(two.positions(1)) == 0


def test_cache_seq_add_moves_positions_not_rows(two: Cache) -> None:
    k = two.keys(0, 0)
    two.seq_add(0, 2, -1, 10)
    assert list(two.positions(0)) == [0, 1, 12, 13, 14, 15]
    np.testing.assert_array_equal(two.keys(0, 0), k)
    assert list(two.positions(1)) == [0, 1, 2, 3]


def test_cache_seq_add_frees_what_becomes_negative(two: Cache) -> None:
    two.seq_add(0, 1, 5, -3)
    assert list(two.positions(0)) == [0, 0, 1, 5]
    assert len(two) == 4 + 4
    two.seq_add(0, -1, -1, -(2**50))
    assert len(two) == 4


def test_cache_seq_add_copies_shared_cells_first(two: Cache) -> None:
    two.seq_cp(0, 2)
    n, cold = len(two), two.stats().cold_tokens
    k0 = two.keys(1, 0)
    shared_cold = int(two.tiers(2)[:3].sum())
    two.seq_add(2, 0, 3, 100)
    assert list(two.positions(0)) == [0, 1, 2, 3, 4, 5]
    assert list(two.positions(2)) == [3, 4, 5, 100, 101, 102]
    assert len(two) == n + 3
    assert two.stats().cold_tokens == cold + shared_cold
    np.testing.assert_array_equal(two.keys(1, 0), k0)
    np.testing.assert_array_equal(two.keys(1, 2), np.roll(k0, -3, axis=1))


def test_cache_seq_add_of_shared_negative_copies_nothing(two: Cache) -> None:
    two.seq_cp(0, 2)
    n = len(two)
    two.seq_add(2, 0, 3, -3)
    assert list(two.positions(2)) == [3, 4, 5]
    assert list(two.positions(0)) == [0, 1, 2, 3, 4, 5]
    assert len(two) == n


def test_cache_seq_add_without_room_for_copies_changes_nothing(make: Callable[..., Cache]) -> None:
    cache = make(hot=8, cold=8, n_seq_max=2, **({} if make is unified else {"threshold": 1.0}))
    add(cache, range(6))
    cache.seq_cp(0, 1)
    before = snapshot(cache, 2)
    with pytest.raises(mkv.CacheFull, match="3 cells"):
        cache.seq_add(1, 0, 3, 50)
    assert snapshot(cache, 2) == before
    cache.seq_add(1, 0, 2, 50)
    assert list(cache.positions(1)) == [2, 3, 4, 5, 50, 51]


def test_cache_seq_add_copies_keep_their_age() -> None:
    cache = mixed(hot=12, cold=32, group=2, n_seq_max=2, threshold=0.75)
    add(cache, range(7))
    cache.seq_cp(0, 1)
    cache.seq_add(1, 0, 1, 50)  # a copy of position 0, as old as it
    add(cache, [60])
    add(cache, [61], 1)
    assert cold_positions(cache, 0) == [0]
    assert cold_positions(cache, 1) == [50]


def test_cache_seq_add_limits(two: Cache) -> None:
    before = snapshot(two, 3)
    for delta in (2**31 - 5, 2**40, 2**61):
        with pytest.raises(ValueError, match="delta"):
            two.seq_add(0, -1, -1, delta)
        assert snapshot(two, 3) == before
    two.seq_add(0, 5, -1, 2**31 - 1 - 5)
    assert two.seq_pos_max(0) == 2**31 - 1


def test_cache_seq_add_of_nothing(two: Cache) -> None:
    before = snapshot(two, 3)
    two.seq_add(0, 0, -1, 0)
    two.seq_add(0, 50, 60, 7)
    two.seq_add(2, 0, -1, 2**40)
    assert snapshot(two, 3) == before


@pytest.mark.parametrize(
    ("d", "want"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 1, 1, 2, 2]), (100, [0] * 6)]
)
def test_cache_seq_div(two: Cache, d: int, want: list[int]) -> None:
    k = two.keys(0, 0)
    two.seq_div(0, -1, -1, d)
    assert list(two.positions(0)) == want
    np.testing.assert_array_equal(two.keys(0, 0), k)  # older first where positions are equal


def test_cache_seq_div_range_and_sharing(two: Cache) -> None:
    two.seq_rm(1)
    two.seq_cp(0, 2)
    two.seq_div(2, 2, 6, 2)
    assert list(two.positions(2)) == [0, 1, 1, 1, 2, 2]
    assert list(two.positions(0)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("d", [0, -1, -5])
def test_cache_seq_div_refuses(two: Cache, d: int) -> None:
    before = snapshot(two, 3)
    with pytest.raises(ValueError, match=f"d.*{d}"):
        two.seq_div(0, -1, -1, d)
    assert snapshot(two, 3) == before


@pytest.mark.parametrize(
    ("sources", "want"),
    [
        ([1, 0, 2], [1, 0, 2]),
        ([0, 0, 0], [0, 0, 0]),
        ([1, 1, 0], [1, 1, 0]),
        ([2, 2, 2], [2, 2, 2]),
        ([1], [1, None, None]),
        ([], [None] * 3),
    ],
    ids=str,
)
def test_cache_seq_gather(two: Cache, sources: list[int], want: list[int | None]) -> None:
    was = [list(two.positions(s)) for s in range(3)]
    keys = [two.keys(0, s) for s in range(3)]
    two.seq_gather(sources)
    kept = {s for s in want if s is not None}
    assert len(two) == sum(len(was[s]) for s in kept)
    for seq, source in enumerate(want):
        assert list(two.positions(seq)) == ([] if source is None else was[source])
        if source is not None:
            np.testing.assert_array_equal(two.keys(0, seq), keys[source])


def test_cache_sequence_operations_then_attention(rng: np.random.Generator) -> None:
    cache, model = twins(n_seq_max=3)
    for i in range(12):
        step(cache, model, rng, [i, i], [0, 1], rel=Q4_0_REL)
    for it in (cache, model):
        it.seq_cp(0, 2, 3, -1)
        it.seq_rm(0, 5, 8)
        it.seq_add(2, 6, -1, -2)
        it.seq_div(1, 4, -1, 2)
    step(cache, model, rng, [12, 13, 11], [0, 1, 2], rel=Q4_0_REL)
    for it in (cache, model):
        it.seq_gather([1, 2, 2])
    step(cache, model, rng, [14, 14, 14], [0, 1, 2], rel=Q4_0_REL)


def test_cache_many_sequences() -> None:
    """More owners than a machine word has bits."""
    cache = mixed(hot=400, cold=400, n_seq_max=200)
    for s in (0, 63, 64, 127, 128, 199):
        add(cache, [s], s)
    cache.seq_cp(199, 65)
    assert list(cache.positions(65)) == [199]
    assert len(cache) == 6
    cache.seq_keep(65)
    assert len(cache) == 1
    assert list(cache.positions(199)) == []
    add(cache, [5], set(range(200)))
    assert all(cache.seq_pos_min(s) == 5 for s in range(200))


def test_cache_cells_are_used_again(make: Callable[..., Cache]) -> None:
    cache = make(hot=8, cold=8, n_seq_max=2)
    for i in range(60):
        add(cache, range(6), i % 2)
        cache.seq_rm(i % 2)
    assert len(cache) == 0
    assert cache.stats().tokens_seen == 360


def test_cache_clear(make: Callable[..., Cache]) -> None:
    cache = make(hot=8)
    add(cache, range(8))
    cache.clear()
    assert len(cache) == 0
    assert list(cache.positions(0)) == []
    assert (cache.stats().hot_tokens, cache.stats().cold_tokens) == (0, 0)
    add(cache, range(3))
    np.testing.assert_array_equal(cache.keys(0, 0), ref.stored_as(rows_for(range(3))[0], "f16"))


def test_cache_clear_drops_a_pending_slot(make: Callable[..., Cache]) -> None:
    cache = make(hot=8)
    add(cache, range(6))
    cache.find_slot(pos=[6], seq_id=[0])
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ValueError, match="slot"):
        cache.commit()
    assert add(cache, range(3)) is not None


# --- order of calls -------------------------------------------------------------------------------


def test_cache_calls_without_a_slot_are_refused(make: Callable[..., Cache]) -> None:
    cache = make()
    add(cache, range(3))
    q = np.zeros((HQ, 3, D), np.float32)
    for gone in ("commit", "restore", None):
        if gone:
            cache.find_slot(pos=[3, 4, 5], seq_id=[0] * 3)
            cache.store(0, *rows_for(range(3)))
            getattr(cache, gone)()
        before = snapshot(cache)
        for call in (
            lambda: cache.store(0, *rows_for(range(3))),
            lambda: cache.attend(0, q),
            cache.commit,
            cache.restore,
        ):
            with pytest.raises(ValueError, match="slot"):
                call()
        assert snapshot(cache) == before


def test_cache_calls_during_a_slot_are_refused(make: Callable[..., Cache]) -> None:
    cache = make(n_seq_max=2)
    add(cache, range(3))
    cache.find_slot(pos=[3, 4, 5], seq_id=[0] * 3)
    before = snapshot(cache, 2)
    for call in (
        lambda: cache.find_slot(pos=[6], seq_id=[0]),
        lambda: cache.append([6], [0], [rows_for([6])[0]] * 2, [rows_for([6])[1]] * 2),
        lambda: cache.seq_rm(0),
        lambda: cache.seq_cp(0, 1),
        lambda: cache.seq_keep(0),
        lambda: cache.seq_add(0, 0, -1, 1),
        lambda: cache.seq_div(0, 0, -1, 2),
        lambda: cache.seq_gather([0, 0]),
    ):
        with pytest.raises(ValueError, match="slot"):
            call()
        assert snapshot(cache, 2) == before
    cache.store(0, *rows_for([3, 4, 5]))
    cache.commit()
    assert len(cache) == 6


def test_cache_attend_before_store_is_refused(make: Callable[..., Cache]) -> None:
    cache = make()
    cache.find_slot(pos=[0], seq_id=[0])
    cache.store(0, *rows_for([0]))
    with pytest.raises(ValueError, match=r"layer.*1"):
        cache.attend(1, np.zeros((HQ, 1, D), np.float32))
    cache.attend(0, np.zeros((HQ, 1, D), np.float32))


# --- counters and memory --------------------------------------------------------------------------


def test_cache_bytes_are_those_of_the_configuration() -> None:
    cache = mixed(hot=64, cold=256, num_layers=3)
    hot, cold = 2 * (D + DV), (D + DV) // 32 * 18
    stats = cache.stats()
    assert stats.hot_bytes == 3 * HKV * 64 * hot
    assert stats.cold_bytes == 3 * HKV * 256 * cold
    assert 3 * HKV * 64 * hot <= stats.journal_bytes <= 1.2 * 3 * HKV * 64 * hot + 4096
    assert stats.books_bytes > 0
    assert stats.scratch_bytes == 0
    assert stats.total_bytes == (
        stats.hot_bytes + stats.cold_bytes + stats.journal_bytes + stats.books_bytes
    )


def test_cache_bytes_saved_are_against_f16() -> None:
    cache = mixed(hot=16, cold=64)
    add(cache, range(50))
    stats = cache.stats()
    f16, q4_0 = 2 * (D + DV), (D + DV) // 32 * 18
    assert stats.bytes_saved == stats.cold_tokens * LAYERS * HKV * (f16 - q4_0) > 0


def test_cache_memory_does_not_grow_in_decode(rng: np.random.Generator) -> None:
    cache = mixed(hot=32, cold=256, group=8, n_seq_max=2)
    add(cache, range(30))

    def decode(p: int) -> None:
        cache.find_slot(pos=[p, p], seq_id=[0, 1])
        for layer in range(LAYERS):
            cache.store(layer, *rows_for([p, p], layer))
            cache.attend(layer, normal(rng, HQ, 2, D))
        cache.commit()

    decode(30)
    total = cache.stats().total_bytes
    for p in range(31, 120):
        decode(p)
    assert cache.stats().total_bytes == total


def test_cache_scratch_is_of_one_layer_and_given_back() -> None:
    cache = mixed(hot=8, cold=64, num_layers=7)
    slot = cache.find_slot(pos=range(40), seq_id=[0] * 40)
    one_layer = slot.num_cold * HKV * 2 * (D + DV)
    assert one_layer <= cache.stats().scratch_bytes <= 1.2 * one_layer + 4096
    cache.commit()
    assert cache.stats().scratch_bytes == 0


def test_cache_stats_are_a_dataclass_with_these_fields() -> None:
    names = {f.name for f in dataclasses.fields(mkv.CacheStats)}
    assert names == {
        "hot_tokens", "cold_tokens", "hot_size", "cold_size", "tokens_seen", "moved", "events",
        "seconds", "hot_bytes", "cold_bytes", "journal_bytes", "books_bytes", "scratch_bytes",
        "bytes_saved",
    }  # fmt: skip
    stats = mixed().stats()
    assert isinstance(stats, mkv.CacheStats)
    assert isinstance(stats.seconds, float)


def test_cache_counters_add_up() -> None:
    cache = mixed(hot=16, cold=200, group=4)
    seen = 0
    for n in (3, 14, 1, 40, 1, 1, 7):
        add(cache, range(seen, seen + n))
        seen += n
        stats = cache.stats()
        assert stats.tokens_seen == seen
        assert stats.hot_tokens + stats.cold_tokens == len(cache) == seen
        assert stats.moved == stats.cold_tokens
        assert stats.events >= stats.moved / 4
        assert stats.hot_tokens <= 12
    assert cache.stats().seconds > 0


LINE = re.compile(
    r"^\[MIXED_CACHE_DEBUG\] \w+: hot=\d+/\d+ \(\d+\.\d%\), cold=\d+/\d+ \(\d+\.\d%\)$"
)


def test_cache_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    cache = mixed(hot=10, cold=40)
    with caplog.at_level(logging.DEBUG, "mixedkv"):
        add(cache, range(9))
        cache.clear()
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("mixedkv")]
    assert lines
    assert all(LINE.match(line) for line in lines)
    assert "hot=7/10 (70.0%), cold=2/40 (5.0%)" in " ".join(lines)


def test_cache_log_tells_of_a_move_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = mixed(hot=8, cold=40, threshold=1.0)
    add(cache, range(8))
    with caplog.at_level(logging.DEBUG, "mixedkv"):
        assert add(cache, [8]).num_moved == 2
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("mixedkv")]
    assert sum(" move:" in line for line in lines) == 1


@pytest.mark.parametrize(("value", "talks"), [("1", True), ("0", False), ("", False)])
def test_cache_log_on_request_by_environment(value: str, talks: bool) -> None:
    code = """
import numpy as np, mixedkv as m
c = m.MixedKVCache(num_layers=1, num_kv_heads=1, head_dim=32, hot_size=32, cold_size=32)
rows = np.ones((1, 30, 32), np.float32)
c.append(range(30), [0] * 30, [rows], [rows])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MIXEDKV_DEBUG": value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert bool(lines) == talks
    assert all(LINE.match(line) for line in lines)


def test_cache_is_silent_by_default(caplog: pytest.LogCaptureFixture) -> None:
    add(mixed(hot=10), range(9))
    assert not caplog.records


# --- configuration --------------------------------------------------------------------------------


def test_cache_defaults() -> None:
    cache = mkv.MixedKVCache(num_layers=1, num_kv_heads=1, head_dim=32)
    assert (cache.stats().hot_size, cache.stats().cold_size) == (1024, 4096)
    assert mkv.UnifiedKVCache(num_layers=1, num_kv_heads=1, head_dim=32).stats().hot_size == 1024


BAD_CONFIG: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 0},
    "num_kv_heads": {"num_kv_heads": 0},
    "head_dim": {"head_dim": 0},
    "head_dim_not_32": {"head_dim": 48},
    "head_dim_v": {"head_dim_v": -4},
    "head_dim_v_not_32": {"head_dim_v": 40},
    "hot_size": {"hot": 0},
    "hot_size_negative": {"hot": -16},
    "cold_size": {"cold": 0},
    "hot_size_pad": {"hot": 20, "n_pad": 16},
    "cold_size_pad": {"cold": 40, "n_pad": 16},
    "group_size": {"group": 0},
    "threshold": {"threshold": 0.0},
    "threshold_above_1": {"threshold": 1.01},
    "threshold_nan": {"threshold": float("nan")},
    "n_pad": {"n_pad": 0},
    "n_seq_max": {"n_seq_max": 0},
    "hot_k_type": {"hot_k_type": "q8_0"},
    "hot_v_type": {"hot_v_type": "F16"},
    "cold_k_type": {"cold_k_type": ""},
    "cold_v_type": {"cold_v_type": "int4"},
    "sinks": {"sinks": -1},
    "sinks_at_level": {"sinks": 12},
    "sinks_of_all": {"sinks": 4, "n_seq_max": 3},
    "window_left": {"window_left": -2},
    "layer_filter": {"layer_filter": [0, 2]},
    "layer_filter_negative": {"layer_filter": [-1]},
    "layer_filter_none_left": {"layer_filter": lambda layer: False},
    "huge_hot": {"hot": 2**33},
    "huge_group": {"group": 2**70},
    "huge_heads": {"num_kv_heads": 2**40},
    "huge_seqs": {"n_seq_max": 2**40},
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_cache_refuses_config(case: str) -> None:
    options = dict(BAD_CONFIG[case])
    (name, value), *_ = options.items()
    public = {"hot": "hot_size", "cold": "cold_size", "group": "group_size"}.get(name, name)
    with pytest.raises((ValueError, MemoryError, OverflowError), match=public) as error:
        mixed(**options)
    if not callable(value) and not isinstance(value, list) and value == value:
        shown = value if isinstance(value, str) else f"{value:g}" if value < 1e6 else str(value)
        assert shown in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 1.5),
        ("head_dim", "32"),
        ("hot", None),
        ("threshold", "0.8"),
        ("hot_k_type", 1),
        ("quantize", "yes"),
        ("layer_filter", 3),
        ("sinks", 0.5),
    ],
)
def test_cache_refuses_config_of_other_types(name: str, value: Any) -> None:
    public = {"hot": "hot_size"}.get(name, name)
    with pytest.raises((TypeError, ValueError), match=public):
        mixed(**{name: value})


def test_cache_sinks_below_the_level_are_fine() -> None:
    mixed(sinks=11)
    mixed(sinks=3, n_seq_max=3)
    one_tier(sinks=16)


def test_cache_allocation_that_cannot_be_is_an_error_not_a_crash() -> None:
    """Rows of 200 PB, books of a few MB."""
    with pytest.raises((MemoryError, ValueError)):
        mixed(hot=2**18, cold=2**18, num_layers=100_000, num_kv_heads=1000, head_dim=512)


def test_cache_dies_with_a_pending_slot(make: Callable[..., Cache]) -> None:
    cache = make(hot=8, cold=64)
    add(cache, range(7))
    cache.find_slot(pos=[7, 8], seq_id=[0, 0])
    del cache
    gc.collect()


def test_cache_refuses_positional_arguments() -> None:
    with pytest.raises(TypeError):
        mkv.MixedKVCache(2, 2, 32)
    with pytest.raises(TypeError):
        mkv.UnifiedKVCache(2, 2, 32)


# --- rows as they are stored --------------------------------------------------------------------


def as_f32(rows: np.ndarray) -> np.ndarray:
    return ref.dequantize_q4_0(rows) if rows.dtype == np.uint8 else rows.astype(np.float32)


def test_export_rows_gives_what_is_stored() -> None:
    cache = mixed(sinks=2)
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
        assert exported.dtype == np.uint8
        once = original[:, tiers].astype(np.float16)
        np.testing.assert_array_equal(exported, ref.quantize_q4_0(once))
    for rows, looked in ((hot.k, cache.keys(1, 0)), (hot.v, cache.values(1, 0))):
        np.testing.assert_array_equal(as_f32(rows), looked[:, ~tiers])
    np.testing.assert_array_equal(as_f32(cold.k), cache.keys(1, 0)[:, tiers])


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
    assert cold.k.shape == (HKV, 0, D // 32 * 18)
    assert cache.export_rows(0, 2)[0].positions.size == 0
    with pytest.raises(ValueError, match="seq"):
        cache.export_rows(0, 3)
    with pytest.raises(ValueError, match="layer"):
        cache.export_rows(LAYERS, 0)
