"""Operations on sequences, in each kind of cache."""

from __future__ import annotations

from collections.abc import Callable

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import Cache, add, cold_positions, mixed, rows_for, snapshot, step, twins, unified
from conftest import Q4_0_REL


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
