"""Cold keys stored less a vector that neighbours share: exact arithmetic, smaller errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import DV, HKV, HQ, LAYERS, Cache, cold_positions
from conftest import assert_close, normal, relative_error, tolerance

PAGE = 128
QUANTISED = [name for name in mkv.formats.packed() if name != "bf16"]


def make(hot: int = 64, cold: int = 512, group: int = 32, **options: Any) -> Cache:
    sizes = {"hot_size": hot, "cold_size": cold, "group_size": group, "n_pad": 1}
    shape = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": 64, "head_dim_v": DV}
    return mkv.MixedKVCache(**{**shape, **sizes, "center_keys": True, **options})


def keys_for(pos: Sequence[int], layer: int, width: int = 64) -> np.ndarray:
    """Keys [HKV, n, width] around a vector that a head's keys share, which turns slowly."""
    shared = 6 * normal(np.random.default_rng(layer), HKV, 1, width)
    own = [normal(np.random.default_rng([p, layer]), HKV, 1, width) for p in pos]
    turns = [np.float32(np.cos(p / 500)) for p in pos]
    return np.concatenate([turn * shared + x for turn, x in zip(turns, own, strict=True)], 1)


def values_for(pos: Sequence[int], layer: int) -> np.ndarray:
    return np.stack([normal(np.random.default_rng([p, layer, 1]), HKV, DV) for p in pos], 1)


def add(cache: Cache, pos: Sequence[int], seq: int | Sequence[int] = 0) -> None:
    pos = list(pos)
    owners = [seq] * len(pos) if isinstance(seq, int) else list(seq)
    assert cache.find_slot(pos=pos, seq_id=owners) is not None
    width = cache.config.head_dim
    for layer in range(LAYERS):
        cache.store(layer, keys_for(pos, layer, width), values_for(pos, layer))
    cache.commit()


def ask(cache: Cache, rng: np.random.Generator, seq: int = 0, layer: int = 0,
        rel: float | None = None, n: int = 1, **options: Any) -> np.ndarray:  # fmt: skip
    """Attends with n new tokens and restores; the result is that over what keys() says."""
    width = cache.config.head_dim
    pos = cache.seq_pos_max(seq) + 1 + np.arange(n)
    q = normal(rng, HQ, n, width) / 4
    k, v = keys_for(pos, layer, width), values_for(pos, layer)
    held = cache.positions(seq).tolist(), cache.keys(layer, seq), cache.values(layer, seq)
    slot = cache.find_slot(pos=pos, seq_id=[seq] * n)
    assert slot is not None
    cache.store(layer, k, v)
    out = cache.attend(layer, q, **options)
    if slot.num_moved == 0 and slot.num_cold == 0:
        all_pos = np.array(held[0] + pos.tolist())
        all_k = np.concatenate([held[1], ref.stored_as(k, "f16")], 1)
        all_v = np.concatenate([held[2], ref.stored_as(v, "f16")], 1)
        seen = all_pos[None, :] <= pos[:, None]
        if "window_left" in options:
            seen &= all_pos[None, :] >= pos[:, None] - options.pop("window_left")
        want, _ = ref.attention(q, all_k, all_v, mask=seen, **options)
        assert_close(out, want[0], rel or tolerance("q4_0"))
    cache.restore()
    return out


@pytest.mark.parametrize("k_type", QUANTISED)
def test_decode_is_attention_over_what_keys_says(
    isa: str, rng: np.random.Generator, k_type: str
) -> None:
    cache = make(cold_k_type=k_type)
    add(cache, range(70))
    for p in range(70, 300, 5):
        add(cache, range(p, p + 5))
        if p % 50 == 0:
            for layer in range(LAYERS):
                ask(cache, rng, layer=layer)
    assert len(cold_positions(cache)) > PAGE + 16


