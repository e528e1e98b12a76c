"""hot_keep: the newest positions of every sequence stay hot, whatever wants their cells."""

from __future__ import annotations

import dataclasses
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from caches import HQ, LAYERS, D, add, cold_positions, hot_positions, mixed, rows_for, snapshot
from conftest import Q4_0_REL, assert_close, normal

# (hot, cold, group)
GRID = [(8, 32, 4), (16, 64, 8), (32, 128, 16), (64, 256, 32)]


def newest_are_hot(cache: Any, keep: int, sinks: int = 0) -> None:
    for seq in range(cache.config.n_seq_max):
        tiers, positions = cache.tiers(seq), cache.positions(seq)
        assert not tiers[max(len(tiers) - keep, 0) :].any(), f"newest of {seq}"
        assert not tiers[positions < sinks].any(), f"first of {seq}"


@pytest.mark.parametrize(("hot", "cold", "group"), GRID)
@pytest.mark.parametrize("sinks", [0, 2])
def test_hot_keep_holds_at_every_step(hot: int, cold: int, group: int, sinks: int) -> None:
    keep = int(0.8 * hot) - 1 - sinks
    cache = mixed(hot, cold, group, hot_keep=keep, sink_tokens=sinks)
    for pos in range(hot + cold // 2):
        slot = cache.find_slot(pos=[pos], seq_id=[0])
        assert slot is not None
        newest_are_hot(cache, keep, sinks)
        for layer in range(LAYERS):
            cache.store(layer, *rows_for([pos], layer))
        cache.commit()
        newest_are_hot(cache, keep, sinks)
    assert len(cold_positions(cache)) > 0
    assert cache.stats().hot_tokens <= int(0.8 * hot)


def test_hot_keep_of_every_sequence_of_a_batch(rng: np.random.Generator) -> None:
    """Sequences of very different lengths and ages: the short one is not moved for the long one."""
    cache = mixed(64, 512, 16, n_seq_max=4, hot_keep=10, sink_tokens=2)
    for seq, n in enumerate((5, 150, 40, 11)):
        assert add(cache, range(n), seq) is not None
        newest_are_hot(cache, 10, 2)
    for _ in range(60):
        seqs = sorted(rng.choice(4, rng.integers(1, 4), replace=False).tolist())
        pos = [cache.seq_pos_max(s) + 1 for s in seqs]
        assert cache.find_slot(pos=pos, seq_id=seqs)
        cache.commit()
        newest_are_hot(cache, 10, 2)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 100])
def test_hot_keep_holds_in_long_prompts(chunk: int) -> None:
    cache = mixed(32, 512, 8, hot_keep=20, sink_tokens=3)
    for first in range(0, 200, chunk):
        add(cache, range(first, first + chunk))
        newest_are_hot(cache, 20, 3)
    assert cache.stats().hot_tokens <= int(0.8 * 32)


def test_hot_keep_first_queries_of_a_chunk_find_the_newest_in_hot() -> None:
    """Where hot has room for both, what a chunk's first query sees newest is not moved for it."""
    cache = mixed(64, 512, 8, hot_keep=20)
    add(cache, range(60))
    slot = cache.find_slot(pos=range(60, 160), seq_id=[0] * 100)
    assert slot is not None
    assert slot.num_cold > 0
    assert hot_positions(cache)[-20:] == list(range(40, 60))
    cache.commit()
    assert hot_positions(cache)[-20:] == list(range(140, 160))


def test_hot_keep_gives_up_the_newest_for_the_next_only() -> None:
    """Pins of before and of now don't both fit: those of now do."""
    cache = mixed(16, 64, 8, hot_keep=11)
    add(cache, range(30))
    slot = cache.find_slot(pos=range(30, 60), seq_id=[0] * 30)
    assert slot is not None
    cache.commit()
    assert hot_positions(cache)[-11:] == list(range(49, 60))
    # A decode step of as many sequences as there are cells, all hot.
    cache = mixed(8, 64, 4, n_seq_max=7, hot_keep=1, threshold=1.0)
    for pos in range(6):
        slot = cache.find_slot(pos=[pos] * 7, seq_id=range(7))
        assert slot is not None
        assert slot.num_cold == 0
        cache.commit()
        newest_are_hot(cache, 1)


