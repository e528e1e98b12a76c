"""Which tokens move to cold, and when, sentence by sentence."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from caches import HQ, LAYERS, D, add, cold_positions, hot_positions, mixed, rows_for
from conftest import assert_close, assert_lse_close, normal

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
    cache = mixed(hot=16, cold=200, group=8, sink_tokens=3)
    for p in range(150):
        add(cache, [p])
    assert hot_positions(cache)[:3] == [0, 1, 2]
    hot = hot_positions(cache)[3:]
    assert hot == list(range(150 - len(hot), 150))


def test_cache_pins_are_first_positions_of_every_sequence() -> None:
    cache = mixed(hot=16, cold=200, group=8, sink_tokens=2, n_seq_max=3)
    for p in range(50):
        for s in range(3):
            add(cache, [p], s)
    for s in range(3):
        assert hot_positions(cache, s)[:2] == [0, 1]


def test_cache_pins_follow_positions_as_they_are_now() -> None:
    cache = mixed(hot=16, cold=64, group=8, sink_tokens=2)
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
    cache = mixed(hot=16, cold=64, group=8, sink_tokens=4)
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


@pytest.mark.parametrize("sink_tokens", [0, 3])
@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("n", [17, 40, 60])
def test_cache_long_ubatch_keeps_the_newest_up_to_the_level(
    sink_tokens: int, before: int, n: int
) -> None:
    cache = mixed(hot=16, cold=64, group=8, sink_tokens=sink_tokens)
    add(cache, range(before))
    slot = add(cache, range(before, before + n))
    total, level = before + n, 12
    assert slot.num_tokens == n
    assert slot.num_hot + slot.num_cold == n
    assert slot.num_moved == max(before - sink_tokens, 0)
    want = [*range(sink_tokens), *range(total - level + sink_tokens, total)]
    assert hot_positions(cache) == want
    stats = cache.stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (level, total - level)
    assert stats.moved == total - level
    moves = max(before - sink_tokens, 0)
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


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_cache_long_ubatch_is_attended_in_the_hot_type(
    isa: str, rng: np.random.Generator, sink_tokens: int
) -> None:
    """f32 hot: nothing of its own ubatch is rounded when attended, all of cold's is after."""
    n = 50
    cache = mixed(hot=16, cold=64, hot_k_type="f32", hot_v_type="f32", sink_tokens=sink_tokens)
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
