"""Wrong use of everything public: a clear exception that names argument and value, and nothing
changed. Each case runs on an object that is used again afterwards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import normal

B, HQ, HKV, LQ, LKV, D, DV = 2, 6, 3, 4, 11, 32, 64
WRONG = (ValueError, TypeError)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def refused(call: Callable[[], Any]) -> str:
    """The message of the ValueError that a call raises; empty where it is taken."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


# --- attention ------------------------------------------------------------------------------------

Q, K, V = f32(B, HQ, LQ, D), f32(B, HKV, LKV, D), f32(B, HKV, LKV, DV)

# what is passed instead, and what the message must say
BAD_ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "q_float64": ({"q": Q.astype(np.float64)}, "q.*float64"),
    "q_int": ({"q": Q.astype(np.int32)}, "q.*int32"),
    "q_uint8": ({"q": np.zeros((B, HQ, LQ, 18), np.uint8)}, "q.*uint8"),
    "q_complex": ({"q": Q.astype(np.complex64)}, "q.*complex64"),
    "q_object": ({"q": Q.astype(object)}, "q.*object"),
    "q_other_byte_order": ({"q": Q.astype(">f4")}, "q"),
    "q_list": ({"q": Q.tolist()}, "q.*list"),
    "q_none": ({"q": None}, "q.*None"),
    "q_2d": ({"q": Q[0, 0]}, r"q.*\(4, 32\)"),
    "q_5d": ({"q": Q[None]}, "q"),
    "q_no_dim": ({"q": Q[..., :0]}, "0"),
    "q_no_heads": ({"q": Q[:, :0]}, "0"),
    "q_heads_no_multiple": ({"q": Q[:, :4]}, "(?s)4.*3|3.*4"),
    "q_fewer_heads_than_kv": ({"q": Q[:, :1]}, "(?s)1.*3|3.*1"),
    "q_other_dim": ({"q": Q[..., :31]}, "31"),
    "q_other_batch": ({"q": Q[:1]}, "(?s)1.*2|2.*1"),
    "q_without_batch": ({"q": Q[0]}, "q"),
    "k_float64": ({"k": K.astype(np.float64)}, "k.*float64"),
    "k_int8": ({"k": K.astype(np.int8)}, "k.*int8"),
    "k_bool": ({"k": K.astype(bool)}, "k.*bool"),
    "k_none": ({"k": None}, "k.*None"),
    "k_without_batch": ({"k": K[0]}, "k"),
    "k_other_dim": ({"k": K[..., :16]}, "k.*32.*16|k.*16.*32"),
    "k_other_len": ({"k": K[:, :, :5]}, "(?s)11.*5|5.*11"),
    "k_other_heads": ({"k": K[:, :1]}, "(?s)1.*3|3.*1"),
    "k_no_heads": ({"k": K[:, :0], "v": V[:, :0]}, "0"),
    "k_q4_0_of_17_bytes": ({"k": np.zeros((B, HKV, LKV, 17), np.uint8)}, "k.*17"),
    "k_q4_0_of_two_blocks": ({"k": np.zeros((B, HKV, LKV, 36), np.uint8)}, "k.*64|k.*36"),
    "v_float64": ({"v": V.astype(np.float64)}, "v.*float64"),
    "v_other_len": ({"v": V[:, :, :10]}, "v.*10"),
    "v_other_heads": ({"v": V[:, :2]}, "v.*2"),
    "v_no_dim": ({"v": V[..., :0]}, "0"),
    "v_q4_0_of_19_bytes": ({"v": np.zeros((B, HKV, LKV, 19), np.uint8)}, "v.*19"),
    "v_other_batch": ({"v": np.repeat(V, 2, axis=0)}, "v.*2.*4"),
    "sm_scale_str": ({"sm_scale": "1"}, "sm_scale"),
    "sm_scale_nan": ({"sm_scale": float("nan")}, "sm_scale.*nan"),
    "sm_scale_inf": ({"sm_scale": float("inf")}, "sm_scale.*inf"),
    "sm_scale_beyond_f32": ({"sm_scale": 1e300}, "sm_scale.*1e\\+?300"),
    "causal_str": ({"causal": "yes"}, "causal.*str"),
    "mask_float64": ({"mask": np.zeros((LQ, LKV))}, "mask.*float64"),
    "mask_int": ({"mask": np.zeros((LQ, LKV), np.int64)}, "mask.*int64"),
    "mask_uint8": ({"mask": np.zeros((LQ, LKV), np.uint8)}, "mask.*uint8"),
    "mask_shape": ({"mask": f32(LQ, LKV + 1)}, r"mask.*\(4, 12\)"),
    "mask_heads": ({"mask": f32(HKV, LQ, LKV)}, r"mask.*\(3, 4, 11\)"),
    "mask_5d": ({"mask": f32(1, B, HQ, LQ, LKV)}, "mask"),
    "mask_list": ({"mask": [[0.0] * LKV] * LQ}, "mask.*list"),
    "window_negative": ({"window_left": -2}, "window_left.*-2"),
    "window_float": ({"window_left": 1.5}, "window_left"),
    "window_bool": ({"window_left": True}, "window_left"),
    "window_huge": ({"window_left": 2**70}, "window_left"),
    "window_none": ({"window_left": None}, "window_left"),
    "window_right_negative": ({"window_right": -2}, "window_right.*-2"),
    "window_right_float": ({"window_right": 1.5}, "window_right"),
    "window_right_huge": ({"window_right": 2**70}, "window_right"),
    "soft_cap_negative": ({"logits_soft_cap": -1.0}, "logits_soft_cap.*-1"),
    "soft_cap_nan": ({"logits_soft_cap": float("nan")}, "logits_soft_cap.*nan"),
    "soft_cap_none": ({"logits_soft_cap": None}, "logits_soft_cap"),
    "soft_cap_below_f32": ({"logits_soft_cap": 1e-46}, "logits_soft_cap.*1e-46"),
    "soft_cap_below_normal": ({"logits_soft_cap": 1e-40}, "logits_soft_cap.*1e-40"),
    "alibi_shape": ({"alibi_slopes": f32(HQ + 1)}, r"alibi_slopes.*7"),
    "alibi_2d": ({"alibi_slopes": f32(1, HQ)}, "alibi_slopes"),
    "alibi_int": ({"alibi_slopes": np.ones(HQ, np.int32)}, "alibi_slopes.*int32"),
    "sinks_shape": ({"sinks": f32(HKV)}, "sinks.*3"),
    "sinks_float64": ({"sinks": np.ones(HQ)}, "sinks.*float64"),
    "layout": ({"layout": "BHND"}, "layout.*BHND"),
    "layout_none": ({"layout": None}, "layout.*None"),
    "out_shape": ({"out": f32(B, HQ, LQ, D)}, r"out.*\(2, 6, 4, 64\)"),
    "out_f16": ({"out": np.ones((B, HQ, LQ, DV), np.float16)}, "out.*float16"),
    "out_read_only": ({"out": np.broadcast_to(np.float32(1), (B, HQ, LQ, DV))}, "out"),
    "out_list": ({"out": []}, "out"),
    "threads_0": ({"threads": 0}, "threads.*0"),
    "threads_negative": ({"threads": -3}, "threads.*-3"),
    "threads_huge": ({"threads": 10**9}, "threads.*1000000000"),
    "threads_float": ({"threads": 2.0}, "threads.*float"),
    "threads_bool": ({"threads": True}, "threads.*bool"),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_robust_attention_refuses(case: str) -> None:
    changed, message = BAD_ATTENTION[case]
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": V, **changed}
    out = arguments.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(WRONG, match=f"(?s){message}"):
        mkv.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    if before is not None:
        np.testing.assert_array_equal(out, before)


