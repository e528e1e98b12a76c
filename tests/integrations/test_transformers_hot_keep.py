"""MixedCache(hot_keep=...): the newest tokens of every row stay hot."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv.integrations.transformers as mkt  # noqa: E402

mkt.register()

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.mark.parametrize("rows", [1, 3])
def test_transformers_hot_keep_holds_for_every_row(rows: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation="mixedkv")
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 101, (rows, 120), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, :17] = 0  # left padding
    cache = mkt.MixedCache(
        config, hot_size=32, cold_size=128, group_size=8, hot_keep=16, sink_tokens=2
    )
    at = 0
    with torch.no_grad():
        for n in (40, 25, *[1] * 55):
            model(
                ids[:, at : at + n],
                attention_mask=mask[:, : at + n],
                past_key_values=cache,
                use_cache=True,
            )
            at += n
            for native in cache.natives:
                for row in range(rows):
                    tiers = native.tiers(row)
                    assert not tiers[-16:].any()
                    assert not tiers[:2].any()
    assert cache.stats().cold_tokens > 0


def test_transformers_hot_keep_too_large_is_told_at_once() -> None:
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match=r"hot_keep.*got 31"):
        mkt.MixedCache(config, hot_size=32, cold_size=128, hot_keep=31)
