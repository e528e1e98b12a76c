"""Wrong use of the caches: a clear exception that names argument and value,
and nothing changed. Each case runs on an object that is used again afterwards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal
from refusal_cases import DV, HKV, HQ, LKV, LQ, WRONG, D, f32, refused

# --- the caches -----------------------------------------------------------------------------------

LAYERS, CHQ, CHKV, N = 2, 4, 2, 3
CD, CDV = 32, 64


@pytest.fixture(params=["mixed", "unified"])
def cache(request: pytest.FixtureRequest) -> Any:
    """20 tokens of sequences 0 and 1 in it, of three; a slot of N tokens is not pending yet."""
    shape = {"num_layers": LAYERS, "num_kv_heads": CHKV, "head_dim": CD, "head_dim_v": CDV}
    if request.param == "mixed":
        made: Any = mkv.MixedKVCache(
            **shape, hot_size=16, cold_size=64, group_size=4, n_pad=8, n_seq_max=3
        )
    else:
        made = mkv.UnifiedKVCache(**shape, size=32, n_pad=8, n_seq_max=3)
    rng = np.random.default_rng(7)
    for seq in (0, 1):
        k, v = normal(rng, CHKV, 10, CD), normal(rng, CHKV, 10, CDV)
        made.append(range(10), [seq] * 10, [k, -k], [v, -v])
    return made


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_robust_attend_into_memory_of_an_option_is_refused(
    cache: Any, rng: np.random.Generator, name: str
) -> None:
    cache.find_slot(pos=[20, 21, 22], seq_id=[0] * N)
    cache.store(0, f32(CHKV, N, CD), normal(rng, CHKV, N, CDV))
    q, out = normal(rng, CHQ, N, CD), normal(rng, CHQ, N, CDV)
    option = out.reshape(-1)[7 : 7 + CHQ]
    before = out.copy()
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        cache.attend(0, q, out=out, **{name: option})
    np.testing.assert_array_equal(out, before)
    want = cache.attend(0, q, **{name: option.copy()})
    np.testing.assert_array_equal(cache.attend(0, q, out=out, **{name: option.copy()}), want)


@pytest.mark.parametrize("threads", [1, 3])
def test_robust_attend_into_its_query_is_right_or_refused(
    cache: Any, rng: np.random.Generator, threads: int
) -> None:
    """head_dim 32, head_dim_v 64: out holds the query in its first half."""
    cache.find_slot(pos=[20, 21, 22], seq_id=[0] * N)
    cache.store(0, f32(CHKV, N, CD), normal(rng, CHKV, N, CDV))
    out = normal(rng, CHQ, N, CDV)
    q = out[..., :CD]
    want, before = cache.attend(0, q.copy()), out.copy()
    refusal = refused(lambda: cache.attend(0, q, out=out, threads=threads))
    if refusal:
        assert "out" in refusal
        np.testing.assert_array_equal(out, before)
    else:
        np.testing.assert_array_equal(out, want)


def seen(cache: Any) -> list[Any]:
    stats = dataclasses.asdict(cache.stats())
    del stats["move_seconds"], stats["books_bytes"]
    looks: list[Any] = [len(cache), stats]
    for seq in range(3):
        looks += [list(cache.positions(seq)), list(cache.tiers(seq))]
        for layer in range(LAYERS):
            looks += [cache.keys(layer, seq).tobytes(), cache.values(layer, seq).tobytes()]
    return looks


def goes_on(cache: Any) -> None:
    """The cache still works."""
    n = len(cache)
    cache.append([90], [2], [f32(CHKV, 1, CD)] * LAYERS, [f32(CHKV, 1, CDV)] * LAYERS)
    assert len(cache) == n + 1
    assert list(cache.positions(2)) == [90]


BAD_FIND_SLOT: dict[str, tuple[Any, Any, str]] = {
    "nothing": ([], [], "pos"),
    "lengths": ([1, 2], [0], "seq_id.*2.*1"),
    "pos_negative": ([3, -1], [0, 0], r"pos\[1\].*-1"),
    "pos_too_large": ([2**31], [0], r"pos\[0\].*2147483648"),
    "pos_huge": ([2**63], [0], "pos"),
    "pos_beyond_64_bits": ([2**70], [0], "pos"),
    "pos_float": ([1.5], [0], "pos.*float"),
    "pos_bool": ([True], [0], "pos.*bool"),
    "pos_str": (["1"], [0], "pos"),
    "pos_none": (None, [0], "pos"),
    "pos_scalar": (3, [0], "pos"),
    "pos_2d": ([[1], [2]], [0, 0], "pos"),
    "pos_ragged": ([[1], [2, 3]], [0, 0], "pos"),
    "seq_negative": ([1], [-1], r"seq_id\[0\].*-1"),
    "seq_too_large": ([1, 2], [0, 3], r"seq_id\[1\].*3"),
    "seq_huge": ([1], [2**40], "seq_id.*1099511627776"),
    "seq_beyond_64_bits": ([1], [2**70], "seq_id"),
    "seq_float": ([1], [0.5], "seq_id"),
    "seq_str": ([1], ["0"], "seq_id"),
    "seq_none": ([1], [None], "seq_id"),
    "seq_scalar": ([1], 0, "seq_id"),
    "seq_empty_set": ([1], [set()], r"seq_id\[0\]"),
    "seq_bad_in_set": ([1, 1], [0, {0, 5}], r"seq_id\[1\].*5"),
    "seq_str_in_set": ([1], [{"a"}], r"seq_id\[0\]"),
    "seq_mixed_in_set": ([1], [{0, "a"}], r"seq_id\[0\]"),
    "seq_float_in_set": ([1], [{0.5}], "seq_id"),
}


@pytest.mark.parametrize("case", BAD_FIND_SLOT)
def test_robust_find_slot_refuses(cache: Any, case: str) -> None:
    pos, seq_id, message = BAD_FIND_SLOT[case]
    before = seen(cache)
    with pytest.raises(WRONG, match=message):
        cache.find_slot(pos=pos, seq_id=seq_id)
    assert seen(cache) == before
    goes_on(cache)


def test_robust_find_slot_of_more_than_there_is_gives_none(cache: Any) -> None:
    before = seen(cache)
    assert cache.find_slot(pos=range(100_000), seq_id=[0] * 100_000) is None
    assert seen(cache) == before
    goes_on(cache)


BAD_LAYER: dict[str, tuple[Any, str]] = {
    "negative": (-1, "layer.*-1"),
    "one_too_large": (LAYERS, f"layer.*{LAYERS}"),
    "beyond_32_bits": (2**32, "layer.*4294967296"),
    "beyond_64_bits": (2**70, "layer"),
    "float": (1.0, "layer.*float"),
    "bool": (True, "layer.*bool"),
    "str": ("0", "layer.*str"),
    "none": (None, "layer"),
}


@pytest.mark.parametrize("case", BAD_LAYER)
@pytest.mark.parametrize("method", ["store", "attend", "keys", "values"])
def test_robust_layer_out_of_range(cache: Any, method: str, case: str) -> None:
    layer, message = BAD_LAYER[case]
    cache.find_slot(pos=[20, 21, 22], seq_id=[0] * N)
    cache.store(0, f32(CHKV, N, CD), f32(CHKV, N, CDV))
    call: Callable[[], Any] = {
        "store": lambda: cache.store(layer, f32(CHKV, N, CD), f32(CHKV, N, CDV)),
        "attend": lambda: cache.attend(layer, f32(CHQ, N, CD)),
        "keys": lambda: cache.keys(layer, 0),
        "values": lambda: cache.values(layer, 0),
    }[method]
    before = seen(cache)
    with pytest.raises(WRONG, match=message):
        call()
    assert seen(cache) == before
    cache.restore()
    goes_on(cache)


BAD_STORE: dict[str, tuple[dict[str, Any], str]] = {
    "k_tokens": ({"k": f32(CHKV, N + 1, CD)}, "k.*4"),
    "k_one_token": ({"k": f32(CHKV, 1, CD)}, "k.*1"),
    "k_heads": ({"k": f32(CHKV + 1, N, CD)}, "k.*3"),
    "k_dim": ({"k": f32(CHKV, N, CD * 2)}, "k.*64"),
    "k_axes": ({"k": f32(1, CHKV, N, CD)}, "k"),
    "k_2d": ({"k": f32(N, CD)}, "k"),
    "k_float64": ({"k": f32(CHKV, N, CD).astype(np.float64)}, "k.*float64"),
    "k_q4_0": ({"k": np.zeros((CHKV, N, 18), np.uint8)}, "k.*uint8"),
    "k_none": ({"k": None}, "k"),
    "k_list": ({"k": f32(CHKV, N, CD).tolist()}, "k.*list"),
    "k_empty": ({"k": f32(CHKV, 0, CD)}, "k.*0"),
    "v_dim": ({"v": f32(CHKV, N, CD)}, "v.*32"),
    "v_tokens": ({"v": f32(CHKV, N - 1, CDV)}, "v.*2"),
    "v_heads": ({"v": f32(1, N, CDV)}, "v.*1"),
    "v_int": ({"v": np.ones((CHKV, N, CDV), np.int8)}, "v.*int8"),
    "v_none": ({"v": None}, "v"),
}


@pytest.mark.parametrize("case", BAD_STORE)
def test_robust_store_refuses(cache: Any, case: str) -> None:
    changed, message = BAD_STORE[case]
    cache.find_slot(pos=[20, 21, 22], seq_id=[0] * N)
    rows = {"k": f32(CHKV, N, CD), "v": f32(CHKV, N, CDV)}
    for layer in range(LAYERS):
        cache.store(layer, **rows)
    before = seen(cache)
    with pytest.raises(WRONG, match=message):
        cache.store(1, **{**rows, **changed})
    assert seen(cache) == before
    cache.attend(1, f32(CHQ, N, CD))
    cache.commit()
    assert np.all(cache.keys(1, 0)[:, -N:] == 1)
    assert np.all(cache.values(1, 0)[:, -N:] == 1)


BAD_ATTEND: dict[str, tuple[dict[str, Any], str]] = {
    "q_tokens": ({"q": f32(CHQ, N + 1, CD)}, "q.*4"),
    "q_no_tokens": ({"q": f32(CHQ, 0, CD)}, "q.*0"),
    "q_heads": ({"q": f32(CHQ + 1, N, CD)}, "5"),
    "q_no_heads": ({"q": f32(0, N, CD)}, "0"),
    "q_dim": ({"q": f32(CHQ, N, CD + 1)}, "q.*33"),
    "q_axes": ({"q": f32(1, CHQ, N, CD)}, "q"),
    "q_float64": ({"q": f32(CHQ, N, CD).astype(np.float64)}, "q.*float64"),
    "q_none": ({"q": None}, "q"),
    "sm_scale": ({"sm_scale": float("nan")}, "sm_scale.*nan"),
    "sm_scale_str": ({"sm_scale": "x"}, "sm_scale"),
    "soft_cap": ({"logits_soft_cap": -2.0}, "logits_soft_cap.*-2"),
    "soft_cap_inf": ({"logits_soft_cap": float("inf")}, "logits_soft_cap.*inf"),
    "soft_cap_none": ({"logits_soft_cap": None}, "logits_soft_cap"),
    "soft_cap_str": ({"logits_soft_cap": ""}, "logits_soft_cap"),
    "window": ({"window_left": -2}, "window_left.*-2"),
    "window_float": ({"window_left": 2.5}, "window_left"),
    "soft_cap_below_f32": ({"logits_soft_cap": 1e-46}, "logits_soft_cap.*1e-46"),
    "alibi": ({"alibi_slopes": f32(3)}, "alibi_slopes.*3"),
    "sinks": ({"sinks": f32(CHQ, 1)}, "sinks"),
    "out_shape": ({"out": f32(CHQ, N, CD)}, "out"),
    "out_dtype": ({"out": np.ones((CHQ, N, CDV), np.float16)}, "out.*float16"),
    "out_read_only": ({"out": np.broadcast_to(np.float32(1), (CHQ, N, CDV))}, "out"),
    "threads": ({"threads": 0}, "threads.*0"),
}


@pytest.mark.parametrize("case", BAD_ATTEND)
def test_robust_attend_refuses(cache: Any, case: str) -> None:
    changed, message = BAD_ATTEND[case]
    cache.find_slot(pos=[20, 21, 22], seq_id=[0] * N)
    cache.store(0, f32(CHKV, N, CD), f32(CHKV, N, CDV))
    want, before = cache.attend(0, f32(CHQ, N, CD)), seen(cache)
    arguments = {"q": f32(CHQ, N, CD), **changed}
    out = arguments.get("out")
    with pytest.raises(WRONG, match=message):
        cache.attend(0, arguments.pop("q"), **arguments)
    assert out is None or np.all(out == 1)
    assert seen(cache) == before
    np.testing.assert_array_equal(cache.attend(0, f32(CHQ, N, CD)), want)


BAD_SEQ: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "rm_too_large": ("seq_rm", (3,), "seq.*3"),
    "rm_huge": ("seq_rm", (2**40,), "seq.*1099511627776"),
    "rm_float": ("seq_rm", (0.0,), "seq"),
    "rm_p0_float": ("seq_rm", (0, 1.5), "p0"),
    "rm_p1_str": ("seq_rm", (0, 1, "2"), "p1"),
    "rm_p1_beyond_64_bits": ("seq_rm", (0, 1, 2**70), "p1"),
    "cp_src": ("seq_cp", (-1, 0), "src.*-1"),
    "cp_src_too_large": ("seq_cp", (3, 0), "src.*3"),
    "cp_dst": ("seq_cp", (0, 3), "dst.*3"),
    "cp_dst_negative": ("seq_cp", (0, -2), "dst.*-2"),
    "keep_negative": ("seq_keep", (-1,), "seq.*-1"),
    "keep_too_large": ("seq_keep", (3,), "seq.*3"),
    "add_seq": ("seq_add", (-1, 0, -1, 1), "seq.*-1"),
    "add_seq_too_large": ("seq_add", (3, 0, -1, 1), "seq.*3"),
    "add_delta": ("seq_add", (0, 0, -1, 2**31 - 9), "delta.*2147483639"),
    "add_delta_beyond_64_bits": ("seq_add", (0, 0, -1, 2**70), "delta"),
    "add_delta_float": ("seq_add", (0, 0, -1, 1.0), "delta"),
    "div_seq": ("seq_div", (3, 0, -1, 2), "seq.*3"),
    "div_0": ("seq_div", (0, 0, -1, 0), "d.*0"),
    "div_negative": ("seq_div", (0, 0, -1, -2), "d.*-2"),
    "div_none": ("seq_div", (0, 0, -1, None), "d "),
    "gather_too_many": ("seq_gather", ([0] * 4,), "sources.*4"),
    "gather_too_large": ("seq_gather", ([0, 3],), r"sources\[1\].*3"),
    "gather_negative": ("seq_gather", ([-1],), r"sources\[0\].*-1"),
    "gather_float": ("seq_gather", ([0.0],), "sources"),
    "gather_scalar": ("seq_gather", (0,), "sources"),
    "pos_min_negative": ("seq_pos_min", (-1,), "seq.*-1"),
    "pos_max_too_large": ("seq_pos_max", (3,), "seq.*3"),
    "positions_too_large": ("positions", (3,), "seq.*3"),
    "positions_none": ("positions", (None,), "seq"),
    "tiers_negative": ("tiers", (-1,), "seq.*-1"),
    "keys_seq": ("keys", (0, 3), "seq.*3"),
    "values_seq": ("values", (0, -1), "seq.*-1"),
}


@pytest.mark.parametrize("case", BAD_SEQ)
def test_robust_sequences_refuse(cache: Any, case: str) -> None:
    method, arguments, message = BAD_SEQ[case]
    before = seen(cache)
    with pytest.raises(WRONG, match=message):
        getattr(cache, method)(*arguments)
    assert seen(cache) == before
    goes_on(cache)


BAD_APPEND: dict[str, tuple[dict[str, Any], str]] = {
    "ks_none": ({"ks": None}, "ks"),
    "ks_one_layer": ({"ks": [f32(CHKV, 1, CD)]}, "ks.*2.*1"),
    "vs_three_layers": ({"vs": [f32(CHKV, 1, CDV)] * 3}, "vs.*2.*3"),
    "ks_rows": ({"ks": [f32(CHKV, 2, CD)] * 2}, "k.*2"),
    "ks_rows_of_none": ({"ks": [None] * 2}, "k"),
    "pos": ({"pos": [-1]}, r"pos\[0\].*-1"),
    "pos_scalar": ({"pos": 5}, "pos"),
    "seq_id": ({"seq_id": [7]}, r"seq_id\[0\].*7"),
    "seq_id_scalar": ({"seq_id": 0}, "seq_id"),
}


@pytest.mark.parametrize("case", BAD_APPEND)
def test_robust_append_refuses(cache: Any, case: str) -> None:
    changed, message = BAD_APPEND[case]
    right = {
        "pos": [20],
        "seq_id": [0],
        "ks": [f32(CHKV, 1, CD)] * LAYERS,
        "vs": [f32(CHKV, 1, CDV)] * LAYERS,
    }
    before = seen(cache)
    with pytest.raises(WRONG, match=message):
        cache.append(**{**right, **changed})
    assert seen(cache) == before
    goes_on(cache)


def test_robust_out_of_order_calls_in_every_sequence(cache: Any) -> None:
    """All sequences of four calls: each works or raises ValueError, and the cache lives on."""
    k, v, q = f32(CHKV, 1, CD), f32(CHKV, 1, CDV), f32(CHQ, 1, CD)
    calls: dict[str, Callable[[], Any]] = {
        "find": lambda: cache.find_slot(pos=[30], seq_id=[2]),
        "store": lambda: cache.store(0, k, v),
        "attend": lambda: cache.attend(0, q),
        "commit": cache.commit,
        "restore": cache.restore,
        "rm": lambda: cache.seq_rm(2),
    }
    for names in itertools.product(calls, repeat=4):
        pending = stored = False
        for name in names:
            legal = {
                "find": not pending,
                "store": pending,
                "attend": stored,
                "commit": pending,
                "restore": pending,
                "rm": not pending,
            }[name]
            if legal:
                calls[name]()
            else:
                with pytest.raises(ValueError, match=r"slot|stored"):
                    calls[name]()
            if legal and name in ("find", "commit", "restore"):
                pending, stored = name == "find", False
            stored = stored or (legal and name == "store")
        if pending:
            cache.restore()
        cache.seq_rm(2)
    goes_on(cache)


def test_robust_calls_keep_no_references(cache: Any) -> None:
    """Neither those that work nor those that are refused."""
    q, k, v = f32(HQ, LQ, D), f32(HKV, LKV, D), f32(HKV, LKV, DV)
    out, mask = f32(HQ, LQ, DV), f32(LQ, LKV)
    rows = f32(CHKV, 1, CD), f32(CHKV, 1, CDV)
    arrays = (q, k, v, out, mask, *rows)
    before = [sys.getrefcount(x) for x in arrays]
    for _ in range(50):
        mkv.attention(q, k, v, mask=mask, out=out)
        mkv.merge_state(out, out[..., 0], out, out[..., 0])
        mkv.quantize_q4_0(q)
        with pytest.raises(WRONG):
            mkv.attention(q, k, v[:, :2], mask=mask, out=out)
        with pytest.raises(WRONG):
            cache.find_slot(pos=[1], seq_id=[9])
        cache.find_slot(pos=[20], seq_id=[0])
        cache.store(0, *rows)
        with pytest.raises(WRONG):
            cache.store(1, rows[1], rows[0])
        cache.restore()
    assert [sys.getrefcount(x) for x in arrays] == before


def test_robust_object_that_was_not_initialised() -> None:
    """__new__ without __init__: an exception, not a crash."""
    for cls in (mkv.MixedKVCache, mkv.UnifiedKVCache, mkv.AttentionState):
        bare = cls.__new__(cls)
        for name in ("stats", "commit", "reset", "finalize", "__len__", "__repr__"):
            if hasattr(cls, name) and name != "__repr__":
                with pytest.raises(AttributeError):
                    getattr(bare, name)()


def test_robust_failed_init_then_use() -> None:
    cache = mkv.MixedKVCache(num_layers=1, num_kv_heads=1, head_dim=32)
    with pytest.raises(ValueError, match="num_layers"):
        cache.__init__(num_layers=0, num_kv_heads=1, head_dim=32)  # type: ignore[misc]
    with contextlib.suppress(ValueError, AttributeError):  # either is fine
        cache.append([0], [0], [f32(1, 1, 32)], [f32(1, 1, 32)])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_robust_deep_copies_share_no_cells(cache: Any, how: str) -> None:
    """Refused, or a real copy."""
    before = seen(cache)
    try:
        other = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
    except TypeError:
        return
    other.clear()
    assert seen(cache) == before