# The same cases for a segment; what attention() alone takes is left out.
ATTENTION_ONLY = ("layout", "sinks", "out")
BAD_UPDATE = {
    name: case
    for name, case in BAD_ATTENTION.items()
    if not name.startswith(ATTENTION_ONLY) and not set(case[0]) & set(ATTENTION_ONLY)
} | {
    "q_start_float": ({"q_start": 1.0}, "q_start"),
    "q_start_huge": ({"q_start": 2**70, "kv_start": 0}, "q_start"),
    "kv_start_str": ({"kv_start": "0"}, "kv_start"),
    "causal_without_positions": ({"causal": True}, "q_start"),
    "other_qo_len": ({"q": Q[:, :, :3]}, "(?s)4.*3|3.*4"),
    "other_head_dim_v": ({"v": V[..., :32]}, "(?s)64.*32|32.*64"),
}


@pytest.mark.parametrize("case", BAD_UPDATE)
def test_robust_update_refuses_and_leaves_the_state(case: str) -> None:
    changed, message = BAD_UPDATE[case]
    state = mkv.AttentionState(num_qo_heads=HQ, qo_len=LQ, head_dim=DV, batch=B)
    state.update(Q, K, V)
    before = [np.array(x) for x in (state.M, state.S, state.acc)]
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": V, **changed}
    with pytest.raises(WRONG, match=f"(?s){message}"):
        state.update(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for x, y in zip((state.M, state.S, state.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


BAD_FINALIZE: dict[str, tuple[dict[str, Any], str]] = {
    "sinks_shape": ({"sinks": f32(HKV)}, "sinks.*3"),
    "sinks_int": ({"sinks": np.ones(HQ, np.int32)}, "sinks.*int32"),
    "out_shape": ({"out": f32(B, HQ, LQ, D)}, "out"),
    "out_dtype": ({"out": np.zeros((B, HQ, LQ, DV))}, "out.*float64"),
}


@pytest.mark.parametrize("case", BAD_FINALIZE)
def test_robust_finalize_refuses(case: str) -> None:
    options, message = BAD_FINALIZE[case]
    state = mkv.AttentionState(num_qo_heads=HQ, qo_len=LQ, head_dim=DV, batch=B)
    state.update(Q, K, V)
    with pytest.raises(WRONG, match=f"(?s){message}"):
        state.finalize(**options)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(Q, K, V))


@pytest.mark.parametrize("name", ["M", "S", "acc", "ms"])
def test_robust_state_views_cannot_be_replaced(name: str) -> None:
    """Assigning to the attribute must not leave the state with arrays of another size."""
    state = mkv.AttentionState(num_qo_heads=HQ, qo_len=LQ, head_dim=DV, batch=B)
    with pytest.raises(AttributeError):
        setattr(state, name, f32(3))
    state.update(Q, K, V)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(Q, K, V))


OVERLAP: dict[str, Callable[[np.ndarray], tuple[np.ndarray, ...]]] = {
    # out first, then q, k, v: all [H, L, D] of one size
    "out_is_q": lambda x: (x[0], x[0], x[1], x[2]),
    "out_is_k": lambda x: (x[1], x[0], x[1], x[2]),
    "out_is_v": lambda x: (x[2], x[0], x[1], x[2]),
    "out_shifted_in_q": lambda x: (x.reshape(-1, 50, 32)[1:5], x[0], x[1], x[2]),
}


@pytest.mark.parametrize("case", OVERLAP)
@pytest.mark.parametrize("threads", [1, 3])
def test_robust_overlapping_out_is_right_or_refused(
    rng: np.random.Generator, case: str, threads: int
) -> None:
    x = normal(rng, 3, 4, 50, 32)
    out, q, k, v = OVERLAP[case](x)
    want = mkv.attention(q.copy(), k.copy(), v.copy(), causal=True)
    before = x.copy()
    refusal = refused(lambda: mkv.attention(q, k, v, causal=True, out=out, threads=threads))
    if refusal:
        assert "out" in refusal
        np.testing.assert_array_equal(x, before)
    else:
        np.testing.assert_array_equal(out, want)


# What a call reads besides q, k and v, each in the memory of what it writes.
SHARED = ("mask", "alibi_slopes", "sinks")


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("threads", [1, 3])
def test_robust_out_that_shares_memory_with_an_option_is_refused(
    rng: np.random.Generator, name: str, threads: int
) -> None:
    """As a view in the midst of out, and one that ends where out begins, which is right."""
    q, k = normal(rng, 64, 20, 32), normal(rng, 8, 20, 32)
    size = 64 * 20 * 32
    memory = normal(rng, 2 * size)
    out = memory[:size].reshape(64, 20, 32)
    shape = (20, 20) if name == "mask" else (64,)
    n = int(np.prod(shape))
    before = memory.copy()
    for start in (0, size // 2, size - 1):
        option = memory[start : start + n].reshape(shape)
        with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
            mkv.attention(q, k, k, out=out, threads=threads, **{name: option})
        np.testing.assert_array_equal(memory, before)
    beside = memory[size : size + n].reshape(shape)
    want = mkv.attention(q, k, k, **{name: beside.copy()})
    np.testing.assert_array_equal(mkv.attention(q, k, k, out=out, **{name: beside}), want)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "alibi_slopes"])
