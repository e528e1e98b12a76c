"""rotate: rows go in rotated, queries with them, and nobody notices but the quantiser."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import F32_REL, Q4_0_REL, assert_close, normal, relative_error

LAYERS, HQ, HKV = 2, 6, 2


def hadamard(x: np.ndarray) -> np.ndarray:
    """Rotate rows in float64: the normalised matrix of the largest power of two that divides."""
    n = x.shape[-1]
    block = n & -n
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    h /= np.sqrt(block)
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], n // block, block)
    rotated: np.ndarray = (blocks @ h).reshape(x.shape)
    return rotated


def make(d: int, dv: int, **options: Any) -> mkv.MixedKVCache:
    sizes: dict[str, Any] = {"hot_size": 16, "cold_size": 64, "group_size": 4, "n_pad": 8}
    shape: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": HKV}
    return mkv.MixedKVCache(**{**sizes, **shape, "head_dim": d, "head_dim_v": dv, **options})


def outliers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows like those of a model's keys: a few dims are many times as large as the rest."""
    x = normal(rng, *shape)
    x[..., :: max(shape[-1] // 4, 1)] *= 12
    return x


def drive(cache: Any, rng: np.random.Generator, d: int, dv: int) -> dict[str, Any]:
    """A prompt longer than hot, then decode steps; all rows, and all that attention gave."""
    k_rows, v_rows, outs, queries = [], [], [], []
    pos = 0
    for n in [min(20, cache.stats().hot_size + cache.stats().cold_size), *[1] * 12]:
        assert cache.find_slot(pos=range(pos, pos + n), seq_id=[0] * n)
        for layer in range(LAYERS):
            k, v = outliers(rng, HKV, n, d), normal(rng, HKV, n, dv)
            q = normal(rng, HQ, n, d)
            cache.store(layer, k, v)
            out, lse = cache.attend(layer, q, return_lse=True)
            if layer == 1:
                k_rows.append(k)
                v_rows.append(v)
                outs.append((out, lse))
                queries.append(q)
        cache.commit()
        pos += n
    return {
        "k": np.concatenate(k_rows, 1),
        "v": np.concatenate(v_rows, 1),
        "out": np.concatenate([o for o, _ in outs], 1),
        "lse": np.concatenate([s for _, s in outs], 1),
        "q": np.concatenate(queries, 1),
    }


SHAPES = [(64, 64), (128, 128), (80, 96), (192, 128), (576, 512), (45, 33), (256, 48), (1, 2)]


@pytest.mark.parametrize(("d", "dv"), SHAPES, ids=str)
def test_rotate_changes_nothing_but_rounding(d: int, dv: int, isa: str) -> None:
    plain_types = {f"{tier}_{kv}_type": "f32" for tier in ("hot", "cold") for kv in "kv"}
    caches = [make(d, dv, rotate=rotate, **plain_types) for rotate in (False, True)]
    plain, rotated = (drive(c, np.random.default_rng(1), d, dv) for c in caches)
    assert_close(rotated["out"], plain["out"], 2 * F32_REL)
    np.testing.assert_allclose(rotated["lse"], plain["lse"], rtol=3e-6, atol=3e-5)
    assert_close(caches[1].keys(1, 0), rotated["k"], F32_REL)
    assert_close(caches[1].values(1, 0), rotated["v"], F32_REL)
    want, _ = ref.attention(rotated["q"], rotated["k"], rotated["v"], causal=True)
    assert_close(rotated["out"], want[0], 2 * F32_REL)


def test_rotate_stores_and_exports_rotated_rows(isa: str) -> None:
    cache = make(64, 96, rotate=True)
    seen = drive(cache, np.random.default_rng(2), 64, 96)
    hot, cold = cache.export_rows(1, 0)
    assert len(hot.positions) > 0 < len(cold.positions)
    for rows, kept, given in ((hot.k, cold.k, seen["k"]), (hot.v, cold.v, seen["v"])):
        want = hadamard(given)
        in_hot = np.asarray(rows, np.float64)
        assert relative_error(in_hot, want[:, hot.positions]) < 4e-4  # of f16
        assert isinstance(kept, mkv.QuantizedArray)
        once = want.astype(np.float32).astype(np.float16)[:, cold.positions]
        # A value that the transform's own rounding puts on the other side of a half may differ.
        assert np.mean(kept.data != ref.quantize_q4_0(once)) < 1e-2
    # keys() and values() are the same rows, turned back.
    tiers = cache.tiers(0)
    np.testing.assert_allclose(cache.keys(1, 0)[:, ~tiers], hadamard(hot.k), rtol=0, atol=3e-5)
    assert isinstance(cold.v, mkv.QuantizedArray)
    back = hadamard(cold.v.dequantize())
    np.testing.assert_allclose(cache.values(1, 0)[:, tiers], back, rtol=0, atol=1e-5)


def test_rotate_attends_what_is_stored(isa: str) -> None:
    """In float64, on the rotated rows as they are stored."""
    cache = make(128, 64, rotate=True)
    seen = drive(cache, np.random.default_rng(3), 128, 64)
    pos = len(seen["k"][0])
    assert cache.find_slot(pos=[pos], seq_id=[0])
    rng = np.random.default_rng(4)
    k, v, q = normal(rng, HKV, 1, 128), normal(rng, HKV, 1, 64), normal(rng, HQ, 1, 128)
    cache.store(1, k, v)
    out = cache.attend(1, q)
    keys, values = [], []
    for rows in cache.export_rows(1, 0):
        plain = (
            x.dequantize() if isinstance(x, mkv.QuantizedArray) else x for x in (rows.k, rows.v)
        )
        for target, x in zip((keys, values), plain, strict=True):
            target.append(np.asarray(x, np.float32))
    want, _ = ref.attention(hadamard(q), np.concatenate(keys, 1), np.concatenate(values, 1))
    assert_close(out, hadamard(want[0]), Q4_0_REL)
    cache.restore()


def test_rotate_loses_less_to_quantisation() -> None:
    """What it is for: rows with outliers, as models' keys are."""
    errors = []
    for rotate in (False, True):
        cache = make(128, 128, rotate=rotate)
        seen = drive(cache, np.random.default_rng(5), 128, 128)
        tiers = cache.tiers(0)
        errors.append(relative_error(cache.keys(1, 0)[:, tiers], seen["k"][:, tiers]))
    assert errors[1] < 0.9 * errors[0]


def test_rotate_off_is_the_default_and_keeps_raw_bytes() -> None:
    assert mkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=32).rotate is False
    cache = make(64, 64)
    seen = drive(cache, np.random.default_rng(6), 64, 64)
    hot, cold = cache.export_rows(1, 0)
    np.testing.assert_array_equal(hot.k, seen["k"][:, hot.positions].astype(np.float16))
    assert isinstance(cold.k, mkv.QuantizedArray)
    once = seen["k"][:, cold.positions].astype(np.float16)
    np.testing.assert_array_equal(cold.k.data, ref.quantize_q4_0(once))


@pytest.mark.parametrize("cold", ["q4_0", "q8_0", "iq4_nl", "bf16"])
def test_rotate_gives_the_same_bits_for_any_number_of_threads(cold: str) -> None:
    got = []
    before = mkv.get_num_threads()
    try:
        for threads in (1, 2, 5):
            mkv.set_num_threads(threads)
            cache = make(128, 128, rotate=True, cold_k_type=cold, cold_v_type=cold)
            got.append(drive(cache, np.random.default_rng(7), 128, 128)["out"])
    finally:
        mkv.set_num_threads(before)
    for other in got[1:]:
        np.testing.assert_array_equal(got[0], other)


def test_rotate_of_a_unified_cache(rng: np.random.Generator) -> None:
    sizes: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": 96}
    caches = [
        mkv.UnifiedKVCache(**sizes, size=64, k_type="f32", v_type="f32", rotate=rotate)
        for rotate in (False, True)
    ]
    assert caches[1].config.rotate
    plain, rotated = (drive(c, np.random.default_rng(8), 96, 96) for c in caches)
    assert_close(rotated["out"], plain["out"], 2 * F32_REL)
    assert_close(caches[1].keys(0, 0), caches[0].keys(0, 0), F32_REL)


def everything(cache: Any) -> list[Any]:
    hot, cold = cache.export_rows(1, 0)
    rows = [hot.positions, hot.k, hot.v, cold.positions, cold.k.data, cold.v.data]
    return [cache.keys(1, 0), cache.values(1, 0), *rows]


def test_rotate_restores_bit_for_bit() -> None:
    cache = make(64, 64, rotate=True)
    rng = np.random.default_rng(9)
    seen = drive(cache, rng, 64, 64)
    before = everything(cache)
    first = len(seen["k"][0])
    slot = cache.find_slot(pos=range(first, first + 14), seq_id=[0] * 14)
    assert slot is not None
    assert slot.num_moved > 0
    cache.store(1, normal(rng, HKV, 14, 64), normal(rng, HKV, 14, 64))
    cache.restore()
    for a, b in zip(before, everything(cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rotate_refuses_what_it_makes_too_large() -> None:
    """All of a row's weight may end in one value: sqrt(head_dim) times the largest."""
    cache = make(64, 64, rotate=True)
    assert cache.find_slot(pos=[0], seq_id=[0])
    v = np.ones((HKV, 1, 64), np.float32)
    k = np.full((HKV, 1, 64), 9000, np.float32)
    with pytest.raises(ValueError, match=r"k of layer 1, rotated, holds 72000 \(head 0, token 0\)"):
        cache.store(1, k, v)
    with pytest.raises(ValueError, match="v of layer 1, rotated, holds"):
        cache.store(1, v, k)
    cache.store(1, k / 2, v)
    # The largest magnitude may shrink as well.
    alone = np.zeros((HKV, 1, 64), np.float32)
    alone[0, 0, 5] = 300_000
    cache.store(1, alone, v)
    np.testing.assert_allclose(cache.attend(1, np.zeros((HQ, 1, 64), np.float32)), 1, rtol=1e-6)
    f32 = make(64, 64, rotate=True, **{f"{t}_k_type": "f32" for t in ("hot", "cold")})
    assert f32.find_slot(pos=[0], seq_id=[0])
    with pytest.raises(ValueError, match="rotated, holds inf"):
        f32.store(0, np.full((HKV, 1, 64), 3e38, np.float32), v)


def test_rotate_spreads_what_is_not_finite_over_its_block() -> None:
    cache = make(96, 96, rotate=True)
    assert cache.find_slot(pos=[0, 1], seq_id=[0, 0])
    rows = np.ones((HKV, 2, 96), np.float32)
    odd = rows.copy()
    odd[0, 1, 40] = np.nan  # in the second of three blocks of 32
    cache.store(0, rows, odd)
    out = cache.attend(0, np.ones((HQ, 2, 96), np.float32))
    assert np.isfinite(out[:, 0]).all()
    assert np.isnan(out[0, 1, 32:64]).all()
    assert np.isfinite(out[0, 1, :32]).all()
    assert np.isfinite(out[HQ - 1]).all()


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "iq4_nl", "bf16"])
def test_rotate_takes_quantised_rows(name: str, rng: np.random.Generator) -> None:
    """Rows that come quantised are rotated as the values that they stand for."""
    k = mkv.quantize(outliers(rng, HKV, 30, 64), name)
    v = mkv.quantize(normal(rng, HKV, 30, 96), name)
    q = normal(rng, HQ, 30, 64)
    got = []
    for rows in ((k, v), (k.dequantize(), v.dequantize())):
        cache = make(64, 96, rotate=True)
        assert cache.find_slot(pos=range(30), seq_id=[0] * 30)
        for layer in range(LAYERS):
            cache.store(layer, *rows)
        out = cache.attend(1, q)
        cache.commit()
        assert cache.stats().cold_tokens > 0
        got.append([out, *everything(cache)])
    for a, b in zip(*got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_prompt_took_is_given_back() -> None:
    """Rows on their way through the rotation are held for steps of decoding, not for a prompt."""
    books = {}
    for rotate in (False, True):
        cache = mkv.MixedKVCache(
            num_layers=1, num_kv_heads=2, head_dim=64, hot_size=64, cold_size=4096, rotate=rotate
        )
        rows = np.ones((2, 4000, 64), np.float32)
        assert cache.find_slot(pos=range(4000), seq_id=[0] * 4000) is not None
        cache.store(0, rows, rows)
        cache.commit()
        one = np.ones((2, 1, 64), np.float32)
        assert cache.find_slot(pos=[4000], seq_id=[0]) is not None
        cache.store(0, one, one)
        cache.commit()
        books[rotate] = cache.stats().books_bytes
    assert books[True] == books[False] + 2 * one.nbytes
