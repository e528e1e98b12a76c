"""Carried state: its views and layout, finalizing, and refusals."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    SPLIT_ABS,
    assert_lse_close,
    normal,
    relative_error,
)
from state_cases import (
    DV,
    HQ,
    LKV,
    LQ,
    B,
    close_states,
    make,
    new_state,
    same_state,
    state_of,
)

# --- views and layout -----------------------------------------------------------------------------


def test_state_initial_values() -> None:
    st = new_state()
    assert st.M.shape == st.S.shape == (B, HQ, LQ)
    assert st.acc.shape == (B, HQ, LQ, DV)
    assert st.ms.shape == (B, HQ * LQ, 2)
    for x in (st.M, st.S, st.acc, st.ms):
        assert x.dtype == np.float32
    assert np.all(np.isneginf(st.M))
    assert np.all(st.S == 0)


def test_state_ms_layout(rng: np.random.Generator) -> None:
    """M first, then S; row index head * qo_len + position."""
    st = state_of(*make(rng))
    for b, h, i in np.ndindex(B, HQ, LQ):
        assert st.ms[b, h * LQ + i, 0] == st.M[b, h, i]
        assert st.ms[b, h * LQ + i, 1] == st.S[b, h, i]


def test_state_views_are_writable_and_shared(rng: np.random.Generator) -> None:
    st = new_state()
    st.M[1, 2, 3] = 5.0
    st.S[1, 2, 3] = 7.0
    np.testing.assert_array_equal(st.ms[1, 2 * LQ + 3], [5.0, 7.0])
    st.ms[0, 1 * LQ + 4] = [1.0, 2.0]
    assert st.M[0, 1, 4] == 1.0
    assert st.S[0, 1, 4] == 2.0
    st.acc[0, 1, 4] = 6.0
    out, lse = st.finalize(return_lse=True)
    np.testing.assert_array_equal(out[0, 1, 4], np.full(DV, 3.0))
    np.testing.assert_allclose(lse[0, 1, 4], 1.0 + np.log(2.0), rtol=1e-6)


def test_state_carried_by_hand_into_another(rng: np.random.Generator) -> None:
    """M, S and acc are all there is: written into a new state they continue."""
    q, k, v = make(rng)
    st = state_of(q, k[:, :, :20], v[:, :, :20])
    other = new_state()
    other.ms[...], other.acc[...] = st.ms, st.acc
    for x in (st, other):
        x.update(q, k[:, :, 20:], v[:, :, 20:])
    same_state(st, other)


def test_state_acc_is_unnormalised(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    close_states(state_of(q, k, v), ref.State.of(q, k, v))


def test_state_update_without_batch(rng: np.random.Generator) -> None:
    q, k, v = (x[:1] for x in make(rng))
    want, want_lse = mkv.attention(q, k, v, return_lse=True)
    st = new_state(batch=1)
    st.update(q[0], k[0], v[0])
    out, lse = st.finalize(return_lse=True)
    assert out.shape == (HQ, LQ, DV)
    assert lse.shape == (HQ, LQ)
    np.testing.assert_array_equal(out, want[0])
    st.update(q, k, v)
    assert st.finalize().shape == (1, HQ, LQ, DV)
    np.testing.assert_allclose(want_lse[0], lse)


def test_state_update_does_not_write_inputs(rng: np.random.Generator) -> None:
    arrays = make(rng)
    for x in arrays:
        x.flags.writeable = False
    state_of(*arrays)


def test_state_threads_same_bits(rng: np.random.Generator, kv_type: str) -> None:
    q, k, v = make(rng, kv_type)
    one = state_of(q, k, v, threads=1)
    for threads in (2, 5):
        same_state(state_of(q, k, v, threads=threads), one)


# --- finalize -------------------------------------------------------------------------------------


def test_state_finalize_before_any_update_gives_zeros() -> None:
    out, lse = new_state().finalize(return_lse=True)
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    assert out.shape == (B, HQ, LQ, DV)
    assert np.all(out == 0)
    assert lse.shape == (B, HQ, LQ)
    assert np.all(np.isneginf(lse))


def test_state_finalize_twice_gives_the_same_and_keeps_state(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    a = st.finalize(sinks=normal(rng, HQ))
    b = st.finalize()
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(b, mkv.attention(q, k, v))
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_state_sinks_enter_once(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st, want = new_state(), ref.State.empty(B, HQ, LQ, DV)
    for i in range(0, LKV, 10):
        st.update(q, k[:, :, i : i + 10], v[:, :, i : i + 10])
        want.update(q, k[:, :, i : i + 10], v[:, :, i : i + 10])
    for shift in (-80.0, 0.0, 80.0):
        sinks = normal(rng, HQ) + np.float32(shift)
        out, lse = st.finalize(sinks=sinks, return_lse=True)
        want_out, want_lse = want.finalize(sinks)
        np.testing.assert_allclose(out, want_out, atol=SPLIT_ABS)
        assert_lse_close(lse, want_lse)


def test_state_sinks_of_empty_rows_change_nothing(rng: np.random.Generator) -> None:
    out, lse = new_state().finalize(sinks=normal(rng, HQ), return_lse=True)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_state_finalize_into_out(rng: np.random.Generator) -> None:
    st = state_of(*make(rng))
    out = np.full((B, HQ, LQ, DV), np.nan, np.float32)
    assert st.finalize(out=out) is out
    np.testing.assert_array_equal(out, st.finalize())


def test_state_reset(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    st.reset()
    assert np.all(np.isneginf(st.M))
    assert np.all(st.S == 0)
    st.update(q, k, v)
    np.testing.assert_array_equal(st.finalize(), mkv.attention(q, k, v))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_state_gives_what_q_was(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in make(rng))
    st = new_state()
    st.update(q, k, v)
    out, lse = st.finalize(return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    want, _ = ref.attention(*(x.double().numpy() for x in (q, k, v)))
    assert relative_error(out.float().numpy(), want) <= max(float(torch.finfo(dtype).eps), 1e-6)
    assert isinstance(lse, torch.Tensor)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_left": 3},
        {"window_right": 3},
        {"alibi_slopes": np.ones(HQ, np.float32)},
        {"alibi_slopes": np.ones(HQ, np.float32), "mask": np.ones((LQ, LKV), bool)},
    ],
    ids=["causal", "window", "window_right", "alibi", "alibi_mask_bool"],
)
@pytest.mark.parametrize("given", [{}, {"q_start": 3}, {"kv_start": 0}], ids=["none", "q", "kv"])
def test_state_update_requires_positions(
    rng: np.random.Generator, options: dict[str, Any], given: dict[str, int]
) -> None:
    q, k, v = make(rng)
    st = state_of(q, k, v)
    before = [np.array(x) for x in (st.M, st.S, st.acc)]
    with pytest.raises(ValueError, match="kv_start" if "q_start" in given else "q_start"):
        st.update(q, k, v, **options, **given)
    for x, y in zip((st.M, st.S, st.acc), before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("field", ["num_qo_heads", "qo_len", "head_dim", "batch"])
@pytest.mark.parametrize("value", [-1, 1 << 60, 2.5, "3"], ids=str)
def test_state_refuses_bad_sizes(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError, MemoryError, OverflowError)):
        new_state(**{field: value})


def test_state_update_refuses_other_shapes(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    st = new_state()
    for bad in (
        (q[:1], k, v),
        (q[:, :3], k, v),
        (q[:, :, :2], k, v),
        (q[..., :16], k, v),
        (q, k, v[..., :32]),
        (q, np.repeat(k, 2, axis=0), v),
    ):
        with pytest.raises(ValueError, match=r"q|k|v"):
            st.update(*bad)
    assert np.all(np.isneginf(st.M))