@pytest.mark.parametrize("view", ["ms", "acc"])
def test_robust_update_of_a_view_of_the_state_is_refused(
    rng: np.random.Generator, name: str, view: str
) -> None:
    """st.acc and st.ms are writable views of what update writes."""
    heads, n, d = 4, 16, 32
    st = mkv.AttentionState(num_qo_heads=heads, qo_len=n, head_dim=d)
    arguments: dict[str, Any] = {x: normal(rng, 1, heads, n, d) for x in "qkv"}
    st.update(**arguments)
    shapes = {"mask": (1, 1, n, n), "alibi_slopes": (heads,)}
    shape = shapes.get(name, (1, heads, n, d))
    memory = getattr(st, view)
    if memory.size < int(np.prod(shape)):
        shape = (1, 1, 1, 1)  # of a mask, which broadcasts
        if name != "mask":
            pytest.skip("ms is too small to be that")
    before = st.ms.copy(), st.acc.copy()
    arguments[name] = memory.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    positions = {"q_start": 0, "kv_start": 0} if name == "alibi_slopes" else {}
    with pytest.raises(ValueError, match=f"{view} must not share memory with {name}"):
        st.update(**arguments, **positions)
    np.testing.assert_array_equal(st.ms, before[0])
    np.testing.assert_array_equal(st.acc, before[1])


