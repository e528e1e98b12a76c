"""Presets of a MixedCache: options to begin with, for each row of a batch."""

import copy
from typing import Any

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


def cache_after(tokens: int, **options: Any) -> mkt.MixedCache:
    """Give a cache that a prompt and some single tokens went through."""
    mkt.register()
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation("mixedkv")
    cache = mkt.MixedCache(CONFIG, **options)
    ids = torch.arange(tokens) % 50
    with torch.no_grad():
        for part in (ids[:-8], *ids[-8:].split(1)):
            model(part[None], past_key_values=cache)
    return cache


def test_balanced_is_the_default() -> None:
    config = cache_after(400, cold_size=256).native.config
    wanted = presets.config("balanced", num_layers=1, num_kv_heads=1, head_dim=64, cold_size=256)
    assert config == wanted.replace(head_dim_v=64)
    plain = cache_after(400, preset=None, cold_size=256, hot_size=320).native.config
    assert (plain.cold_k_type, plain.rotate, plain.center_keys) == ("q4_0", False, False)


@pytest.mark.parametrize("hot_size", [1, 2, 8, 32, 64, 256, 320, 1024])
def test_the_default_fits_any_hot_tier(hot_size: int) -> None:
    cache = cache_after(400, hot_size=hot_size, cold_size=512, n_pad=1)
    stats = cache.stats()
    assert stats.hot_tokens + stats.cold_tokens == 400
    assert stats.hot_tokens <= hot_size


def test_without_cold_there_is_no_preset() -> None:
    config = cache_after(40, quantize=False).native.config
    assert (config.rotate, config.center_keys, config.hot_size) == (False, False, 1024)


def test_a_copy_has_the_same_options() -> None:
    cache = mkt.MixedCache(CONFIG, cold_size=256, hot_size=96)
    copied = copy.deepcopy(cache)
    ids = torch.arange(8)[None]
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation("mixedkv")
    with torch.no_grad():
        for each in (cache, copied):
            model(ids, past_key_values=each)
    assert cache.native.config == copied.native.config


def test_a_sliding_window_stays_hot() -> None:
    """Layers that see 512 keys read nothing else, and are as exact as in f16."""
    config = transformers.Gemma3TextConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=512,
        layer_types=["sliding_attention", "sliding_attention"],
    )
    mkt.register()
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("mixedkv")
    ids = torch.arange(900)[None] % 50
    logits, cold = [], []
    for options in ({"cold_size": 512}, {"quantize": False, "rotate": True, "hot_size": 928}):
        cache = mkt.MixedCache(config, **options)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split(50, 1)]
        logits.append(torch.cat(parts, 1))
        cold.append(cache.stats().cold_tokens)
    assert cold[0] > 200
    assert cold[1] == 0
    assert (logits[0] - logits[1]).norm() < 1e-5 * logits[1].norm()
    assert mkt.preset_options(config)["hot_size"] == 704
    assert mkt.preset_options(config, None, hot_size=64) == {"hot_size": 64}


@pytest.mark.parametrize("quantize", [True, False])
def test_unknown_preset(quantize: bool) -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'huge'"):
        mkt.MixedCache(CONFIG, preset="huge", quantize=quantize)
