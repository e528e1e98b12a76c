"""compute_type="bf16": prefill against float64, within bounds that follow from the roundings."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import F32_REL, KV_TYPES, as_kind, normal, relative_error, values_of

#: Largest relative error of rounding to bfloat16: half a unit of its last place, 8 bits in all.
U = 2.0**-8
#: Norm over norm, of data whose logits are standard normal: errors of four roundings (query, key,
#: weight, value) of U at most and about U / 2.5 on average add up as independent ones do.
BF16_REL = 2 * U

# (B, Hq, Hkv, Lq, Lkv, D, Dv)
SIZES = {
    "prefill": (2, 6, 3, 13, 45, 32, 96),
    "gqa": (1, 8, 2, 70, 333, 64, 32),
    "no_gqa": (1, 2, 2, 130, 130, 96, 64),
    "more_queries_than_keys": (1, 4, 2, 40, 5, 64, 32),
    "one_kv_head": (1, 12, 1, 9, 140, 64, 96),
}


@pytest.fixture
def bf16_isa(isa: str) -> str:
    """Every ISA that has arithmetic in bf16, forced while the test runs."""
    if "bf16" not in mkv.isa.compute_types():
        pytest.skip(f"{isa} has no arithmetic in bf16")
    return isa


def make(rng: np.random.Generator, sizes: tuple[int, ...], kind: str) -> tuple[np.ndarray, ...]:
    B, Hq, Hkv, Lq, Lkv, D, Dv = sizes
    q = normal(rng, B, Hq, Lq, D)
    k = as_kind(normal(rng, B, Hkv, Lkv, D), kind)
    return q, k, as_kind(normal(rng, B, Hkv, Lkv, Dv), kind)


def worst_case(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, sinks: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The largest errors that rounding can make, of out element by element and of lse.

    A logit is off by 2 U sm_scale sum |q_i k_i| (a soft cap only shrinks that), so that a weight w
    is off by E = exp(that) (1 + U) - 1, relatively, and a value by U:
    |out' - out| <= (sum w E |v - out| + U sum w (1 + E) |v|) / sum w (1 - E).
    """
    x, seen = ref.logits_of(q, k, **options)
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = 1 / np.sqrt(q.shape[-1])
    logit = (2 * U + U * U) * scale * np.einsum("bhqd,bhkd->bhqk", np.abs(q), np.abs(k))
    logit += 1e-5  # sums and exponentials in f32
    error = np.exp(logit) * (1 + U) - 1
    top = np.max(x, axis=-1, keepdims=True, initial=-1e30)
    w = np.where(seen, np.exp(x - top), 0.0)
    total = np.sum(w * (1 - error), axis=-1)
    if sinks is not None:
        total = total + np.exp(sinks[None, :, None] - top[..., 0])
    bound = np.empty_like(out)
    for i in range(out.shape[-1]):
        value = v[..., i][:, :, None, :]
        bound[..., i] = np.sum(w * error * np.abs(value - out[..., i, None]), axis=-1)
        bound[..., i] += U * np.sum(w * (1 + error) * np.abs(value), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        bound = np.where(total[..., None] > 0, bound / total[..., None], 0.0)
    lse = np.max(np.where(seen, logit, 0.0), axis=-1, initial=0.0) + 2 * U
    return bound + F32_REL * np.abs(v).max(), lse


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> None:
    wide = [values_of(x) for x in (q, k, v)]
    want, want_lse = ref.attention(*wide, **options)
    got, lse = mkv.attention(q, k, v, return_lse=True, compute_type="bf16", **options)
    assert relative_error(got, want) <= BF16_REL
    sinks = options.pop("sinks", None)
    bound, lse_bound = worst_case(*wide, want, sinks, **options)
    assert np.all(np.abs(got - want) <= bound)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    assert np.all(np.abs(lse[seen] - want_lse[seen]) <= lse_bound[seen])


def option(name: str, rng: np.random.Generator, sizes: tuple[int, ...]) -> dict[str, Any]:
    B, Hq, _, Lq, Lkv, _, _ = sizes
    seen = rng.random((B, Hq, Lq, Lkv)) < 0.7
    slopes = np.linspace(0.01, 0.2, Hq).astype(np.float32)
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"causal": True},
        "window": {"window_left": 17},
        "causal_window": {"causal": True, "window_left": 3},
        "mask_bool": {"mask": seen},
        "mask_f32": {"mask": np.where(seen, normal(rng, *seen.shape), -np.inf)},
        "mask_causal": {"mask": seen, "causal": True},
        "soft_cap": {"logits_soft_cap": 2.0, "causal": True},
        "alibi": {"alibi_slopes": slopes, "causal": True},
        "sinks": {"sinks": normal(rng, Hq), "causal": True},
    }
    return options[name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KV_TYPES)
