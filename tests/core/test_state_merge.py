"""Merging: states with one another, and normalised results by their lse."""

from __future__ import annotations

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    F32_EPS,
    SPLIT_ABS,
    assert_close,
    assert_lse_close,
    normal,
    values_of,
)
from state_cases import (
    DV,
    LKV,
    LQ,
    close_states,
    make,
    new_state,
    same_state,
    state_of,
)

# --- merge ----------------------------------------------------------------------------------------


def three_states(rng: np.random.Generator) -> tuple[list[mkv.AttentionState], ref.State]:
    q, k, v = make(rng, "f16")
    whole = ref.State.of(q, values_of(k), values_of(v))
    cuts = [(0, 9), (9, 30), (30, LKV)]
    return [state_of(q, k[:, :, i:j], v[:, :, i:j]) for i, j in cuts], whole


def test_merge_gives_the_union(rng: np.random.Generator) -> None:
    states, whole = three_states(rng)
    before = [np.array(x) for s in states for x in (s.M, s.S, s.acc)]
    merged = mkv.merge(states)
    close_states(merged, whole)
    after = [x for s in states for x in (s.M, s.S, s.acc)]
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_merge_order_is_rounding(rng: np.random.Generator, order: tuple[int, ...]) -> None:
    states, whole = three_states(rng)
    close_states(mkv.merge([states[i] for i in order]), whole)


def test_merge_in_place_and_grouping(rng: np.random.Generator) -> None:
    (a, b, c), whole = three_states(rng)
    b.merge_(c)
    a.merge_(b)
    close_states(a, whole)


def test_merge_empty_is_neutral(rng: np.random.Generator) -> None:
    (a, *_), _ = three_states(rng)
    keep = [np.array(x) for x in (a.M, a.S, a.acc)]
    empty = new_state()
    empty.acc[...] = np.nan
    a.merge_(empty)
    for x, y in zip((a.M, a.S, a.acc), keep, strict=True):
        np.testing.assert_array_equal(x, y)
    empty.merge_(a)
    same_state(empty, a)
    same_state(mkv.merge([a]), a)
    garbage = new_state()
    garbage.acc[...] = np.nan
    both = mkv.merge([garbage, new_state(), garbage])
    assert np.all(np.isneginf(both.M))
    assert np.all(both.finalize() == 0)


def test_merge_rows_are_empty_one_by_one(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    left = np.zeros((LQ, LKV), bool)
    left[:2, :5] = True
    right = np.zeros((LQ, LKV), bool)
    right[1:4, 9:20] = True
    a, b = state_of(q, k, v, mask=left), state_of(q, k, v, mask=right)
    a.acc[:, :, 2:] = np.nan
    b.acc[:, :, 0] = np.nan
    b.acc[:, :, 4:] = np.nan
    out, lse = mkv.merge([a, b]).finalize(return_lse=True)
    want, want_lse = ref.attention(q, k, v, mask=left | right)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)


def test_merge_continues(rng: np.random.Generator) -> None:
    q, k, v = make(rng)
    merged = mkv.merge([state_of(q, k[:, :, i:j], v[:, :, i:j]) for i, j in ((0, 10), (10, 20))])
    merged.update(q, k[:, :, 20:], v[:, :, 20:])
    assert np.max(np.abs(merged.finalize() - mkv.attention(q, k, v))) < SPLIT_ABS


def test_merge_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="qo_len=6"):
        new_state().merge_(new_state(qo_len=LQ + 1))
    with pytest.raises(ValueError, match="head_dim=128"):
        mkv.merge([new_state(), new_state(head_dim=DV * 2)])
    with pytest.raises(ValueError, match="states"):
        mkv.merge([])
    with pytest.raises((TypeError, ValueError)):
        mkv.merge([new_state(), None])


def test_merge_with_itself_doubles_s(rng: np.random.Generator) -> None:
    st = state_of(*make(rng))
    before, out = np.array(st.S), st.finalize()
    st.merge_(st)
    np.testing.assert_allclose(st.S, 2 * before, rtol=2 * F32_EPS)
    np.testing.assert_allclose(st.finalize(), out, rtol=1e-5, atol=1e-6)


# --- merge_state, merge_states --------------------------------------------------------------------


