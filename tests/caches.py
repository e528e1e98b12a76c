"""What the tests of the caches share: makers, tokens, comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import mixedkv as mkv
import numpy as np
import reference as ref
from conftest import F32_REL, assert_close, assert_lse_close, normal, tolerance

LAYERS, HQ, HKV, D, DV = 2, 6, 2, 32, 64
Cache = Any


def mixed(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> Cache:
    shape = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": D, "head_dim_v": DV}
    sizes = {"hot_size": hot, "cold_size": cold, "group_size": group, "n_pad": 1}
    return mkv.MixedKVCache(**{**shape, **sizes, **options})


def unified(hot: int = 16, cold: int = 0, group: int = 0, **options: Any) -> Cache:
    shape = {"num_layers": LAYERS, "num_kv_heads": HKV, "head_dim": D, "head_dim_v": DV}
    return mkv.UnifiedKVCache(**{**shape, "size": hot, "n_pad": 1, **options})


def one_tier(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> Cache:
    return mixed(hot, cold, group, quantize=False, **options)


MAKERS: dict[str, Callable[..., Cache]] = {
    "mixed": mixed,
    "unified": unified,
    "mixed_one_tier": one_tier,
}


def rows_for(pos: Sequence[int], layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that depend on position and layer alone: k [Hkv, n, D], v [Hkv, n, Dv]."""
    ks, vs = [], []
    for p in pos:
        rng = np.random.default_rng([p, layer])
        ks.append(normal(rng, HKV, D))
        vs.append(normal(rng, HKV, DV))
    return np.stack(ks, 1), np.stack(vs, 1)


def add(cache: Cache, pos: Sequence[int], seq: Any = 0) -> Any:
    """find_slot, store, commit; returns the slot, or None where there is no room."""
    pos = list(pos)
    slot = cache.find_slot(pos=pos, seq_id=[seq] * len(pos)) if pos else None
    if slot is not None:
        for layer in range(LAYERS):
            cache.store(layer, *rows_for(pos, layer))
        cache.commit()
    return slot


def cold_positions(cache: Cache, seq: int = 0) -> list[int]:
    return [int(p) for p, c in zip(cache.positions(seq), cache.tiers(seq), strict=True) if c]


def hot_positions(cache: Cache, seq: int = 0) -> list[int]:
    return [int(p) for p, c in zip(cache.positions(seq), cache.tiers(seq), strict=True) if not c]


def snapshot(cache: Cache, seqs: int = 1) -> list[Any]:
    """Everything that can be seen of a cache but the time that it took."""
    stats = dataclasses.asdict(cache.stats())
    for name in ("move_seconds", "books_bytes"):
        del stats[name]
    seen: list[Any] = [len(cache), stats]
    for seq in range(seqs):
        seen += [list(cache.positions(seq)), list(cache.tiers(seq))]
        for layer in range(LAYERS):
            seen += [cache.keys(layer, seq).tobytes(), cache.values(layer, seq).tobytes()]
    return seen


def step(cache: Cache, model: ref.MixedCacheModel, rng: np.random.Generator, pos: Sequence[int],
         seq: Any = 0, rel: float | None = None, **options: Any) -> None:  # fmt: skip
    """One ubatch through both, attended and compared."""
    pos = list(pos)
    owners = [seq] * len(pos) if isinstance(seq, (int, set)) else list(seq)
    assert cache.find_slot(pos=pos, seq_id=owners) is not None
    assert model.find_slot(pos, owners) is not None
    if rel is None:
        rel = tolerance("q4_0") if cache.stats().cold_tokens else F32_REL
    for layer in range(LAYERS):
        k, v = normal(rng, HKV, len(pos), D), normal(rng, HKV, len(pos), DV)
        q = normal(rng, HQ, len(pos), D)
        for it in (cache, model):
            it.store(layer, k, v)
        out, lse = cache.attend(layer, q, return_lse=True, **options)
        want, want_lse = model.attend(layer, q, **options)
        assert_close(out, want, rel)
        assert_lse_close(lse, want_lse, rel)
    cache.commit()
    model.commit()


def twins(hot: int = 16, cold: int = 64, group: int = 8, **options: Any) -> tuple[Cache, Any]:
    model = ref.MixedCacheModel(
        num_layers=LAYERS, num_kv_heads=HKV, head_dim=D, head_dim_v=DV,
        hot_size=hot, cold_size=cold, group_size=group, **options,
    )  # fmt: skip
    return mixed(hot, cold, group, **options), model
