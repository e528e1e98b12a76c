"""attention(): sizes, types, layouts and threads against the float64 reference, on every ISA."""

from __future__ import annotations

from collections.abc import Callable

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from attention_cases import HEAD_DIMS, SIZES, check, make
from conftest import (
    DEBUG_ABS,
    KV_TYPES,
    as_kind,
    relative_error,
    tolerance,
    values_of,
)

# --- the debug case -------------------------------------------------------------------------------

DEBUG_Q = np.array([[[1, 0, 0, 0]]], np.float32)
DEBUG_K = np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32)
DEBUG_V = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]]], np.float32)
DEBUG_OUT = np.array([[[2.510163, 3.510163, 4.510163, 5.510163]]])
DEBUG_M, DEBUG_S = 0.5, 1.606531


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_attention_debug_case(isa: str, kind: str) -> None:
    k, v = as_kind(DEBUG_K, kind), as_kind(DEBUG_V, kind)
    out, lse = mkv.attention(DEBUG_Q, k, v, sm_scale=0.5, return_lse=True)
    np.testing.assert_allclose(out, DEBUG_OUT, rtol=0, atol=DEBUG_ABS)
    np.testing.assert_allclose(lse, DEBUG_M + np.log(DEBUG_S), rtol=0, atol=DEBUG_ABS)


@pytest.mark.parametrize("keys", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "0", "1"])
def test_reference_debug_case(keys: slice) -> None:
    """The oracle itself, whole and in parts."""
    st = ref.State.empty(1, 1, 1, 4)
    parts = [slice(0, 2)] if keys == slice(0, 2) else [keys, slice(1 - keys.start, 2 - keys.start)]
    for part in parts:
        st.update(DEBUG_Q[None], DEBUG_K[None, :, part], DEBUG_V[None, :, part], sm_scale=0.5)
    np.testing.assert_allclose(st.finalize()[0][0], DEBUG_OUT, rtol=0, atol=5e-7)
    np.testing.assert_allclose([st.M.item(), st.S.item()], [DEBUG_M, DEBUG_S], atol=5e-7)


# --- sizes and types ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("k_kind", KV_TYPES)
@pytest.mark.parametrize("v_kind", KV_TYPES)
def test_attention_types(
    isa: str, rng: np.random.Generator, sizes: tuple[int, ...], k_kind: str, v_kind: str
) -> None:
    check(*make(rng, sizes, k_kind, v_kind), tolerance(k_kind, v_kind))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_attention_head_dims(isa: str, rng: np.random.Generator, head_dim: int, kind: str) -> None:
    for head_dim_v in (head_dim, HEAD_DIMS[HEAD_DIMS.index(head_dim) - 1]):
        check(*make(rng, (1, 6, 2, 3, 70, head_dim, head_dim_v), kind, kind), tolerance(kind))


@pytest.mark.parametrize("head_dim", range(1, 36))
def test_attention_odd_head_dims(isa: str, rng: np.random.Generator, head_dim: int) -> None:
    check(*make(rng, (1, 2, 1, 3, 19, head_dim, 36 - head_dim), "f16", "f16"), tolerance("f16"))


@pytest.mark.parametrize("head_dim", range(32, 513, 32))
def test_attention_q4_0_head_dims(isa: str, rng: np.random.Generator, head_dim: int) -> None:
    head_dim_v = 544 - head_dim
    check(*make(rng, (1, 4, 2, 3, 40, head_dim, head_dim_v), "q4_0", "q4_0"), tolerance("q4_0"))


@pytest.mark.parametrize("kv_len", [1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 255, 256, 257, 511, 1025])
def test_attention_kv_lens(isa: str, rng: np.random.Generator, kv_len: int, kv_type: str) -> None:
    sizes = (1, 4, 2, 3, kv_len, 32, 64)
    check(*make(rng, sizes, kv_type, kv_type), tolerance(kv_type), causal=kv_len > 3)


@pytest.mark.parametrize("qo_len", [1, 2, 4, 5, 15, 16, 17, 33, 64, 65])
def test_attention_qo_lens(isa: str, rng: np.random.Generator, qo_len: int, kv_type: str) -> None:
    sizes = (1, 3, 1, qo_len, 70, 64, 32)
    check(*make(rng, sizes, kv_type, kv_type), tolerance(kv_type), causal=True)