def parts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three normalised results, and what they should merge to."""
    q, k, v = make(rng)
    pairs = [
        mkv.attention(q, k[:, :, i:j], v[:, :, i:j], return_lse=True)
        for i, j in ((0, 3), (3, 30), (30, LKV))
    ]
    want, want_lse = ref.attention(q, k, v)
    return np.stack([o for o, _ in pairs]), np.stack([s for _, s in pairs]), want, want_lse


def test_merge_states_gives_the_union(isa: str, rng: np.random.Generator) -> None:
    outs, lses, want, want_lse = parts(rng)
    out, lse = mkv.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    again, again_lse = ref.merge_states(outs, lses)
    assert_close(out, again)
    assert_lse_close(lse, again_lse)


def test_merge_state_of_two_is_merge_states(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    a = mkv.merge_state(outs[0], lses[0], outs[1], lses[1])
    b = mkv.merge_states(outs[:2], lses[:2])
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def test_merge_states_of_one_is_itself(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    out, lse = mkv.merge_states(outs[:1], lses[:1])
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])


def test_merge_states_empty_is_neutral_whatever_it_holds(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    lses[1, :, 2] = -np.inf
    outs[1, :, 2] = np.nan
    lses[:, 0, 0, 0] = -np.inf
    out, lse = mkv.merge_states(outs, lses)
    want, want_lse = ref.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    assert np.all(out[0, 0, 0] == 0)


@pytest.mark.parametrize("nothing", [-np.inf, np.inf], ids=["minus_inf", "plus_inf"])
@pytest.mark.parametrize("held", [0.0, 7.0, np.nan, np.inf], ids=str)
def test_merge_state_either_infinity_is_neutral(
    isa: str, rng: np.random.Generator, nothing: float, held: float
) -> None:
    """FlashAttention 2 and vLLM say +inf where this library says -inf."""
    out, lse = normal(rng, 5, 16), normal(rng, 5)
    empty, empty_lse = np.full((5, 16), held, np.float32), np.full(5, nothing, np.float32)
    for pair in ((out, lse, empty, empty_lse), (empty, empty_lse, out, lse)):
        got, got_lse = mkv.merge_state(*pair)
        np.testing.assert_array_equal(got, out)
        np.testing.assert_array_equal(got_lse, lse)
    for other in (-np.inf, np.inf):
        got, got_lse = mkv.merge_state(empty, empty_lse, empty, np.full(5, other, np.float32))
        np.testing.assert_array_equal(got, np.zeros((5, 16)))
        assert np.all(np.isneginf(got_lse))


def test_merge_states_of_many_with_both_infinities(isa: str, rng: np.random.Generator) -> None:
    outs, lses = normal(rng, 6, 4, 8), normal(rng, 6, 4)
    lses[[0, 2, 5], :3] = np.inf
    lses[[1, 2], 1:] = -np.inf
    outs[~np.isfinite(lses)] = np.nan
    out, lse = mkv.merge_states(outs, lses)
    want, want_lse = ref.merge_states(outs, lses)
    assert_close(out, want)
    assert_lse_close(lse, want_lse)
    used = [np.isfinite(lses[:, i]) for i in range(4)]
    by_hand = [np.log(np.exp(lses[u, i].astype(float)).sum()) for i, u in enumerate(used)]
    np.testing.assert_allclose(lse, by_hand, rtol=1e-6)


@pytest.mark.parametrize("other", [0.5, np.nan, np.inf, -np.inf], ids=str)
def test_merge_state_nan_stays_nan(isa: str, other: float) -> None:
    one, lse = np.ones((1, 8), np.float32), np.full(1, np.nan, np.float32)
    other_lse = np.full(1, other, np.float32)
    for pair in ((one, lse, one, other_lse), (one, other_lse, one, lse)):
        got, got_lse = mkv.merge_state(*pair)
        assert np.isnan(got).all()
        assert np.isnan(got_lse).all()


def test_merge_of_a_maximum_of_plus_infinity_is_nan(rng: np.random.Generator) -> None:
    """No update writes one: a logit of +inf makes the row NaN. Who writes one by hand gets NaN."""
    q, k, v = make(rng)
    whole, odd = state_of(q, k, v), state_of(q, k, v)
    odd.M[0, 0, 0] = np.inf
    for a, b in ((whole, odd), (odd, whole)):
        out, lse = a.copy().merge_(b).finalize(return_lse=True)
        assert np.isnan(out[0, 0, 0]).all()
        assert np.isnan(lse[0, 0, 0])
        assert np.isfinite(out[1]).all()


def test_merge_state_any_leading_shape(rng: np.random.Generator) -> None:
    for shape in ((4,), (3, 5), (2, 3, 4)):
        outs, lses = normal(rng, 2, *shape, 8), normal(rng, 2, *shape)
        out, lse = mkv.merge_state(outs[0], lses[0], outs[1], lses[1])
        want, want_lse = ref.merge_states(outs, lses)
        assert_close(out, want)
        assert_lse_close(lse, want_lse)


def test_merge_states_strided(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    want = mkv.merge_states(outs, lses)
    outs2 = np.ascontiguousarray(outs.transpose(0, 1, 3, 2, 4)).transpose(0, 1, 3, 2, 4)
    lses2 = np.ascontiguousarray(lses.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    got = mkv.merge_states(outs2, lses2)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.torch
def test_merge_states_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    outs, lses, _, _ = parts(rng)
    want, want_lse = mkv.merge_states(outs, lses)
    out, lse = mkv.merge_states(torch.from_numpy(outs), torch.from_numpy(lses))
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), want)
    np.testing.assert_array_equal(lse.numpy(), want_lse)


def test_merge_states_refuses_shapes_that_do_not_fit(rng: np.random.Generator) -> None:
    outs, lses, _, _ = parts(rng)
    with pytest.raises(ValueError, match="lses"):
        mkv.merge_states(outs, lses[:2])
    with pytest.raises(ValueError, match="outs"):
        mkv.merge_states(outs[:0], lses[:0])
    with pytest.raises(ValueError, match="out_b"):
        mkv.merge_state(outs[0], lses[0], outs[1, :1], lses[1, :1])
