"""Counters, memory, log lines and configurations of the caches."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from caches import DV, HKV, HQ, LAYERS, Cache, D, add, mixed, one_tier, rows_for
from conftest import normal

# --- counters and memory --------------------------------------------------------------------------


def test_cache_bytes_are_those_of_the_configuration() -> None:
    cache = mixed(hot=64, cold=256, num_layers=3)
    hot, cold = 2 * (D + DV), (D + DV) // 32 * 18
    stats = cache.stats()
    assert stats.hot_bytes == 3 * HKV * 64 * hot
    assert stats.cold_bytes == 3 * HKV * 256 * cold
    # A quarter of hot is the largest batch here.
    journal = 3 * HKV * min(16, cache.config.group_size) * hot
    assert journal <= stats.journal_bytes <= 1.2 * journal + 4096
    assert stats.books_bytes > 0
    assert stats.scratch_bytes == 0
    assert stats.total_bytes == (
        stats.hot_bytes + stats.cold_bytes + stats.journal_bytes + stats.books_bytes
    )


def test_cache_journal_grows_for_the_slot_that_needs_it() -> None:
    """And gives it back, however that slot ends."""
    cache = mixed(hot=64, cold=256, group_size=8, n_pad=8)
    add(cache, range(40))
    least = cache.stats().journal_bytes
    row = LAYERS * HKV * 2 * (D + DV)
    for end in ("restore", "commit", "clear"):
        first = cache.seq_pos_max(0) + 1
        before = cache.keys(0, 0)
        slot = cache.find_slot(pos=range(first, first + 60), seq_id=[0] * 60)
        assert slot is not None
        assert slot.num_moved > 30
        grown = cache.stats().journal_bytes - least
        assert grown == (slot.num_moved - 8) * row
        getattr(cache, end)()
        assert cache.stats().journal_bytes == least
        if end == "restore":
            np.testing.assert_array_equal(cache.keys(0, 0), before)


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
        "move_seconds", "hot_bytes", "cold_bytes", "journal_bytes", "books_bytes", "scratch_bytes",
        "bytes_saved",
    }  # fmt: skip
    stats = mixed().stats()
    assert isinstance(stats, mkv.CacheStats)
    assert isinstance(stats.move_seconds, float)


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
    assert cache.stats().move_seconds > 0


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
    "hot_k_type": {"hot_k_type": "q5_0"},
    "hot_v_type": {"hot_v_type": "F16"},
    "cold_k_type": {"cold_k_type": ""},
    "cold_v_type": {"cold_v_type": "int4"},
    "sink_tokens": {"sink_tokens": -1},
    "sink_tokens_at_level": {"sink_tokens": 12},
    "sink_tokens_of_all": {"sink_tokens": 4, "n_seq_max": 3},
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
        ("sink_tokens", 0.5),
    ],
)
def test_cache_refuses_config_of_other_types(name: str, value: Any) -> None:
    public = {"hot": "hot_size"}.get(name, name)
    with pytest.raises((TypeError, ValueError), match=public):
        mixed(**{name: value})


def test_cache_sink_tokens_below_the_level_are_fine() -> None:
    mixed(sink_tokens=11)
    mixed(sink_tokens=3, n_seq_max=3)
    one_tier(sink_tokens=16)


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
