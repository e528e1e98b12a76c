"""What `store` and `append` take: rows of every type, read as they are."""

from __future__ import annotations

import itertools
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from caches import HKV, HQ, LAYERS, mixed, rows_for
from conftest import normal

TYPES = mkv.formats.available()
BLOCKS = [name for name in mkv.formats.packed() if name != "bf16"]


def make(**options: Any) -> Any:
    return mixed(hot=16, cold=96, group=8, head_dim=64, **options)


def as_type(x: np.ndarray, name: str) -> Any:
    if name in ("f32", "f16"):
        return x.astype(np.float32 if name == "f32" else np.float16)
    return mkv.quantize(x, name)


def keys_for(pos: Any, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    k, v = rows_for(list(pos), layer)
    return np.concatenate([k, -k[..., ::-1]], -1), v


def fill(cache: Any, n: int, k_type: str, v_type: str, step: int = 7) -> None:
    for start in range(0, n, step):
        pos = range(start, min(start + step, n))
        assert cache.find_slot(pos=pos, seq_id=[0] * len(pos)) is not None
        for layer in range(LAYERS):
            k, v = keys_for(pos, layer)
            cache.store(layer, as_type(k, k_type), as_type(v, v_type))
        cache.commit()


def through(x: np.ndarray, *types: str) -> np.ndarray:
    """Values that go from type to type; between two of the same nothing happens to them."""
    rows = as_type(x, types[0])
    for before, after in itertools.pairwise(types):
        if before != after:
            rows = as_type(np.asarray(rows, np.float32), after)
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("k_type", TYPES)
@pytest.mark.parametrize("hot", ["f32", "f16", "q4_0", "q8_0"])
def test_store_converts_what_the_rows_say(isa: str, k_type: str, hot: str) -> None:
    v_type = TYPES[(TYPES.index(k_type) + 2) % len(TYPES)]
    cache = make(hot_k_type=hot, hot_v_type=hot)
    fill(cache, 40, k_type, v_type)
    in_cold = cache.tiers(0)
    assert in_cold.sum() > 16
    assert not in_cold.all()
    for layer in range(LAYERS):
        k, v = keys_for(range(40), layer)
        for got, x, kind in (
            (cache.keys(layer, 0), k, k_type),
            (cache.values(layer, 0), v, v_type),
        ):
            in_hot = through(x, kind, hot)
            np.testing.assert_array_equal(got[:, ~in_cold], in_hot[:, ~in_cold])
            moved = through(x, kind, hot, "q4_0")
            np.testing.assert_array_equal(got[:, in_cold], moved[:, in_cold])


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_of_the_tiers_own_type_keep_their_bytes(isa: str, kind: str) -> None:
    cache = make(hot_k_type=kind, hot_v_type=kind, cold_k_type=kind, cold_v_type=kind)
    fill(cache, 60, kind, kind)
    hot, cold = cache.export_rows(1, 0)
    assert len(hot.positions) > 0
    assert len(cold.positions) > 20
    for rows in (hot, cold):
        k, v = keys_for(rows.positions, 1)
        assert rows.k.format == rows.v.format == kind
        np.testing.assert_array_equal(rows.k.data, mkv.quantize(k, kind).data)
        np.testing.assert_array_equal(rows.v.data, mkv.quantize(v, kind).data)


def test_a_long_ubatch_of_quantised_rows(rng: np.random.Generator) -> None:
    cache, twin = make(), make()
    pos = range(70)
    k, v = keys_for(pos)
    q = normal(rng, HQ, 70, 64)
    outs = []
    for it, rows in ((cache, (mkv.quantize(k, "q8_0"), mkv.quantize(v, "q4_0"))),
                     (twin, (mkv.quantize(k, "q8_0").dequantize(),
                             mkv.quantize(v, "q4_0").dequantize()))):  # fmt: skip
        it.find_slot(pos=pos, seq_id=[0] * 70)
        it.store(0, *rows)
        outs.append(it.attend(0, q))
        it.commit()
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(cache.keys(0, 0), twin.keys(0, 0))


def test_torch_bfloat16_is_read_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    cache, twin = make(), make()
    pos = range(30)
    k, v = (torch.from_numpy(x).to(torch.bfloat16) for x in keys_for(pos))
    wide = torch.zeros(HKV, 30, 2 * 64, dtype=torch.bfloat16)
    wide[..., :64] = k
    for it, rows in ((cache, (wide[..., :64], v)), (twin, (k.float(), v.float()))):
        it.find_slot(pos=pos, seq_id=[0] * 30)
        it.store(0, *rows)
        it.commit()
    np.testing.assert_array_equal(cache.keys(0, 0), twin.keys(0, 0))
    np.testing.assert_array_equal(cache.values(0, 0), twin.values(0, 0))
    same = make(hot_k_type="bf16", hot_v_type="bf16")
    same.find_slot(pos=pos, seq_id=[0] * 30)
    same.store(0, k, v)
    same.restore()


def test_append_takes_them_too() -> None:
    cache = make()
    k, v = keys_for(range(9))
    quantised = [mkv.quantize(k, "q8_0")] * LAYERS, [mkv.quantize(v, "iq4_nl")] * LAYERS
    cache.append(range(9), [0] * 9, *quantised)
    want = ref.stored_as(quantised[0][0].dequantize(), "f16")
    np.testing.assert_array_equal(cache.keys(1, 0), want)


def test_what_is_refused() -> None:
    cache = make()
    cache.find_slot(pos=range(3), seq_id=[0] * 3)
    k, v = keys_for(range(3))
    for bad, error, match in (
        (mkv.quantize(k[..., :32], "q8_0"), ValueError, r"k must have shape \(2, 3, 64\)"),
        (mkv.quantize(k[:, :2], "q8_0"), ValueError, r"k must have shape.*got \(2, 2, 64\)"),
        (
            np.zeros((HKV, 3, 36), np.uint8),
            TypeError,
            "or a QuantizedArray.*got uint8",
        ),
        (k.astype(np.float64), TypeError, "k must be"),
        (k.tolist(), TypeError, "k must be"),
    ):
        with pytest.raises(error, match=match):
            cache.store(0, bad, v)
    big = np.full((HKV, 3, 64), 3e5, np.float32)
    with pytest.raises(ValueError, match=r"k of layer 0 holds.*'f16', the type of its hot tier"):
        cache.store(0, mkv.quantize(big, "q4_0"), v)
    odd = mixed(hot=16, cold=64, head_dim=40, cold_k_type="f16", cold_v_type="f16")
    odd.find_slot(pos=range(3), seq_id=[0] * 3)
    with pytest.raises(ValueError, match="k must have shape"):
        odd.store(0, mkv.quantize(k, "q8_0"), v)