@pytest.mark.parametrize("option", [
    {"logits_soft_cap": 3.0}, {"window_left": 100}, {"compute_type": "bf16"}, {"sm_scale": 0.01},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("n", [1, 3, 40])
def test_options_and_query_counts(
    isa: str, rng: np.random.Generator, n: int, option: dict[str, Any]
) -> None:
    cache = make(hot=96)
    add(cache, range(60))
    for p in range(60, 330, 30):
        add(cache, range(p, p + 30))
    cache.seq_rm(0, 100, 131)  # holes, and an index with gaps
    if "compute_type" in option:
        # One query of three heads keeps to f32; of more, keys and queries are rounded to 8 bits.
        assert ask_bf16(cache, rng, n) < (tolerance("q4_0") if n == 1 else 1e-2)
    else:
        ask(cache, rng, n=n, **option)


def ask_bf16(cache: Cache, rng: np.random.Generator, n: int) -> float:
    """How far bf16 products are from f32 ones."""
    pos = cache.seq_pos_max(0) + 1 + np.arange(n)
    q = normal(rng, HQ, n, 64) / 4
    assert cache.find_slot(pos=pos, seq_id=[0] * n) is not None
    cache.store(0, keys_for(pos, 0), values_for(pos, 0))
    outs = [cache.attend(0, q, compute_type=t) for t in ("bf16", "f32")]
    cache.restore()
    return relative_error(*outs)


@pytest.mark.parametrize("k_type", QUANTISED)
def test_keys_that_share_a_direction_are_kept_more_closely(k_type: str) -> None:
    errors = []
    for center_keys in (False, True):
        cache = make(cold_k_type=k_type, center_keys=center_keys)
        add(cache, range(60))
        for p in range(60, 420, 30):
            add(cache, range(p, p + 30))
        cold = cold_positions(cache)
        got = cache.keys(0, 0)[:, np.isin(cache.positions(0), cold)]
        errors.append(relative_error(got, ref.stored_as(keys_for(cold, 0), "f16")))
    assert errors[1] < 0.5 * errors[0]


def test_a_center_is_the_mean_of_those_that_came_first(rng: np.random.Generator) -> None:
    """All equal, and so their own mean: nothing is left to quantise, but f16's rounding of it."""
    cache = make(hot=64, group=64)
    row = (6 * normal(rng, HKV, 1, 64)).astype(np.float16).astype(np.float32)
    for p in range(0, 300, 30):
        cache.find_slot(pos=range(p, p + 30), seq_id=[0] * 30)
        for layer in range(LAYERS):
            cache.store(layer, np.repeat(row, 30, 1), values_for(range(p, p + 30), layer))
        cache.commit()
    np.testing.assert_allclose(cache.keys(1, 0), np.repeat(row, 300, 1), rtol=2**-9)


def test_sequences_side_by_side_and_refilled_pages(isa: str, rng: np.random.Generator) -> None:
    cache = make(hot=64, cold=320, n_seq_max=3)
    for p in range(0, 90, 3):
        add(cache, [p, p, p, p + 1, p + 1, p + 1, p + 2, p + 2, p + 2], [0, 1, 2] * 3)
    for seq in range(3):
        ask(cache, rng, seq)
    cache.seq_rm(1, -1, -1)
    cache.seq_rm(0, 10, 60)
    for p in range(90, 150, 3):
        add(cache, [p, p - 90, p + 1, p - 89, p + 2, p - 88], [0, 1] * 3)
    for seq in range(3):
        ask(cache, rng, seq, layer=1)


def test_pages_are_centered_anew_once_they_are_empty() -> None:
    """What lies there after a clear is as near as in a new cache, though keys are elsewhere."""

    def far(p: Sequence[int]) -> np.ndarray:
        return 50 + keys_for(p, 0)

    def fill(cache: Cache, keys: Any) -> None:
        for p in range(0, 240, 30):
            cache.find_slot(pos=range(p, p + 30), seq_id=[0] * 30)
            for layer in range(LAYERS):
                cache.store(layer, keys(range(p, p + 30)), values_for(range(p, p + 30), layer))
            cache.commit()

    old, new = make(), make()
    fill(old, lambda p: keys_for(p, 0))
    old.clear()
    for cache in (old, new):
        fill(cache, far)
    np.testing.assert_array_equal(old.keys(0, 0), new.keys(0, 0))
    old.seq_rm(0, -1, -1)
    fill(old, far)
    np.testing.assert_array_equal(old.keys(1, 0), new.keys(1, 0))


def test_restore_gives_the_same_bits(isa: str, rng: np.random.Generator) -> None:
    cache = make(hot=64, cold=640)
    add(cache, range(60))
    for p in range(60, 200, 20):
        add(cache, range(p, p + 20))
    before = [cache.keys(layer, 0).tobytes() for layer in range(LAYERS)]
    for n in (1, 20, 50, 100, 300):  # with moves, and longer than hot
        first, second = (ask(cache, np.random.default_rng(n), n=n) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert [cache.keys(layer, 0).tobytes() for layer in range(LAYERS)] == before


def test_long_prompts(isa: str, rng: np.random.Generator) -> None:
    cache = make(hot=32, cold=512, group=16)
    add(cache, range(20))
    add(cache, range(20, 330))
    ask(cache, rng, layer=1)
    got = cache.keys(1, 0)
    want = ref.stored_as(keys_for(range(330), 1), "f16")
    assert relative_error(got, want) < 0.02


def test_layers_that_were_not_stored_are_zeros(rng: np.random.Generator) -> None:
    cache = make(hot=32, cold=256, group=16)
    add(cache, range(30))
    for n in (4, 100):
        start = cache.seq_pos_max(0) + 1
        pos = range(start, start + n)
        cache.find_slot(pos=pos, seq_id=[0] * n)
        cache.store(0, keys_for(pos, 0), values_for(pos, 0))
        cache.commit()
        new = np.isin(cache.positions(0), list(pos))
        assert np.abs(cache.keys(1, 0)[:, new]).max() <= 2.0  # a step of what its page holds
    cache.clear()
    cache.find_slot(pos=range(200), seq_id=[0] * 200)
    cache.commit()
    assert not cache.keys(0, 0).any()


def test_keys_that_are_not_finite_stay_among_themselves(isa: str, rng: np.random.Generator) -> None:
    """They neither make a mean nor reach a neighbour's logits."""
    cache = make(hot=32, cold=256, group=16, n_seq_max=2)
    for p in range(0, 120, 2):
        k = keys_for([p, p + 1, p], 0)
        k[:, 2] = (np.nan, np.inf, -np.inf)[p // 2 % 3]
        cache.find_slot(pos=[p, p + 1, p], seq_id=[0, 0, 1])
        for layer in range(LAYERS):
            cache.store(layer, k, values_for([p, p + 1, p], 0))
        cache.commit()
    assert np.isfinite(cache.keys(0, 0)).all()
    cold = cache.tiers(1)
    assert cold.any()
    assert not np.isfinite(cache.keys(0, 1)).any()
    ask(cache, rng)


def test_threads_do_not_change_bits(rng: np.random.Generator) -> None:
    seen, before = [], mkv.get_num_threads()
    for threads in (1, 2, 3):
        mkv.set_num_threads(threads)
        try:
            cache = make(hot=64, cold=640)
            for p in range(0, 500, 25):
                add(cache, range(p, p + 25))
            seen.append((cache.keys(1, 0).tobytes(),
                         ask(cache, np.random.default_rng(1)).tobytes()))  # fmt: skip
        finally:
            mkv.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("k_type", ["f32", "f16", "bf16"])
def test_plain_types_are_kept_as_they_are(k_type: str) -> None:
    caches = [make(cold_k_type=k_type, center_keys=c) for c in (False, True)]
    for cache in caches:
        for p in range(0, 200, 25):
            add(cache, range(p, p + 25))
    assert caches[0].keys(0, 0).tobytes() == caches[1].keys(0, 0).tobytes()
    assert caches[0].stats().cold_bytes == caches[1].stats().cold_bytes


def test_bytes_count_the_centers() -> None:
    without, with_centers = (make(cold=512, center_keys=c).stats() for c in (False, True))
    centers = LAYERS * HKV * (512 // PAGE) * 64 * 2
    flags = LAYERS * HKV * (512 // PAGE)
    assert with_centers.cold_bytes - without.cold_bytes == centers + flags
    assert centers * 8 / (512 * LAYERS * HKV * 64) == 0.125  # bits a key value


def test_magnitudes_leave_room_for_a_center() -> None:
    cache = make(hot_k_type="f32", cold_k_type="q4_0")
    cache.find_slot(pos=[0], seq_id=[0])
    k = np.zeros((HKV, 1, 64), np.float32)
    k[0, 0, 0] = 7 * 65520.0 - 1
    cache.store(0, k, values_for([0], 0))
    k[0, 0, 0] = 7 * 65520.0
    with pytest.raises(
        ValueError, match=r"k of layer 0 holds 458640.*magnitudes must be below 4586"
    ):
        cache.store(0, k, values_for([0], 0))
    cache.restore()
    # Of both signs, so that what is left of them is largest; a center stays within f16.
    for p in range(0, 100, 20):
        cache.find_slot(pos=range(p, p + 20), seq_id=[0] * 20)
        k = np.full((HKV, 20, 64), 400e3, np.float32)
        k[:, 19] *= -1
        for layer in range(LAYERS):
            cache.store(layer, k, values_for(range(20), layer))
        cache.commit()
    assert np.isfinite(cache.keys(0, 0)).all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be at most 1024 where center_keys is on"):
        make(head_dim=1056)
    make(head_dim=1056, quantize=False)
    with pytest.raises(TypeError, match="center_keys"):
        make(center_keys=1)
    cache = make()
    add(cache, range(60))
    with pytest.raises(ValueError, match=r"center_keys is on, .* dequantised rows have it added"):
        cache.export_rows(0, 0)


@pytest.mark.parametrize("width", [32, 96, 128, 256, 576, 1024])
def test_widths(isa: str, rng: np.random.Generator, width: int) -> None:
    cache = make(hot=32, cold=256, group=16, head_dim=width)
    for p in range(0, 150, 15):
        add(cache, range(p, p + 15))
    ask(cache, rng)
