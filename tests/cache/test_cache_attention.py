"""Attention over the caches against the model, and the rows that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import (
    DV,
    HKV,
    HQ,
    LAYERS,
    Cache,
    D,
    add,
    mixed,
    one_tier,
    rows_for,
    snapshot,
    step,
    twins,
    unified,
)
from conftest import Q4_0_REL, assert_close, normal, relative_error, tolerance

# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_cache_prefill_and_decode_equal_model(
    isa: str, rng: np.random.Generator, sink_tokens: int
) -> None:
    cache, model = twins(sink_tokens=sink_tokens)
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
    cache, model = twins(sink_tokens=4, window_left=5)
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


def test_cache_attend_one_long_sequence_among_short_ones(
    isa: str, rng: np.random.Generator
) -> None:
    """Its keys are cut among threads, those of the others are not; each sees its own alone."""
    lengths = [1700, 3, 40, 1]
    cache = unified(size=2048, n_seq_max=len(lengths))
    stored = []
    for seq, n in enumerate(lengths):
        cache.find_slot(pos=range(n), seq_id=[seq] * n)
        stored.append((normal(rng, HKV, n + 1, D), normal(rng, HKV, n + 1, DV)))
        for layer in range(LAYERS):
            cache.store(layer, stored[seq][0][:, :n], stored[seq][1][:, :n])
        cache.commit()
    cache.find_slot(pos=lengths, seq_id=range(len(lengths)))
    cache.store(0, *(np.stack([s[part][:, -1] for s in stored], 1) for part in (0, 1)))
    q = normal(rng, HQ, len(lengths), D)
    out = cache.attend(0, q, threads=1)
    for threads in (2, 5):
        np.testing.assert_array_equal(cache.attend(0, q, threads=threads), out)
    for seq, (k, v) in enumerate(stored):
        want, _ = ref.attention(q[:, [seq]], ref.stored_as(k, "f16"), ref.stored_as(v, "f16"))
        assert_close(out[:, [seq]], want[0])


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
