"""Values that a tier's type can't hold: an error at store, never an infinity in silence."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import as_kind, normal, values_of

HKV, HQ, D = 2, 4, 64
#: Half a step above the largest f16: from here on rounding gives infinity.
F16_LIMIT = np.float32(65520)
LIMITS = {"f16": F16_LIMIT, "q4_0": 8 * F16_LIMIT, "f32": np.float32(np.inf)}


def below(x: np.float32) -> np.float32:
    return np.nextafter(x, np.float32(0))


def make(hot: str, cold: str | None = None) -> Any:
    sizes = {"num_layers": 3, "num_kv_heads": HKV, "head_dim": D}
    if cold is None:
        return mkv.UnifiedKVCache(**sizes, size=64, k_type=hot, v_type=hot)
    types = {"hot_k_type": hot, "hot_v_type": hot, "cold_k_type": cold, "cold_v_type": cold}
    return mkv.MixedKVCache(**sizes, hot_size=32, cold_size=64, group_size=8, n_pad=8, **types)


TYPES = [("f16", None), ("q4_0", None), ("f16", "q4_0"), ("f32", "f16"), ("f32", "q4_0")]


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_store_refuses_what_a_tier_cannot_hold(
    isa: str, rng: np.random.Generator, types: tuple[str, str | None], name: str
) -> None:
    limit = min(LIMITS[kind] for kind in types if kind)
    narrow = next(kind for kind in types if kind and LIMITS[kind] == limit)
    tier = "hot" if narrow == types[0] else "cold"
    for sign in (1, -1):
        for layer, head, token, dim in ((0, 0, 0, 0), (2, 1, 4, 31), (1, 0, 3, 17)):
            cache = make(*types)
            rows = {"k": normal(rng, HKV, 5, D), "v": normal(rng, HKV, 5, D)}
            assert cache.find_slot(pos=range(5), seq_id=[0] * 5)
            cache.store(layer, **rows)
            q = normal(rng, HQ, 5, D)
            before = cache.attend(layer, q)
            for value in (limit, 3 * limit, np.float32(3e38)):
                bad = {key: x.copy() for key, x in rows.items()}
                bad["k" if name == "v" else "v"] += 1  # would show, were it stored
                bad[name][head, token, dim] = sign * value
                message = (
                    rf"{name} of layer {layer} holds {sign * value:.9g} \(head {head}, token "
                    rf"{token}\).*'{narrow}', the type of its {tier} tier: magnitudes must be "
                    rf"below {limit:.9g}; types that hold it: .*'f32'"
                ).replace("+", r"\+")
                with pytest.raises(ValueError, match=message):
                    cache.store(layer, **bad)
                np.testing.assert_array_equal(cache.attend(layer, q), before)
            cache.restore()
            assert len(cache) == 0


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_store_takes_the_largest_values_and_they_stay_finite(
    isa: str, rng: np.random.Generator, types: tuple[str, str | None]
) -> None:
    """In both tiers: with a cold one, more tokens come than the hot one keeps."""
    limit = min(LIMITS[kind] for kind in types if kind)
    largest = below(limit) if np.isfinite(limit) else np.finfo(np.float32).max
    cache = make(*types)
    n = 48 if types[1] else 16
    k = normal(rng, HKV, n, D)
    v = rng.choice([largest, -largest], (HKV, n, D)).astype(np.float32)
    for first in range(0, n, 8):
        assert cache.find_slot(pos=range(first, first + 8), seq_id=[0] * 8)
        for layer in range(3):
            cache.store(layer, k[:, first : first + 8], v[:, first : first + 8])
            assert np.isfinite(cache.attend(layer, normal(rng, HQ, 8, D))).all()
        cache.commit()
    assert np.isfinite(cache.values(1, 0)).all()
    in_cold = cache.tiers(0)
    assert in_cold.any() == (types[1] is not None)
    for tier, kind in ((~in_cold, types[0]), (in_cold, types[1])):
        if kind:
            want = values_of(as_kind(ref.stored_as(v[:, tier], types[0]), kind))
            np.testing.assert_array_equal(cache.values(1, 0)[:, tier], want)


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
def test_store_keeps_infinities_and_nan_as_they_are(
    isa: str, rng: np.random.Generator, kind: str, value: float
) -> None:
    """Beside a value that is too large, they don't hide it."""
    cache = make(kind, "q4_0")
    k, v = normal(rng, HKV, 3, D), normal(rng, HKV, 3, D)
    k[1, 0, 3], v[0, 2, 30] = value, value
    assert cache.find_slot(pos=range(3), seq_id=[0] * 3)
    cache.store(0, k, v)
    bad = v.copy()
    bad[1, 2, 1] = 1e6
    with pytest.raises(ValueError, match=r"v of layer 0 holds 1000000 \(head 1, token 2\)"):
        cache.store(0, k, bad)
    for layer in (1, 2):
        cache.store(layer, k.astype(np.float16), v.astype(np.float16))
    cache.commit()
    for layer in range(3):
        kept = [cache.keys(layer, 0)[1, 0, 3], cache.values(layer, 0)[0, 2, 30]]
        np.testing.assert_array_equal(kept, [value, value])


