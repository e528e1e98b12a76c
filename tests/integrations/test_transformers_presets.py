"""Presets of a MixedCache: options to begin with, for each row of a batch."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv.integrations.transformers as mkt  # noqa: E402
from mixedkv.cache import presets  # noqa: E402

CONFIG = transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


@pytest.mark.parametrize("name", presets.NAMES)
def test_preset(name: str) -> None:
    mkt.register()
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation("mixedkv")
    cache = mkt.MixedCache(CONFIG, preset=name, cold_size=256, hot_keep=64)
    with torch.no_grad():
        model(torch.arange(40).view(2, 20), past_key_values=cache)
    config, wanted = cache.native.config, presets.options(name)
    assert config.hot_size == 2 * wanted["hot_size"]
    assert (config.cold_k_type, config.rotate) == (wanted["cold_k_type"], True)
    assert config.hot_keep == 64


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'huge'"):
        mkt.MixedCache(CONFIG, preset="huge")