def test_robust_finalize_into_memory_of_the_sinks_is_refused(rng: np.random.Generator) -> None:
    st = mkv.AttentionState(num_qo_heads=HQ, qo_len=LQ, head_dim=DV, batch=B)
    st.update(Q, K, V)
    out = normal(rng, B, HQ, LQ, DV)
    before = out.copy()
    with pytest.raises(ValueError, match="out must not share memory with sinks"):
        st.finalize(sinks=out.reshape(-1)[5 : 5 + HQ], out=out)
    np.testing.assert_array_equal(out, before)
    want = st.finalize(sinks=before.reshape(-1)[5 : 5 + HQ])
    np.testing.assert_array_equal(st.finalize(sinks=before.reshape(-1)[5 : 5 + HQ], out=out), want)


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


def test_robust_out_whose_rows_overlap_one_another_is_refused(rng: np.random.Generator) -> None:
    q = normal(rng, 4, 50, 32)
    out = np.lib.stride_tricks.as_strided(np.zeros(2000, np.float32), (4, 50, 32), (128, 4, 4))
    with pytest.raises(ValueError, match="out"):
        mkv.attention(q, q, q, out=out)


def test_robust_array_subclasses_are_arrays(rng: np.random.Generator, tmp_path: Path) -> None:
    q = normal(rng, HQ, LQ, D)
    want = mkv.attention(q, K[0], V[0])
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[:] = q
    np.testing.assert_array_equal(mkv.attention(mapped, K[0], V[0]), want)


@pytest.mark.parametrize("case", ["x", "rows_of_x", "b"])
def test_robust_overlapping_conversion_is_right_or_refused(
    rng: np.random.Generator, case: str
) -> None:
    """Rows are shorter after than before, so that writing in place would run over what is read."""
    if case == "b":
        memory = np.zeros((64, 32), np.float32)
        source = memory.view(np.uint8).reshape(-1)[-64 * 18 :].reshape(64, 18)
        source[:] = ref.quantize_q4_0(normal(rng, 64, 32))
        function: Callable[..., Any] = mkv.dequantize_q4_0
        target = memory
    else:
        source = normal(rng, 64, 32)
        function = mkv.quantize_q4_0
        bytes_of = source.view(np.uint8)
        target = bytes_of[:, :18] if case == "rows_of_x" else bytes_of.reshape(-1)[: 64 * 18]
        target = target.reshape(64, 18)
    want, before = function(source.copy()), source.copy()
    refusal = refused(lambda: function(source, out=target, threads=3))
    if refusal:
        assert "out" in refusal
        np.testing.assert_array_equal(source, before)
    else:
        np.testing.assert_array_equal(target, want)