def test_store_looks_at_every_row_of_a_long_ubatch(rng: np.random.Generator) -> None:
    """Many rows, strided ones too: the first that does not fit is named, by any thread."""
    n = 500
    cache = mkv.MixedKVCache(
        num_layers=1, num_kv_heads=4, head_dim=64, hot_size=64, cold_size=1024, n_pad=32
    )
    assert cache.find_slot(pos=range(n), seq_id=[0] * n)
    k = np.ascontiguousarray(normal(rng, n, 4, 64)).transpose(1, 0, 2)
    v = normal(rng, 4, n, 64)
    for rows, name in ((k, "k"), (v, "v")):
        for head, token in ((0, 0), (3, 499), (2, 64), (1, 63)):
            kept = rows[head, token, 63]
            rows[head, token, 63] = -1e5
            with pytest.raises(
                ValueError, match=rf"{name} .* -100000 \(head {head}, token {token}"
            ):
                cache.store(0, k, v)
            rows[head, token, 63] = kept
    cache.store(0, k, v)
    cache.commit()


def test_append_of_what_does_not_fit_changes_nothing(rng: np.random.Generator) -> None:
    cache = make("f16", "q4_0")
    rows = [normal(rng, HKV, 4, D) for _ in range(3)]
    cache.append(range(4), [0] * 4, rows, rows)
    before = [(cache.keys(i, 0), cache.values(i, 0)) for i in range(3)]
    bad = [x.copy() for x in rows]
    bad[2][0, 1, 5] = 7e4
    with pytest.raises(ValueError, match="v of layer 2 holds 70000"):
        cache.append(range(4, 8), [0] * 4, rows, bad)
    assert len(cache) == 4
    for i, (keys, values) in enumerate(before):
        np.testing.assert_array_equal(cache.keys(i, 0), keys)
        np.testing.assert_array_equal(cache.values(i, 0), values)


@pytest.mark.torch
def test_store_of_bfloat16_beyond_f16_is_refused() -> None:
    torch = pytest.importorskip("torch")
    k = torch.ones((HKV, 1, D), dtype=torch.bfloat16)
    cache = make("f16", "q4_0")
    assert cache.find_slot(pos=[0], seq_id=[0])
    cache.store(0, k, k)
    with pytest.raises(ValueError, match="k of layer 0 holds 131072"):
        cache.store(0, k * 131072, k)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("cold", mkv.formats.available())
@pytest.mark.parametrize("hot", mkv.formats.available())
def test_what_store_takes_stays_finite_in_every_pair_of_types(
    rng: np.random.Generator, hot: str, cold: str, dtype: type
) -> None:
    """Hot may round a value up, and cold converts what hot holds."""
    refused, taken = 0, 0
    edges = [65504, 65519.9, 524000, 524159, 8321027, 7403759, 3.38e38, 3.4e38]
    for edge in [1.0, *edges, *(e * (1 - 2.0**-k) for e in edges for k in range(2, 14, 2))]:
        if edge > float(np.finfo(dtype).max):
            continue
        cache = make(hot, cold)
        k = np.ones((HKV, 48, D), dtype)
        k[..., 3] = edge
        k[..., 5] = -edge / 2
        try:
            cache.append(range(48), [0] * 48, [k] * 3, [k] * 3)
        except ValueError as error:
            if "magnitudes must be below" not in str(error):
                raise
            refused += 1
            continue
        taken += 1
        assert cache.stats().cold_tokens
        assert np.isfinite(cache.keys(1, 0)).all(), edge
        assert np.isfinite(cache.values(2, 0)).all(), edge
    assert taken
    assert refused or dtype == np.float16 or {hot, cold} <= {"f32"}