def test_bf16_sizes(bf16_isa: str, rng: np.random.Generator, kind: str, size: str) -> None:
    check(*make(rng, SIZES[size], kind))


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "window",
        "causal_window",
        "mask_bool",
        "mask_f32",
        "mask_causal",
        "soft_cap",
        "alibi",
        "sinks",
    ],
)
@pytest.mark.parametrize("size", ["prefill", "gqa", "no_gqa"])
def test_bf16_options(bf16_isa: str, rng: np.random.Generator, name: str, size: str) -> None:
    sizes = SIZES[size]
    check(*make(rng, sizes, "f16"), **option(name, rng, sizes))


@pytest.mark.parametrize("kind", KV_TYPES)
def test_bf16_causal_kinds(bf16_isa: str, rng: np.random.Generator, kind: str) -> None:
    check(*make(rng, SIZES["gqa"], kind), causal=True)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 7, 17, 33, 65, 127, 131])
def test_bf16_odd_head_dims(bf16_isa: str, rng: np.random.Generator, head_dim: int) -> None:
    check(*make(rng, (1, 4, 2, 12, 37, head_dim, 132 - head_dim), "f16"), causal=True)


@pytest.mark.parametrize("kv_len", [1, 2, 15, 16, 17, 127, 128, 129, 257])
def test_bf16_kv_lens(bf16_isa: str, rng: np.random.Generator, kv_len: int) -> None:
    check(*make(rng, (1, 4, 2, 12, kv_len, 64, 32), "f16"))


def test_bf16_agrees_with_the_scalar_emulation(bf16_isa: str, rng: np.random.Generator) -> None:
    """The same roundings: only a weight on the edge between two bf16 may fall to either side."""
    q, k, v = make(rng, SIZES["gqa"], "f16")
    got = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    mkv.isa.select("scalar")
    want = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    f32 = mkv.attention(q, k, v, causal=True)
    assert relative_error(got, want) <= 0.1 * relative_error(f32, want)


def test_bf16_is_taken(bf16_isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["gqa"], "f16")
    f32 = mkv.attention(q, k, v)
    assert not np.array_equal(mkv.attention(q, k, v, compute_type="bf16"), f32)
    np.testing.assert_array_equal(mkv.attention(q, k, v, compute_type="f32"), f32)


def test_bf16_is_f32_where_an_isa_has_none(isa: str, rng: np.random.Generator) -> None:
    if "bf16" in mkv.isa.compute_types():
        pytest.skip(f"{isa} has arithmetic in bf16")
    q, k, v = make(rng, SIZES["gqa"], "f16")
    np.testing.assert_array_equal(
        mkv.attention(q, k, v, causal=True, compute_type="bf16"),
        mkv.attention(q, k, v, causal=True),
    )


@pytest.mark.parametrize("heads", [(6, 2), (32, 1)], ids=str)
def test_bf16_leaves_single_queries_alone(
    bf16_isa: str, rng: np.random.Generator, heads: tuple[int, int], kv_type: str
) -> None:
    q, k, v = make(rng, (1, *heads, 1, 300, 64, 64), kv_type)
    np.testing.assert_array_equal(
        mkv.attention(q, k, v, compute_type="bf16"), mkv.attention(q, k, v)
    )


def test_bf16_equal_values_come_back_exactly(bf16_isa: str, rng: np.random.Generator) -> None:
    """Weights are normalised by the sum of what they were rounded to."""
    q, k, v = make(rng, SIZES["gqa"], "f16")
    v[:] = 1.5
    out = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    np.testing.assert_allclose(out, 1.5, rtol=F32_REL)


@pytest.mark.parametrize("kind", KV_TYPES)
def test_bf16_threads_same_bits(bf16_isa: str, rng: np.random.Generator, kind: str) -> None:
    q, k, v = make(rng, SIZES["gqa"], kind)
    one, two, five = (
        mkv.attention(q, k, v, causal=True, compute_type="bf16", threads=n) for n in (1, 2, 5)
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, five)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("hide", ["mask", "causal", "window"])
def test_bf16_hidden_key_does_not_leak(
    bf16_isa: str, rng: np.random.Generator, bad: float, where: str, hide: str
) -> None:
    q, k, v = make(rng, (2, 6, 3, 13, 45, 32, 64), "f16")
    at = 40
    seen = np.ones((13, 45), bool)
    if hide == "causal":
        seen, options = np.tril(seen, 32), {"causal": True}
    elif hide == "window":
        seen = np.tril(seen, 33) & np.triu(seen, 29)
        options = {"window_left": 3, "window_right": 1}
    else:
        seen[::2, at] = False
        options = {"mask": seen}
    want = mkv.attention(q, k, v, compute_type="bf16", **options)
    (k if where == "k" else v)[1, 1, at] = bad
    out = mkv.attention(q, k, v, compute_type="bf16", **options)
    hit = np.zeros((2, 6, 13), bool)
    hit[1, 2:4] = seen[:, at]
    np.testing.assert_array_equal(out[~hit], want[~hit])
    if not (where == "k" and np.isinf(bad)):
        assert not np.isfinite(out[hit]).any()