@pytest.mark.torch
def test_robust_tensors_elsewhere_are_refused() -> None:
    torch = pytest.importorskip("torch")
    meta = torch.ones((HQ, LQ, D), device="meta")
    k, v = torch.from_numpy(K[0]), torch.from_numpy(V[0])
    with pytest.raises(WRONG, match=r"q.*meta"):
        mkv.attention(meta, k, v)
    with pytest.raises(WRONG, match="q"):
        mkv.attention(torch.ones((HQ, LQ, D)).to_sparse(), k, v)
    with pytest.raises(WRONG, match=r"q.*float64"):
        mkv.attention(torch.ones((HQ, LQ, D), dtype=torch.float64), k, v)
    with pytest.raises(WRONG, match="out"):
        mkv.attention(torch.ones((HQ, LQ, D)), k, v, out=torch.ones((HQ, LQ, DV), device="meta"))


@pytest.mark.parametrize("shape", list(itertools.product((0, 1), repeat=4)), ids=str)
def test_robust_empty_and_single_sizes(shape: tuple[int, ...]) -> None:
    """Every combination of 0 and 1 for B, Lq, Lkv and heads works or is refused by name."""
    b, qo_len, kv_len, heads = shape
    q, k, v = f32(b, heads, qo_len, 8), f32(b, heads, kv_len, 8), f32(b, heads, kv_len, 4)
    if heads == 0:
        with pytest.raises(ValueError, match="heads"):
            mkv.attention(q, k, v)
        return
    out, lse = mkv.attention(q, k, v, return_lse=True, causal=True)
    assert out.shape == (b, heads, qo_len, 4)
    assert lse.shape == (b, heads, qo_len)
    want, want_lse = ref.attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, want, rtol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


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


def test_robust_finalize_into_its_own_state_is_right_or_refused() -> None:
    state = mkv.AttentionState(num_qo_heads=HQ, qo_len=LQ, head_dim=DV, batch=B)
    state.update(Q, K, V)
    want = state.finalize()
    refusal = refused(lambda: state.finalize(out=state.acc))
    if refusal:
        assert "out" in refusal
    np.testing.assert_array_equal(state.finalize(), want)


# --- merge ----------------------------------------------------------------------------------------


BAD_MERGE: dict[str, tuple[Any, ...]] = {
    "out_b_shape": (f32(3, 4), f32(3), f32(3, 5), f32(3)),
    "lse_a_shape": (f32(3, 4), f32(4), f32(3, 4), f32(3)),
    "lse_b_shape": (f32(3, 4), f32(3), f32(3, 4), f32(3, 1)),
    "out_a_dtype": (f32(3, 4).astype(np.int32), f32(3), f32(3, 4), f32(3)),
    "lse_b_dtype": (f32(3, 4), f32(3), f32(3, 4), f32(3).astype(np.float64)),
    "out_a_none": (None, f32(3), f32(3, 4), f32(3)),
}


@pytest.mark.parametrize("case", BAD_MERGE)
def test_robust_merge_state_refuses(case: str) -> None:
    with pytest.raises(WRONG, match=case.rsplit("_", 1)[0]):
        mkv.merge_state(*BAD_MERGE[case])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (f32(0, 3, 4), f32(0, 3), "outs"),
        (f32(4), f32(), "outs|lses"),
        (f32(2, 3, 4), f32(3), "lses"),
        (f32(2, 3, 4), f32(2, 4), "lses"),
        (f32(2, 3, 4).astype(np.uint8), f32(2, 3), "outs"),
        ([f32(3, 4)], [f32(3)], "outs"),
    ],
    ids=["none", "1d", "lses_short", "lses_shape", "uint8", "lists"],
)
def test_robust_merge_states_refuses(outs: Any, lses: Any, message: str) -> None:
    with pytest.raises(WRONG, match=message):
        mkv.merge_states(outs, lses)


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