@pytest.mark.parametrize("q_dtype", ["f32", "f16"])
def test_attention_query_types(
    isa: str, rng: np.random.Generator, q_dtype: str, kv_type: str
) -> None:
    q, k, v = make(rng, SIZES["gqa_9_3"], kv_type, kv_type)
    check(as_kind(q, q_dtype), k, v, tolerance(kv_type))


def test_attention_q4_0_is_near_its_dequantised_values(isa: str, rng: np.random.Generator) -> None:
    """The bound of the semantics, on sizes of a real model and many keys."""
    q, k, v = make(rng, (1, 8, 2, 1, 4096, 128, 128), "q4_0", "q4_0")
    want, _ = ref.attention(q, values_of(k), values_of(v))
    assert relative_error(mkv.attention(q, k, v), want) <= 1e-3


# --- strides and layouts --------------------------------------------------------------------------

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # [B, H, L, D] values in another order in memory
    "token_major": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "dim_major": lambda x: np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
    "fortran": np.asfortranarray,
    "padded_rows": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
    "every_other_row": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
    "all_rows_one": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "batch_broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: (
        np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("size", ["one_query", "prefill"])
@pytest.mark.parametrize("view", VIEWS)
def test_attention_strided_inputs_same_bits(
    isa: str, rng: np.random.Generator, view: str, kv_type: str, size: str
) -> None:
    """Few query rows and many take different ways through the kernels."""
    q, k, v = make(rng, SIZES[size], kv_type, kv_type)
    q, k, v = VIEWS[view](q), VIEWS[view](k), VIEWS[view](v)
    want = mkv.attention(
        np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v), causal=True
    )
    np.testing.assert_array_equal(mkv.attention(q, k, v, causal=True), want)


def test_attention_nhd_is_hnd_transposed(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    want, want_lse = mkv.attention(q, k, v, causal=True, return_lse=True)
    nhd = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    out, lse = mkv.attention(*nhd, layout="NHD", causal=True, return_lse=True)
    assert out.shape == (2, 13, 6, 96)
    assert lse.shape == (2, 6, 13)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3), want)
    np.testing.assert_array_equal(lse, want_lse)
    out = mkv.attention(*(x[0] for x in nhd), layout="NHD", causal=True)
    np.testing.assert_array_equal(out.transpose(1, 0, 2), want[0])


def test_attention_leading_batch_left_out(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, (1, 6, 3, 13, 45, 32, 64), kv_type, kv_type)
    out, lse = mkv.attention(q[0], k[0], v[0], return_lse=True)
    assert out.shape == (6, 13, 64)
    assert lse.shape == (6, 13)
    want, want_lse = mkv.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want_lse[0])


def test_attention_batch_rows_are_independent(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, SIZES["prefill"], kv_type, kv_type)
    both = mkv.attention(q, k, v, causal=True)
    for b in range(2):
        np.testing.assert_array_equal(mkv.attention(q[b], k[b], v[b], causal=True), both[b])


def test_attention_out_is_filled_and_returned(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    want = mkv.attention(q, k, v)
    out = np.full(want.shape, np.nan, np.float32)
    assert mkv.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, want)
    got, lse = mkv.attention(q, k, v, out=out, return_lse=True)
    assert got is out
    assert lse.shape == want.shape[:3]