def test_bf16_values_beyond_its_range_stay_with_who_sees_them(
    bf16_isa: str, rng: np.random.Generator
) -> None:
    """The largest f32 are infinite in bf16."""
    q, k, v = make(rng, (1, 4, 2, 13, 45, 32, 64), "f32")
    want = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    v[:, :, 40] = np.finfo(np.float32).max
    out = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    np.testing.assert_array_equal(out[:, :, :8], want[:, :, :8])


def test_bf16_bad_query_reaches_its_row_alone(bf16_isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, SIZES["prefill"], "f16")
    want = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    q[1, 2, 5] = np.nan
    out = mkv.attention(q, k, v, causal=True, compute_type="bf16")
    hit = np.zeros(out.shape[:3], bool)
    hit[1, 2, 5] = True
    np.testing.assert_array_equal(out[~hit], want[~hit])
    assert np.isnan(out[hit]).all()


def test_bf16_state_continues_and_ignores_what_acc_held(
    bf16_isa: str, rng: np.random.Generator
) -> None:
    q, k, v = make(rng, SIZES["gqa"], "f16")
    want, _ = ref.attention(*(values_of(x) for x in (q, k, v)), causal=True)
    state = mkv.AttentionState(num_qo_heads=8, qo_len=70, head_dim=32)
    state.acc[:] = np.nan
    for begin, end in ((0, 1), (1, 130), (130, 333)):
        state.update(
            q,
            k[:, :, begin:end],
            v[:, :, begin:end],
            causal=True,
            q_start=333 - 70,
            kv_start=begin,
            compute_type="bf16",
        )
    assert relative_error(state.finalize(), want) <= BF16_REL
    before = state.acc.copy()
    state.update(q, k, v, mask=np.zeros((70, 333), bool), compute_type="bf16")
    np.testing.assert_array_equal(state.acc, before)


@pytest.mark.parametrize("tier", ["f16", "q4_0", "mixed"])
def test_bf16_cache(bf16_isa: str, rng: np.random.Generator, tier: str) -> None:
    n, queries = 200, 40
    q, k, v = make(rng, (1, 8, 2, queries, n, 64, 32), "f16")
    geometry: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64}
    geometry["head_dim_v"] = 32
    cache: mkv.MixedKVCache | mkv.UnifiedKVCache
    if tier == "mixed":
        cache = mkv.MixedKVCache(**geometry, hot_size=128, cold_size=256, group_size=32)
    else:
        cache = mkv.UnifiedKVCache(**geometry, size=256, k_type=tier, v_type=tier)
    for begin, end in ((0, 80), (80, n - queries), (n - queries, n)):
        assert cache.find_slot(np.arange(begin, end), np.zeros(end - begin, np.int64)) is not None
        cache.store(0, k[0, :, begin:end], v[0, :, begin:end])
        if end < n:
            cache.commit()
    exact = cache.attend(0, q[0])
    got = cache.attend(0, q[0], compute_type="bf16")
    assert 0 < relative_error(got, exact.astype(np.float64)) <= BF16_REL


def test_bf16_compute_types() -> None:
    for name in mkv.isa.compiled():
        has = name == "scalar" or name.endswith("bf16")
        assert mkv.isa.compute_types(name) == (["f32", "bf16"] if has else ["f32"])
    assert mkv.isa.compute_types() == mkv.isa.compute_types(mkv.isa.active())
    with pytest.raises(ValueError, match="mmx"):
        mkv.isa.compute_types("mmx")


@pytest.mark.parametrize(
    ("value", "error"), [("f16", ValueError), ("BF16", ValueError), (None, TypeError)]
)
def test_bf16_refuses_unknown_compute_types(value: Any, error: type[Exception]) -> None:
    q = np.zeros((1, 2, 32), np.float32)
    match = "compute_type.*NoneType" if value is None else f"compute_type.*{value}"
    with pytest.raises(error, match=match):
        mkv.attention(q, q, q, compute_type=value)
    state = mkv.AttentionState(num_qo_heads=1, qo_len=2, head_dim=32)
    with pytest.raises(error, match=match):
        state.update(q, q, q, compute_type=value)
    assert np.all(np.isneginf(state.M))
    cache = mkv.UnifiedKVCache(num_layers=1, num_kv_heads=1, head_dim=32, size=32)
    cache.find_slot([0, 1], [0, 0])
    cache.store(0, q, q)
    with pytest.raises(error, match=match):
        cache.attend(0, q, compute_type=value)
