"""attention() on torch's tensors, and against its scaled_dot_product_attention."""

from __future__ import annotations

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from attention_cases import SIZES, make
from conftest import (
    TORCH_REL,
    assert_lse_close,
    relative_error,
    tolerance,
)

# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_equals_torch_sdpa(isa: str, rng: np.random.Generator, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, (2, 9, 3, 65, 65, 64, 64), "f16", "f16")
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q),
        torch.from_numpy(k).float(),
        torch.from_numpy(v).float(),
        is_causal=causal,
        enable_gqa=True,
    )
    assert relative_error(mkv.attention(q, k, v, causal=causal), want.numpy()) < TORCH_REL


@pytest.mark.torch
def test_attention_equals_torch_sdpa_with_mask(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, (2, 6, 2, 13, 45, 96, 32), "f16", "f16")
    mask = rng.random((2, 1, 13, 45)) < 0.7
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q),
        torch.from_numpy(k).float(),
        torch.from_numpy(v).float(),
        attn_mask=torch.from_numpy(mask),
        enable_gqa=True,
        scale=0.3,
    )
    got = mkv.attention(q, k, v, mask=mask, sm_scale=0.3)
    assert relative_error(got, want.numpy()) < TORCH_REL


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_attention_torch_in_torch_out(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in make(rng, SIZES["prefill"]))
    out, lse = mkv.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert out.shape == (2, 6, 13, 96)
    assert isinstance(lse, torch.Tensor)
    assert lse.shape == (2, 6, 13)
    want, want_lse = ref.attention(*(x.double().numpy() for x in (q, k, v)), causal=True)
    eps = float(torch.finfo(dtype).eps)
    assert relative_error(out.float().numpy(), want) <= max(eps, tolerance("f32"))
    if name == "float32":
        assert_lse_close(lse.numpy(), want_lse)


@pytest.mark.torch
def test_attention_torch_strided_and_q4_0(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = make(rng, SIZES["prefill"], "q4_0", "f16")
    want = mkv.attention(q, k, v)
    tq = torch.from_numpy(q).transpose(1, 2).contiguous().transpose(1, 2)
    tv = torch.from_numpy(v).transpose(1, 2).contiguous().transpose(1, 2)
    out = mkv.attention(tq, torch.from_numpy(k), tv)
    np.testing.assert_array_equal(out.numpy(), want)
    into = torch.full((2, 6, 13, 96), float("nan"))
    assert mkv.attention(tq, torch.from_numpy(k), tv, out=into) is into
    np.testing.assert_array_equal(into.numpy(), want)


@pytest.mark.torch
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_attention_torch_refuses_to_lose_a_gradient(rng: np.random.Generator, which: int) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in make(rng, SIZES["prefill"])]
    want = mkv.attention(*tensors)
    tensors[which].requires_grad_()
    with pytest.raises(ValueError, match=f"{'qkv'[which]}.*grad"):
        mkv.attention(*tensors)
    with torch.no_grad():
        assert torch.equal(mkv.attention(*tensors), want)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_attention_torch_mask(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, name)) for x in make(rng, SIZES["prefill"]))
    seen = torch.from_numpy(rng.random((2, 1, 13, 45)) < 0.7)
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))
    out = mkv.attention(q, k, v, mask=seen)
    torch.testing.assert_close(mkv.attention(q, k, v, mask=bias), out, rtol=0, atol=0)
