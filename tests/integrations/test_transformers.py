"""transformers through mixedkv: the same tokens as its own eager attention.

The models are tiny and random, built from configs."""

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
from tiny_models import (  # noqa: E402
    ALL_HOT,
    assert_close,
    assert_same,
    eager,
    eager_logits,
    generate,
    make_model,
    padded,
    tokens,
)
from tiny_models import _no_grad as _no_grad  # noqa: E402
from tiny_models import llama as llama  # noqa: E402
from tiny_models import lossless as lossless  # noqa: E402
from tiny_models import model as model  # noqa: E402

# --- the same tokens as eager attention -------------------------------------------------------


def test_greedy(model: Any, lossless: dict[str, Any]) -> None:
    ids = tokens(1, 20)
    cache = mkt.MixedCache(model.config, **lossless)
    assert_same(generate(model, ids, past_key_values=cache), eager(model, ids))
    assert cache.get_seq_length() == 20 + 24 - 1
    stats = cache.stats()
    assert stats.tokens_seen == 43
    assert stats.hot_tokens + stats.cold_tokens == 43
    assert (stats.moved > 0) == (lossless["hot_size"] == 16)


def test_logits(model: Any, lossless: dict[str, Any]) -> None:
    ids = tokens(2, 40)
    cache = mkt.MixedCache(model.config, **lossless)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 20, 11], 1)]
    assert_close(torch.cat(parts, 1), eager_logits(model, ids))


def test_left_padded_batch(model: Any, lossless: dict[str, Any]) -> None:
    ids, mask = padded([20, 3, 11])
    cache = mkt.MixedCache(model.config, **lossless)
    got = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_same(got, eager(model, ids, attention_mask=mask))
    # Columns count padding, tokens do not.
    assert cache.get_seq_length() == 43
    assert len(cache.natives[0]) == 20 + 3 + 11 + 3 * 23


def test_batch_without_padding(llama: Any, lossless: dict[str, Any]) -> None:
    ids = tokens(3, 11)
    cache = mkt.MixedCache(llama.config, **lossless)
    assert_same(generate(llama, ids, past_key_values=cache), eager(llama, ids))


@pytest.mark.parametrize("seed", [1, 2])
def test_sampling(llama: Any, lossless: dict[str, Any], seed: int) -> None:
    ids = tokens(2, 15)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 50}
    cache = mkt.MixedCache(llama.config, **lossless)
    torch.manual_seed(seed)
    got = generate(llama, ids, past_key_values=cache, **options)
    torch.manual_seed(seed)
    assert_same(got, eager(llama, ids, **options))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beam_search(name: str, lossless: dict[str, Any]) -> None:
    model = make_model(name)
    ids, mask = padded([20, 9])
    options = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    cache = mkt.MixedCache(model.config, **lossless)
    assert_same(
        generate(model, ids, past_key_values=cache, **options), eager(model, ids, **options)
    )
    # Beams of one row share the cells of its prompt.
    assert len(cache.natives[0]) < 6 * 29


def test_prefill_chunks(model: Any, lossless: dict[str, Any]) -> None:
    ids, mask = padded([50, 13])
    cache = mkt.MixedCache(model.config, **lossless)
    got = generate(model, ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=12)
    assert_same(got, eager(model, ids, attention_mask=mask))


def test_several_turns(model: Any, lossless: dict[str, Any]) -> None:
    cache = mkt.MixedCache(model.config, **lossless)
    ids = tokens(1, 12)
    for turn in range(3):
        expected = eager(model, ids, max_new_tokens=9)
        ids = generate(model, ids, max_new_tokens=9, past_key_values=cache)
        assert_same(ids, expected)
        ids = torch.cat([ids, tokens(1, 5, seed=turn)], 1)


def test_several_turns_padded(llama: Any, lossless: dict[str, Any]) -> None:
    cache = mkt.MixedCache(llama.config, **lossless)
    ids, mask = padded([12, 5])
    for turn in range(2):
        expected = eager(llama, ids, attention_mask=mask, max_new_tokens=9)
        ids = generate(llama, ids, attention_mask=mask, max_new_tokens=9, past_key_values=cache)
        assert_same(ids, expected)
        # The second turn brings padding of its own.
        new, new_mask = padded([6, 4], seed=turn)
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones(2, 9, dtype=mask.dtype), new_mask], 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prompt_lookup(name: str, lossless: dict[str, Any]) -> None:
    model = make_model(name)
    ids = tokens(1, 8).repeat(1, 4)  # something to look up
    cache = mkt.MixedCache(model.config, **lossless)
    got = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert_same(got, eager(model, ids))
    assert cache.get_seq_length() == got.shape[1] - 1


def test_assistant_model(llama: Any, lossless: dict[str, Any]) -> None:
    ids = tokens(1, 15)
    assistant = copy.deepcopy(llama)
    torch.manual_seed(5)
    for weights in assistant.lm_head.parameters():  # right now and then, not always
        weights.add_(torch.randn_like(weights), alpha=0.05)
    cache = mkt.MixedCache(llama.config, **lossless)
    got = generate(llama, ids, past_key_values=cache, assistant_model=assistant)
    assert_same(got, eager(llama, ids))


def test_bfloat16(llama: Any) -> None:
    ids = tokens(1, 20)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    cache = mkt.MixedCache(half.config, **ALL_HOT)
    got = half(ids, past_key_values=cache).logits
    assert got.dtype == torch.bfloat16
    exact = eager_logits(copy.deepcopy(half).float(), ids)
    error, eager_error = ((x - exact).norm() for x in (got, eager_logits(half, ids)))
    assert error < 1.2 * eager_error


def test_compute_type(llama: Any) -> None:
    ids = tokens(1, 20)
    exact = eager_logits(llama, ids)
    before = mkv.isa.active()
    mkv.isa.select("scalar")  # has arithmetic in bf16 on every machine
    try:
        cache = mkt.MixedCache(llama.config, **ALL_HOT, compute_type="bf16")
        got = llama(ids, past_key_values=cache).logits
    finally:
        mkv.isa.select(before)
    # Less is rounded than in a model that is bfloat16 throughout.
    whole = eager_logits(copy.deepcopy(llama).to(torch.bfloat16), ids)
    assert 1e-5 * exact.norm() < (got - exact).norm() < (whole - exact).norm()
    with pytest.raises(ValueError, match=r"compute_type.*'f16'"):
        mkt.MixedCache(llama.config, compute_type="f16")


def test_values_that_the_cache_cannot_hold_are_refused(llama: Any) -> None:
    """Finite values beyond f16 in layer 1: an error that names it, and the cache as it was."""
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 1e6
        model.model.layers[1].self_attn.o_proj.weight *= 1e-6
    first, more = tokens(1, 8), tokens(1, 4)
    cache = mkt.MixedCache(model.config, **ALL_HOT)
    with pytest.raises(
        ValueError, match=r"the model's layer 1: v of layer 1.* holds .* \(head .*f16"
    ):
        model(first, past_key_values=cache)
    assert cache.get_seq_length() == 0
    wide = mkt.MixedCache(
        model.config,
        **ALL_HOT,
        **dict.fromkeys(("hot_k_type", "hot_v_type", "cold_k_type", "cold_v_type"), "f32"),
    )
    got = model(first, past_key_values=wide).logits
    exact = eager_logits(model, first)
    assert (got - exact).norm() < 1e-3 * exact.norm()
    assert model(more, past_key_values=wide).logits.isfinite().all()
