"""A ubatch of the caches: found, stored, committed or restored, sentence by sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import DV, HKV, HQ, LAYERS, Cache, D, add, mixed, one_tier, rows_for, snapshot, unified
from conftest import F32_REL, normal, relative_error

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
    cache = mixed(hot=16, threshold=1.0, sink_tokens=1)
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
    a, b = (
        mixed(hot=8, cold=32, group=4, sink_tokens=1),
        mixed(hot=8, cold=32, group=4, sink_tokens=1),
    )
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
