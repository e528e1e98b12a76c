"""Every op and every tier over rows of every format."""

from __future__ import annotations

from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import F32_REL, assert_close, normal, relative_error
from format_cases import BLOCKS, KINDS, PACKED, rows_as


@pytest.mark.parametrize("v_kind", KINDS)
@pytest.mark.parametrize("k_kind", KINDS)
def test_attention_over_every_pair(isa: str, k_kind: str, v_kind: str) -> None:
    rng = np.random.default_rng(7)
    for qo_len, kv_len in ((1, 70), (3, 33), (40, 64)):
        q = normal(rng, 2, 6, qo_len, 64)
        k = rows_as(normal(rng, 2, 2, kv_len, 64), k_kind)
        width = 192 if v_kind == "nl4" else 96
        v = rows_as(normal(rng, 2, 2, kv_len, width), v_kind)
        want, _ = ref.attention(
            q, np.asarray(k, np.float64), np.asarray(v, np.float64), causal=True
        )
        got = mkv.attention(q, k, v, causal=True)
        # neon_dotprod and its kin round the query over rows of Q4_0.
        rel = 1e-3 if k_kind == "q4_0" and isa.startswith("neon_") else F32_REL
        assert_close(got, want, rel)

        state = mkv.AttentionState(6, qo_len, width, batch=2)
        for part in (np.s_[:, :, :20], np.s_[:, :, 20:]):
            start = 0 if part == np.s_[:, :, :20] else 20
            state.update(q, k[part], v[part], causal=True, q_start=kv_len - qo_len, kv_start=start)
        assert relative_error(state.finalize(), want) <= max(rel, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_takes_views(isa: str, kind: str) -> None:
    """Strided rows, another layout, torch tensors: the same bits."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    q = normal(rng, 1, 4, 2, 64)
    k = rows_as(normal(rng, 1, 30, 4, 64), kind)
    v = rows_as(normal(rng, 1, 30, 4, 64), kind)
    k, v = k[:, ::2, 1:3], v[:, ::2, 1:3]
    want = mkv.attention(q.swapaxes(1, 2).copy(), k, v, layout="NHD")
    hnd = (k.swapaxes(1, 2), v.swapaxes(1, 2))
    np.testing.assert_array_equal(mkv.attention(q, *hnd), want.swapaxes(1, 2))
    copies = [x.copy() for x in hnd]
    np.testing.assert_array_equal(mkv.attention(q, *copies), want.swapaxes(1, 2))
    tensors = [x.torch() if kind in PACKED else torch.from_numpy(x) for x in copies]
    got = mkv.attention(torch.from_numpy(q), *tensors)
    assert torch.is_tensor(got)
    np.testing.assert_array_equal(got.numpy(), want.swapaxes(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_paged_attention_has_the_bits_of_attention(isa: str, kind: str) -> None:
    rng = np.random.default_rng(10)
    k = rows_as(normal(rng, 7, 2, 16, 64), kind)
    v = rows_as(normal(rng, 7, 2, 16, 64), kind)
    q = normal(rng, 2, 4, 64)
    lists = ([5, 0, 3], [6, 1])
    got = mkv.attention_paged(q, (k, v), [0, 3, 5], [*lists[0], *lists[1]], [9, 16])
    for b, (pages, length) in enumerate(zip(lists, (41, 32), strict=True)):
        rows = [x[pages].swapaxes(0, 1).reshape(2, -1, 64)[:, :length] for x in (k, v)]
        np.testing.assert_array_equal(got[b], mkv.attention(q[b][:, None], *rows)[:, 0])


def test_attention_reads_bfloat16_tensors_as_they_are(isa: str) -> None:
    torch = pytest.importorskip("torch")
    t = torch.randn(1, 2, 9, 40).bfloat16()
    q = torch.randn(1, 4, 3, 40).bfloat16()
    got = mkv.attention(q, t, t)
    assert got.dtype == torch.bfloat16
    want = mkv.attention(q, t.float(), t.float())
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="k requires grad"):
        mkv.attention(q, t.clone().requires_grad_(), t)


def test_attention_names_the_array_that_does_not_fit() -> None:
    q = np.zeros((2, 1, 64), np.float32)
    a = mkv.quantize(np.zeros((2, 3, 32), np.float32), "q8_0")
    with pytest.raises(ValueError, match="k must have q's head_dim 64, got 32"):
        mkv.attention(q, a, a)
    with pytest.raises(TypeError, match="q must be a numpy array or a torch CPU tensor"):
        mkv.attention(a, a, a)
    with pytest.raises(TypeError, match=r"k must be float32, float16 or uint8 \(Q4_0 rows\), got"):
        mkv.attention(q, np.zeros((2, 3, 64), np.uint16), a)
    with pytest.raises(ValueError, match="Q4_0 rows in v must be a multiple of 18 bytes"):
        mkv.attention(q, np.zeros((2, 3, 64), np.float32), np.zeros((2, 3, 34), np.uint8))
    k = mkv.quantize(np.ones((2, 3, 64), np.float32), "bf16")
    out = k.data.view(np.float32)[..., :1]
    with pytest.raises(ValueError, match="out must not share memory with k"):
        mkv.attention(q, k, np.zeros((2, 3, 1), np.float32), out=out[:, :1])


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", KINDS)
@pytest.mark.parametrize("hot", KINDS)
def test_cache_holds_every_format_in_either_tier(isa: str, hot: str, cold: str) -> None:
    rng = np.random.default_rng(9)
    width = 192 if "nl4" in (hot, cold) else 96
    cache = mkv.MixedKVCache(
        num_layers=1,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=width,
        hot_size=16,
        cold_size=64,
        group_size=8,
        n_pad=8,
        hot_k_type=hot,
        hot_v_type=hot,
        cold_k_type=cold,
        cold_v_type=cold,
    )
    k, v = normal(rng, 2, 40, 64), normal(rng, 2, 40, width)
    for begin in range(0, 40, 8):
        part = np.s_[:, begin : begin + 8]
        cache.append(list(range(begin, begin + 8)), [0] * 8, [k[part]], [v[part]])
    in_hot, in_cold = cache.export_rows(0, 0)
    assert len(in_hot.positions)
    assert len(in_cold.positions)
    assert len(in_hot.positions) + len(in_cold.positions) == 40
    for exported, kind, trip in (
        (in_hot, hot, lambda x: ref.stored_as(x, hot)),
        (in_cold, cold, lambda x: ref.stored_as(ref.stored_as(x, hot), cold)),
    ):
        for rows, original in ((exported.k, k), (exported.v, v)):
            assert isinstance(rows, mkv.QuantizedArray) == (kind in PACKED)
            if kind in PACKED:
                assert rows.format == kind
            at = exported.positions
            np.testing.assert_array_equal(np.asarray(rows, np.float32), trip(original[:, at]))
    q = normal(rng, 4, 1, 64)
    keys, held = cache.keys(0, 0), cache.values(0, 0)
    slot = cache.find_slot(pos=[40], seq_id=[0])
    assert slot is not None
    new_k, new_v = normal(rng, 2, 1, 64), normal(rng, 2, 1, width)
    cache.store(0, new_k, new_v)
    want, _ = ref.attention(
        q[None],
        np.concatenate([keys, ref.stored_as(new_k, hot)], 1)[None].astype(np.float64),
        np.concatenate([held, ref.stored_as(new_v, hot)], 1)[None].astype(np.float64),
    )
    packed = {*BLOCKS} & {hot, cold}
    assert relative_error(cache.attend(0, q), want[0]) <= (1e-3 if packed else F32_REL)
    cache.restore()


def test_cache_names_formats_that_it_takes() -> None:
    options: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 48}
    with pytest.raises(ValueError, match=r"cold_k_type must be 'f32', .* or 'nl3', got 'q5_0'"):
        mkv.MixedKVCache(**options, cold_k_type="q5_0")
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 32 where .* is q8_0"):
        mkv.MixedKVCache(**options, cold_k_type="q8_0", cold_v_type="q8_0")
    mkv.MixedKVCache(**options, cold_k_type="bf16", cold_v_type="bf16")