def test_hot_keep_is_first_in_first_out_among_the_others() -> None:
    cache = mixed(16, 64, 4, hot_keep=4, n_seq_max=2)
    add(cache, range(4), 0)
    add(cache, range(12), 1)
    # Sequence 0 is older and is all newest: sequence 1's oldest went.
    assert hot_positions(cache, 0) == [0, 1, 2, 3]
    cold = cold_positions(cache, 1)
    assert cold == list(range(len(cold)))
    assert len(cold) > 0


def test_hot_keep_after_sequence_operations() -> None:
    cache = mixed(32, 128, 8, n_seq_max=3, hot_keep=7)
    add(cache, range(60))
    # Taken back, as a draft is: what is newest now and still in hot stays there.
    hot = hot_positions(cache)
    cache.seq_rm(0, 58, -1)
    cache.seq_cp(0, 1)
    for pos in range(58, 80):
        add(cache, [pos], 1)
        # Sequence 0 does not grow: its newest stay though others own them, and are older.
        assert not cache.tiers(0)[-7:].any()
        assert not cache.tiers(1)[-7:].any()
    assert hot_positions(cache, 0)[-7:] == [p for p in hot if p < 58][-7:]
    cache.seq_keep(1)
    add(cache, range(80, 100), 1)
    assert hot_positions(cache, 1)[-7:] == list(range(93, 100))
    assert set(range(51, 58)) <= set(cold_positions(cache, 1))


def test_hot_keep_of_everything_leaves_no_room_and_changes_nothing() -> None:
    """Tokens of one position are all among the newest: more of them than the pins that are counted
    for, and hot is full of what may not move."""
    cache = mixed(16, 64, 8, hot_keep=1)
    for _ in range(16):
        assert add(cache, [5]) is not None
    before = snapshot(cache)
    assert cache.find_slot(pos=[5], seq_id=[0]) is None
    k, v = rows_for([5])
    with pytest.raises(mkv.CacheFull, match="hot has 0 of 16 cells free"):
        cache.append([5], [0], [k] * LAYERS, [v] * LAYERS)
    assert snapshot(cache) == before
    # A newer one takes its place among the newest.
    assert add(cache, [6]) is not None
    assert hot_positions(cache)[-1] == 6
    assert cold_positions(cache)


def test_hot_keep_restores(rng: np.random.Generator) -> None:
    cache = mixed(32, 128, 8, hot_keep=12)
    add(cache, range(50))
    before = snapshot(cache)
    for n in (1, 10, 30, 60):
        slot = cache.find_slot(pos=range(50, 50 + n), seq_id=[0] * n)
        assert slot is not None
        cache.store(1, *rows_for(range(50, 50 + n), 1))
        cache.attend(1, normal(rng, HQ, n, D))
        cache.restore()
        assert snapshot(cache) == before


def test_hot_keep_attends_the_newest_exactly(rng: np.random.Generator) -> None:
    """Within a window of hot_keep nothing was quantised."""
    cache = mixed(32, 128, 8, hot_keep=12, hot_k_type="f32", hot_v_type="f32")
    for pos in range(90):
        add(cache, [pos])
    assert cache.find_slot(pos=[90], seq_id=[0])
    k, v = rows_for(range(91))
    cache.store(0, k[:, 90:], v[:, 90:])
    q = normal(rng, HQ, 1, D)
    out = cache.attend(0, q, window_left=11)
    want = mkv.attention(q, k[:, -12:], v[:, -12:])
    assert_close(out, want)
    assert_close(cache.attend(0, q), mkv.attention(q, k, v), 200 * Q4_0_REL)


def test_hot_keep_pins_must_stay_below_the_level() -> None:
    for options, message in (
        ({"hot_keep": 12}, r"hot_keep must stay, times n_seq_max \(1\), below .* = 12, got 12"),
        ({"hot_keep": 3, "n_seq_max": 4}, r"hot_keep must stay, times n_seq_max \(4\).*got 3"),
        ({"hot_keep": 10, "sink_tokens": 2}, r"hot_keep.*beside sink_tokens \(2\) and.*got 10"),
        ({"hot_keep": -1}, "hot_keep must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed(16, **options)
    mixed(16, hot_keep=11)
    mixed(16, hot_keep=100, quantize=False)
    with pytest.raises(TypeError, match="hot_keep"):
        mixed(hot_keep=1.5)


def test_hot_keep_is_off_by_default() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(mkv.CacheConfig)}
    assert fields["hot_keep"] == 0
