"""fit_scales of the caches: rows of either tier are those of quantize(..., fit_scales=True)."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import HKV, HQ, LAYERS, mixed, rows_for
from conftest import normal, relative_error

D = 64


def rows(first: int, n: int, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    k, v = rows_for(range(first, first + n), layer)
    return np.concatenate([k, -2 * k[..., ::-1]], -1), v


def filled(total: int = 90, step: int = 7, **options: Any) -> Any:
    """A cache of tokens that came a few at a time, so that tiles are packed in parts too."""
    options = {"hot": 24, "cold": 96, "group": 10, "head_dim": D, "fit_scales": True, **options}
    cache = mixed(**options)
    for first in range(0, total, step):
        n = min(step, total - first)
        assert cache.find_slot(pos=range(first, first + n), seq_id=[0] * n) is not None
        for layer in range(LAYERS):
            cache.store(layer, *rows(first, n, layer))
        cache.commit()
    return cache


def bytes_of(x: Any) -> np.ndarray:
    return np.asarray(x.data if isinstance(x, mkv.QuantizedArray) else x)


@pytest.mark.parametrize("cold", ["q4_0", "iq4_nl", "nl4", "nl3", "q8_0", "f16"])
@pytest.mark.parametrize("hot", ["f32", "f16", "q8_0"])
def test_cold_rows_are_fitted(isa: str, hot: str, cold: str) -> None:
    types = {"hot_k_type": hot, "hot_v_type": hot, "cold_k_type": cold, "cold_v_type": cold}
    cache = filled(**types)
    for layer in range(LAYERS):
        in_cold = cache.export_rows(layer, 0)[1]
        assert len(in_cold.positions) > 48
        for got, x in zip((in_cold.k, in_cold.v), rows(0, 90, layer), strict=True):
            moved = ref.stored_as(x, hot)[:, in_cold.positions]
            if cold in ("q4_0", "iq4_nl"):
                np.testing.assert_array_equal(bytes_of(got), ref.fit_scales(moved, cold))
            else:
                np.testing.assert_array_equal(
                    np.asarray(got, np.float32), ref.stored_as(moved, cold)
                )


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
@pytest.mark.parametrize("cold", ["same", "nl3"])
def test_hot_rows_are_fitted_and_moves_keep_them(isa: str, kind: str, cold: str) -> None:
    of_cold = kind if cold == "same" else cold
    types = {"hot_k_type": kind, "hot_v_type": kind}
    cache = filled(**types, cold_k_type=of_cold, cold_v_type=of_cold)
    in_hot, in_cold = cache.export_rows(1, 0)
    for got, x in zip((in_hot.k, in_hot.v), rows(0, 90, 1), strict=True):
        np.testing.assert_array_equal(bytes_of(got), ref.fit_scales(x[:, in_hot.positions], kind))
    for got, x in zip((in_cold.k, in_cold.v), rows(0, 90, 1), strict=True):
        want = ref.fit_scales(x[:, in_cold.positions], kind)
        if cold != "same":
            want = ref.PACKED[cold][0](ref.PACKED[kind][1](want))
        np.testing.assert_array_equal(bytes_of(got), want)


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
def test_a_cache_of_one_tier_is_fitted(isa: str, kind: str) -> None:
    options = {"num_layers": 1, "num_kv_heads": HKV, "head_dim": D, "size": 64}
    k, v = rows(0, 40)
    v = np.concatenate([v] * (D // v.shape[-1]), -1)
    cache = mkv.UnifiedKVCache(**options, k_type=kind, v_type=kind, fit_scales=True)
    cache.append(range(40), [0] * 40, [k], [v])
    exported = cache.export_rows(0, 0)[0]
    np.testing.assert_array_equal(bytes_of(exported.k), ref.fit_scales(k, kind))
    np.testing.assert_array_equal(bytes_of(exported.v), ref.fit_scales(v, kind))


def test_rows_of_the_tiers_own_type_keep_their_bytes() -> None:
    cache = mixed(hot=16, head_dim=D, hot_k_type="q4_0", hot_v_type="q4_0", fit_scales=True)
    k, v = (mkv.quantize(x, "q4_0") for x in rows(0, 8))
    cache.append(range(8), [0] * 8, [k] * LAYERS, [v] * LAYERS)
    exported = cache.export_rows(0, 0)[0]
    np.testing.assert_array_equal(bytes_of(exported.k), k.data)
    np.testing.assert_array_equal(bytes_of(exported.v), v.data)


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
def test_rotated_and_centered_rows_lose_less(isa: str, kind: str) -> None:
    """What comes back, and what attention gives of it, is nearer to what went in."""
    options = {"cold_k_type": kind, "cold_v_type": kind, "rotate": True, "center_keys": True}
    query = normal(np.random.default_rng(4), HQ, 1, D)
    k, v = rows(0, 90)
    lost = []
    for fit in (False, True):
        cache = filled(**options, fit_scales=fit)
        cold = cache.tiers(0)
        errors = [
            float(np.square(got[:, cold] - x[:, cold]).sum())
            for got, x in ((cache.keys(0, 0), k), (cache.values(0, 0), v))
        ]
        lost.append(errors)
        assert cache.find_slot(pos=[90], seq_id=[0]) is not None
        new = rows(90, 1)
        cache.store(0, *new)
        out = cache.attend(0, query)
        held_k = np.concatenate([cache.keys(0, 0), new[0]], 1)[:, :91]
        held_v = np.concatenate([cache.values(0, 0), new[1]], 1)[:, :91]
        want, _ = ref.attention(query[None], held_k[None], held_v[None])
        assert relative_error(out, want[0]) < 2e-3
        cache.restore()
    for plain, fitted in zip(*lost, strict=True):
        assert fitted < 0.95 * plain


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
def test_restore_brings_moved_rows_back(kind: str) -> None:
    options = {"cold_k_type": kind, "cold_v_type": kind}
    cache = filled(**options)
    before = [bytes_of(x).copy() for tier in cache.export_rows(0, 0) for x in (tier.k, tier.v)]
    n = 24 - (90 - int(cache.tiers(0).sum())) + 1
    assert cache.find_slot(pos=range(90, 90 + n), seq_id=[0] * n) is not None
    cache.store(0, *rows(90, n))
    cache.restore()
    after = [bytes_of(x) for tier in cache.export_rows(0, 0) for x in (tier.k, tier.v)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_scales_is_a_bool() -> None:
    with pytest.raises(TypeError, match="fit_scales must be"):
        mixed(fit_scales="yes")
