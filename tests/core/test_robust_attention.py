"""Wrong use of attention, carried state and merging: a clear exception that names argument and
value, and nothing changed. Each case runs on an object that is used again afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import normal
from refusal_cases import DV, HKV, HQ, LKV, LQ, WRONG, B, D, f32, refused

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
