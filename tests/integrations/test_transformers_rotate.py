"""MixedCache(rotate=True): the same model, whatever the cache does to its rows."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv.integrations.transformers as mkt  # noqa: E402

mkt.register()

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 96,  # rotated in blocks of 32
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
F32 = {"hot_k_type": "f32", "hot_v_type": "f32", "cold_k_type": "f32", "cold_v_type": "f32"}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation="mixedkv")
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any, ids: Any, mask: Any, **options: Any) -> tuple[Any, Any]:
    """Of a prompt in two chunks and of single tokens after it."""
    cache = mkt.MixedCache(model.config, hot_size=32, cold_size=128, group_size=8, **options)
    got = []
    with torch.no_grad():
        at = 0
        for n in (50, 20, *[1] * (ids.shape[1] - 70)):
            step = model(
                ids[:, at : at + n],
                attention_mask=mask[:, : at + n],
                past_key_values=cache,
                use_cache=True,
            )
            got.append(step.logits)
            at += n
    return torch.cat(got, 1), cache


def prompt(padding: int) -> tuple[Any, Any]:
    ids = torch.randint(2, 101, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("tiers", ["two", "one"])
def test_transformers_rotate_keeps_logits(model: Any, tiers: str, padding: int) -> None:
    options: dict[str, Any] = {**F32, "n_pad": 8}
    if tiers == "one":
        options = {"hot_k_type": "f32", "hot_v_type": "f32", "quantize": False, "n_pad": 8}
        options["hot_size"] = 96
    ids, mask = prompt(padding)
    run = {}
    for rotate in (False, True):
        given = dict(options)
        size = given.pop("hot_size", None)
        if size is None:
            run[rotate], cache = logits(model, ids, mask, rotate=rotate, **given)
            assert cache.stats().cold_tokens > 0
        else:
            cache = mkt.MixedCache(model.config, hot_size=size, rotate=rotate, **given)
            with torch.no_grad():
                step = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            run[rotate] = step.logits
    seen = mask.bool()
    difference = (run[True] - run[False])[seen].norm() / run[False][seen].norm()
    assert difference < 1e-5


def test_transformers_rotate_quantised_generates(model: Any) -> None:
    ids, mask = prompt(0)
    exact, _ = logits(model, ids, mask, **F32, n_pad=8)
    rotated, cache = logits(model, ids, mask, rotate=True, cold_k_type="f16", cold_v_type="f16")
    assert cache.stats().cold_tokens > 0
    assert (rotated - exact).norm() / exact.norm() < 1e-2
    cache = mkt.MixedCache(model.config, hot_size=32, cold_size=128, rotate=True)
    out = model.generate(ids[:1, :40], past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 60)
