"""Every parameter of every door, given what it can't be: refused by its name and value, and what
was there before is as it was. The parameters come from the signatures themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal
from mixedkv.cache import presets
from wrong_values import cases, check_refused, label

HQ, HKV, LQ, LKV, D = 4, 2, 3, 5, 32
RNG = np.random.default_rng(11)
Q, K, V = normal(RNG, HQ, LQ, D), normal(RNG, HKV, LKV, D), normal(RNG, HKV, LKV, D)
PAGES = normal(RNG, 3, 2, HKV, 4, D)
ROWS = mkv.quantize(K, "q8_0")
GEOMETRY: dict[str, Any] = {"num_layers": 2, "num_kv_heads": HKV, "head_dim": D}
SIZES: dict[str, Any] = {"hot_size": 64, "cold_size": 64}


def door(function: Callable[..., Any], **right: Any) -> Any:
    return pytest.param(function, right, id=function.__qualname__)


def with_state(**right: Any) -> dict[str, Any]:
    return {"num_qo_heads": HQ, "qo_len": LQ, "head_dim": D, **right}


OP_DOORS = [
    door(mkv.attention, q=Q, k=K, v=V),
    door(
        mkv.attention_paged,
        q=Q.swapaxes(0, 1).copy()[:2],
        kv_pages=PAGES,
        indptr=[0, 2, 3],
        indices=[2, 0, 1],
        last_page_len=[3, 1],
    ),
    door(mkv.AttentionState, **with_state()),
    door(mkv.merge_state, out_a=Q, lse_a=Q[..., 0], out_b=Q, lse_b=Q[..., 0]),
    door(mkv.merge_states, outs=Q, lses=Q[..., 0]),
    door(mkv.quantize, x=K, format="q8_0"),
    door(mkv.quantize_q4_0, x=K),
    door(mkv.dequantize_q4_0, b=mkv.quantize_q4_0(K)),
    door(mkv.QuantizedArray, data=mkv.quantize_q4_0(K), format="q4_0"),
    door(mkv.formats.info, name="q4_0"),
    door(mkv.isa.select, name=mkv.isa.active()),
    door(mkv.isa.requires, name="scalar"),
    door(mkv.isa.compute_types, name="scalar"),
    door(mkv.QuantizedArray.dequantize, self=ROWS),
    door(mkv.formats.Format.row_bytes, self=mkv.formats.info("q4_0"), n=64),
    door(mkv.formats.Format.row_values, self=mkv.formats.info("q4_0"), num_bytes=36),
]


def wrong_of(doors: list[Any], without: tuple[str, ...] = ()) -> list[Any]:
    return [
        pytest.param(function, right, name, value, id=f"{one.id} {name}: {label(value)}")
        for one in doors
        for function, right in (one.values,)
        for name, value in cases(function, without=without)
    ]


@pytest.mark.parametrize(("function", "right", "name", "value"), wrong_of(OP_DOORS))
def test_op(function: Any, right: dict[str, Any], name: str, value: Any) -> None:
    named = {"kv_pages": "kv_pages|k_pages", "outs": "outs|lses"}.get(name, name)
    check_refused(lambda: function(**{**right, name: value}), name, value, named=named)
    function(**right)


# --- the state --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(*case, id=f"{case[0]}: {label(case[1])}")
        for case in cases(mkv.AttentionState.update)
    ],
)
def test_update(name: str, value: Any) -> None:
    state = mkv.AttentionState(**with_state())
    state.update(Q, K, V)
    before = state.ms.copy(), state.acc.copy()
    right: dict[str, Any] = {"q": Q, "k": K, "v": V, "q_start": 0, "kv_start": 0}
    check_refused(lambda: state.update(**{**right, name: value}), name, value)
    np.testing.assert_array_equal(state.ms, before[0])
    np.testing.assert_array_equal(state.acc, before[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(*case, id=f"{case[0]}: {label(case[1])}")
        for case in cases(mkv.AttentionState.finalize)
    ],
)
def test_finalize(name: str, value: Any) -> None:
    state = mkv.AttentionState(**with_state())
    state.update(Q, K, V)
    check_refused(lambda: state.finalize(**{name: value}), name, value)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(Q, K, V))


# --- caches -----------------------------------------------------------------------------------

CACHE_DOORS = [
    door(mkv.CacheConfig, **GEOMETRY, **SIZES),
    door(mkv.MixedKVCache, **GEOMETRY, **SIZES),
    door(mkv.UnifiedKVCache, **GEOMETRY, size=64),
    door(mkv.MixedKVCache.preset, name="small", **GEOMETRY, cold_size=64),
]


@pytest.mark.parametrize(
    ("function", "right", "name", "value"), wrong_of(CACHE_DOORS, without=("config",))
)
def test_cache_option(function: Any, right: dict[str, Any], name: str, value: Any) -> None:
    options = {**right, name: value}
    check_refused(
        lambda: function(**options), name, value, named={"name": "preset"}.get(name, name)
    )


OPTION_CASES = [
    pytest.param(*case, id=f"{case[0]}: {label(case[1])}") for case in cases(mkv.CacheConfig)
]


@pytest.mark.parametrize("preset", presets.NAMES)
@pytest.mark.parametrize(("name", "value"), OPTION_CASES)
def test_option_beside_a_preset(preset: str, name: str, value: Any) -> None:
    """The preset's other sizes are made to fit those given: not before these are right."""
    options = {**GEOMETRY, "head_dim": 64, "cold_size": 64, name: value}
    check_refused(lambda: mkv.MixedKVCache.preset(preset, **options), name, value)


@pytest.mark.parametrize(("name", "value"), OPTION_CASES)
def test_option_by_replace(name: str, value: Any) -> None:
    config = mkv.CacheConfig(**GEOMETRY, **SIZES)
    check_refused(lambda: config.replace(**{name: value}), name, value)


def filled() -> mkv.MixedKVCache:
    """A cache with tokens in both tiers and a slot of LQ more, stored."""
    cache = mkv.MixedKVCache(**GEOMETRY, **SIZES, group_size=8)
    rng = np.random.default_rng(3)
    for n in (50, 8):
        rows = normal(rng, 2, HKV, n, D)
        first = cache.seq_pos_max(0) + 1
        cache.append(range(first, first + n), [0] * n, rows, rows)
    rows = normal(rng, HKV, LQ, D)
    assert cache.find_slot(range(58, 58 + LQ), [0] * LQ) is not None
    for layer in range(2):
        cache.store(layer, rows, rows)
    return cache


def verb(function: Callable[..., Any], **right: Any) -> Any:
    return pytest.param(function, right, id=function.__name__)


VERBS = [
    verb(mkv.MixedKVCache.attend, layer=0, q=Q),
    verb(mkv.MixedKVCache.store, layer=0, k=K[:, :LQ], v=V[:, :LQ]),
    verb(mkv.MixedKVCache.export_rows, layer=0, seq=0),
    verb(mkv.MixedKVCache.keys, layer=0, seq=0),
    verb(mkv.MixedKVCache.values, layer=0, seq=0),
]


@pytest.fixture(scope="module")
def cache() -> mkv.MixedKVCache:
    return filled()


@pytest.mark.parametrize(("function", "right", "name", "value"), wrong_of(VERBS))
def test_verb(
    cache: mkv.MixedKVCache, function: Any, right: dict[str, Any], name: str, value: Any
) -> None:
    before = cache.attend(0, Q), cache.stats()
    check_refused(lambda: function(cache, **{**right, name: value}), name, value)
    np.testing.assert_array_equal(cache.attend(0, Q), before[0])
    assert cache.stats() == before[1]
