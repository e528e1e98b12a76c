"""bfloat16 keys and values on their way into a MixedCache: their own bits, not widened first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
from tiny_models import SIZES, make_model, padded, tokens  # noqa: E402
from tiny_models import _no_grad as _no_grad  # noqa: E402

SMALL: dict[str, Any] = {"hot_size": 32, "cold_size": 64, "group_size": 8, "preset": None}


@pytest.fixture
def half() -> Any:
    """A model that is bfloat16 throughout."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**{**SIZES, "head_dim": 64})
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    model.set_attn_implementation("mixedkv")
    return model


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What native caches are given to store."""
    calls: list[tuple[Any, Any]] = []
    store = mkv.MixedKVCache.store

    def spy(cache: mkv.MixedKVCache, layer: int, k: Any, v: Any) -> None:
        calls.append((k, v))
        store(cache, layer, k, v)

    monkeypatch.setattr(mkv.MixedKVCache, "store", spy)
    return calls


def rows_of(cache: mkt.MixedCache) -> list[np.ndarray]:
    """All that a cache of one row holds, in f32, and in the tiers' bytes where it can say."""
    native = cache.native
    found = []
    for layer in range(native.config.num_layers):
        for tier in native.export_rows(layer, 0, dequantize=True):
            found += [tier.k, tier.v]
        if not native.config.center_keys:
            for tier in native.export_rows(layer, 0):
                found += [getattr(x, "data", x) for x in (tier.k, tier.v)]
    return [np.asarray(x) for x in found]


def widened(model: Any, ids: Any, options: dict[str, Any]) -> tuple[mkt.MixedCache, list[Any]]:
    """Run a model whose keys and values are made f32 before the cache sees them."""
    cache = mkt.MixedCache(model.config, **options)
    update = cache.update
    cache.update = lambda k, v, *args: update(k.float(), v.float(), *args)  # type: ignore[method-assign]
    return cache, run(model, cache, ids)


def run(model: Any, cache: mkt.MixedCache, ids: Any) -> list[Any]:
    """A prompt, then token by token."""
    steps = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]
    return [model(step, past_key_values=cache).logits for step in steps]


@pytest.mark.parametrize("kind", mkv.formats.available())
@pytest.mark.parametrize("changed", [{}, {"rotate": True}, {"center_keys": True}], ids=str)
def test_bf16_holds_what_widened_rows_come_to(half: Any, kind: str, changed: Any) -> None:
    """In hot tiers of every format, and through moves into cold ones of every format."""
    ids = tokens(1, 50, seed=8)
    for types in (("hot_k_type", "hot_v_type"), ("cold_k_type", "cold_v_type")):
        options = {**SMALL, **changed, **dict.fromkeys(types, kind)}
        cache = mkt.MixedCache(half.config, **options)
        got = run(half, cache, ids)
        other, want = widened(half, ids, options)
        assert cache.stats().cold_tokens > 0
        for a, b in zip(rows_of(cache), rows_of(other), strict=True):
            np.testing.assert_array_equal(a, b)
        for one, same in zip(got, want, strict=True):
            assert torch.equal(one, same)


def test_bf16_reaches_the_cache_without_a_copy(half: Any, stored: list[tuple[Any, Any]]) -> None:
    """A bf16 tier then holds the model's own bits."""
    options = {**SMALL, "hot_k_type": "bf16", "hot_v_type": "bf16"}
    cache = mkt.MixedCache(half.config, **options)
    given: list[Any] = []
    update = cache.update

    def spy(k: Any, v: Any, *args: Any) -> Any:
        given.extend((k, v))
        return update(k, v, *args)

    cache.update = spy  # type: ignore[method-assign]
    half(tokens(1, 12), past_key_values=cache)
    taken = [rows for pair in stored for rows in pair]
    assert len(taken) == len(given) == 2 * SIZES["num_hidden_layers"]
    for rows, tensor in zip(taken, given, strict=True):
        assert isinstance(rows, mkv.QuantizedArray)
        assert rows.format == "bf16"
        assert rows.data.__array_interface__["data"][0] == tensor.data_ptr()
    for layer in range(SIZES["num_hidden_layers"]):
        hot, _ = cache.native.export_rows(layer, 0)
        for held, tensor in ((hot.k, given[2 * layer]), (hot.v, given[2 * layer + 1])):
            bits = tensor[0].contiguous().view(torch.uint8).numpy()
            np.testing.assert_array_equal(held.data, bits)


def test_bf16_rows_of_a_padded_batch(half: Any, stored: list[tuple[Any, Any]]) -> None:
    ids, mask = padded([5, 9, 7])
    options = {**SMALL, "hot_k_type": "bf16", "hot_v_type": "bf16"}
    logits = half(ids, attention_mask=mask, past_key_values=mkt.MixedCache(half.config, **options))
    assert all(rows.format == "bf16" for pair in stored for rows in pair)
    for row, length in enumerate((5, 9, 7)):
        alone = mkt.MixedCache(half.config, **options)
        want = half(ids[row : row + 1, -length:], past_key_values=alone).logits
        got = logits.logits[row : row + 1, -length:]
        assert (got - want).norm() / want.norm() < 0.02  # rows of a batch round otherwise in torch


def test_bf16_value_that_no_f16_tier_holds_names_the_layer(half: Any) -> None:
    with torch.no_grad():
        half.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    cache = mkt.MixedCache(half.config, **SMALL)
    with pytest.raises(ValueError, match=r"the model's layer 1: .*head .*f16"):
        half(tokens(1, 6), past_key_values=cache)
    assert cache.get_seq_length() == 0
    options = {**SMALL, "hot_v_type": "bf16", "cold_v_type": "bf16"}
    half(tokens(1, 6), past_key_values=mkt.MixedCache(half.config, **options))


def test_other_kinds_of_rows_stay_what_they_are(stored: list[tuple[Any, Any]]) -> None:
    model = make_model("llama")
    model(tokens(1, 6), past_key_values=mkt.MixedCache(model.config, **SMALL))
    assert all(rows.dtype == np.float32 for pair in stored for rows in pair)