def test_attention_out_strided(rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"])
    whole = np.full((2, 13, 6, 100), 7, np.float32)
    mkv.attention(q, k, v, out=whole.transpose(0, 2, 1, 3)[..., :96])
    np.testing.assert_array_equal(whole[..., :96].transpose(0, 2, 1, 3), mkv.attention(q, k, v))
    assert np.all(whole[..., 96:] == 7)


def test_attention_leaves_inputs_alone(rng: np.random.Generator, kv_type: str) -> None:
    arrays = make(rng, SIZES["prefill"], kv_type, kv_type)
    for x in arrays:
        x.flags.writeable = False
    before = [x.copy() for x in arrays]
    mkv.attention(*arrays, causal=True)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kv_len", [0])
def test_attention_without_keys_gives_zeros(rng: np.random.Generator, kv_len: int) -> None:
    q, k, v = make(rng, (2, 4, 2, 3, kv_len, 32, 64))
    out, lse = mkv.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 3, 64)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_attention_without_queries_is_empty(rng: np.random.Generator) -> None:
    q, k, v = make(rng, (2, 4, 2, 0, 5, 32, 64))
    out, lse = mkv.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 0, 64)
    assert lse.shape == (2, 4, 0)


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 2, 1, 5000, 64, 64),
        (1, 3, 1, 1, 20_000, 32, 32),
        (2, 6, 3, 70, 300, 32, 96),
        (1, 8, 1, 33, 1500, 32, 64),
    ],
    ids=["decode", "decode_long_one_head", "prefill", "prefill_few_tiles_long_context"],
)
def test_attention_threads_same_bits(
    isa: str, rng: np.random.Generator, sizes: tuple[int, ...], kv_type: str
) -> None:
    q, k, v = make(rng, sizes, kv_type, kv_type)
    one, one_lse = mkv.attention(q, k, v, causal=True, return_lse=True, threads=1)
    for threads in (2, 5):
        out, lse = mkv.attention(q, k, v, causal=True, return_lse=True, threads=threads)
        np.testing.assert_array_equal(out, one)
        np.testing.assert_array_equal(lse, one_lse)


def test_attention_long_decode(isa: str, rng: np.random.Generator, kv_type: str) -> None:
    """Long enough to be cut into chunks and merged."""
    check(*make(rng, (1, 6, 2, 1, 9001, 32, 64), kv_type, kv_type), tolerance(kv_type))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_few_tiles_over_long_context(
    isa: str, rng: np.random.Generator, kv_type: str, causal: bool
) -> None:
    """Query rows make several tiles, but so few that their keys are cut as well."""
    q, k, v = make(rng, (1, 8, 1, 33, 1500, 32, 64), kv_type, kv_type)
    check(q, k, v, tolerance(kv_type), causal=causal)
    state = mkv.AttentionState(num_qo_heads=8, qo_len=33, head_dim=64)
    state.update(q, k, v, causal=causal, q_start=1500 - 33, kv_start=0)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(q, k, v, causal=causal))


# --- very many keys ------------------------------------------------------------------------------

MANY_KEYS_REL = 1e-5


def many_keys_error(
    num_heads: int, kv_len: int, qo_len: int, kind: str, first_logit: float
) -> float:
    """Largest relative error where one heavy key stands before one row repeated, V = 0.1.

    Equal terms are the worst case of a long sum: every addition is rounded to the same side.
    """
    k = np.zeros((1, 1, kv_len, 8), np.float16)
    v = np.full((1, 1, kv_len, 8), 0.1, np.float16)
    k[..., 0, 0], v[..., 0, :] = first_logit, 1.0
    q = np.zeros((1, num_heads, qo_len, 8), np.float32)
    q[..., 0] = 1.0
    heavy, rest = np.exp(np.float64(k[0, 0, 0, 0])), float(kv_len - 1)
    want = (heavy + rest * np.float64(v[0, 0, 1, 0])) / (heavy + rest)
    want_lse = np.log(heavy + rest)
    k, v = (np.broadcast_to(as_kind(x, kind), (1, num_heads, kv_len, 8)) for x in (k, v))
    out, lse = mkv.attention(q, k, v, sm_scale=1.0, return_lse=True)
    return float(max(np.abs(out / want - 1).max(), np.abs(lse - want_lse).max()))


@pytest.mark.parametrize("first_logit", [0.0, 11.0, 14.0])
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize(("num_heads", "qo_len"), [(1, 1), (64, 1), (2, 20)])
def test_attention_many_keys(
    isa: str, num_heads: int, qo_len: int, kind: str, first_logit: float
) -> None:
    assert many_keys_error(num_heads, 131072, qo_len, kind, first_logit) <= MANY_KEYS_REL


@pytest.mark.parametrize("num_heads", [1, 64])
def test_attention_a_million_keys(num_heads: int) -> None:
    assert many_keys_error(num_heads, 1 << 20, 1, "f16", 11.0) <= MANY_KEYS_REL
