"""What transformers may ask of mixedkv in vain: a clear error, and the cache as it was."""

import copy
import dataclasses
import inspect
import logging
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
from mixedkv.integrations.transformers import masks  # noqa: E402
from tiny_models import (  # noqa: E402
    ALL_F32,
    SIZES,
    VOCAB,
    assert_close,
    eager_logits,
    generate,
    make_model,
    padded,
    tokens,
)
from tiny_models import _no_grad as _no_grad  # noqa: E402
from tiny_models import llama as llama  # noqa: E402

# --- errors ------------------------------------------------------------------------------------


def small(model: Any, **options: Any) -> Any:
    return mkt.MixedCache(model.config, **{"hot_size": 64, "cold_size": 64, **options})


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_error_another_attention(llama: Any, name: str) -> None:
    llama.set_attn_implementation(name)
    with pytest.raises(RuntimeError, match='attn_implementation="mixedkv"'):
        generate(llama, tokens(1, 5), past_key_values=small(llama))


def test_error_ready_made_mask(llama: Any) -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"2-D attention_mask.*\(1, 1, 6, 6\)"):
        llama(tokens(1, 6), attention_mask=mask, past_key_values=small(llama))


def test_error_bidirectional_layers() -> None:
    model = make_model("gemma3")
    config = copy.deepcopy(model.config)
    config.use_bidirectional_attention = True
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("mixedkv")
    with pytest.raises(NotImplementedError, match=r"mask that a MixedCache can't serve|causal"):
        model(tokens(1, 6), past_key_values=small(model))


def test_error_image_blocks(llama: Any) -> None:
    """Tokens of one image see each other: a mask with a part that is not causal."""
    from transformers.masking_utils import create_causal_mask

    ids = tokens(1, 6)
    cache = small(llama)
    mask = create_causal_mask(
        config=llama.config,
        inputs_embeds=torch.zeros(1, 6, 8),
        attention_mask=None,
        past_key_values=cache,
        block_sequence_ids=torch.tensor([[-1, 0, 0, 0, -1, -1]]),
    )
    assert masks.plan_of(mask) is not None
    attention = llama.model.layers[0].self_attn
    k, v = (torch.randn(1, 2, 6, 32) for _ in range(2))
    k, v = cache.update(k, v, 0)
    with pytest.raises(NotImplementedError, match="mask that a MixedCache can't serve"):
        mkt.attention_forward(attention, torch.randn(1, 4, 6, 32), k, v, mask)
    assert llama(ids, past_key_values=cache).logits.shape[1] == 6  # and the cache goes on


@pytest.mark.parametrize(
    ("name", "kind"), [("Llama4TextConfig", "chunked"), ("Qwen3NextConfig", "linear")]
)
def test_error_layer_types(name: str, kind: str) -> None:
    config = getattr(transformers, name)(num_hidden_layers=4)
    with pytest.raises(ValueError, match=f"{kind}_attention.*full_attention"):
        mkt.MixedCache(config)


def test_error_encoder_decoder() -> None:
    with pytest.raises(ValueError, match="decoder-only"):
        mkt.MixedCache(transformers.BartConfig())


def test_error_gradients(llama: Any) -> None:
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="no_grad"):
        llama(tokens(1, 6), past_key_values=small(llama))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="no_grad"):
        llama(tokens(1, 6), use_cache=False)


def test_error_dropout() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, attention_dropout=0.1)
    ).train()
    model.set_attn_implementation("mixedkv")
    with pytest.raises(NotImplementedError, match="dropout"):
        model(tokens(1, 6), use_cache=False)


def test_error_output_attentions(llama: Any) -> None:
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        llama(tokens(1, 6), past_key_values=small(llama), output_attentions=True)


def test_error_unknown_argument(llama: Any) -> None:
    with pytest.raises(NotImplementedError, match="'block_indices'"):
        llama(tokens(1, 6), past_key_values=small(llama), block_indices=torch.zeros(1))


def test_error_reused_keys_that_are_cold_already() -> None:
    """All layers in one native cache: a later layer's rows took the place of the reused ones."""
    config = transformers.Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        sliding_window=9,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
    )
    model = transformers.Gemma4ForCausalLM(config).eval()
    model.set_attn_implementation("mixedkv")
    ids = tokens(1, 60)
    cache = mkt.MixedCache(config, hot_size=32, cold_size=64)
    with pytest.raises(NotImplementedError, match=r"layer 0 are used again.*prefill_chunk_size"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    generate(model, ids, past_key_values=cache, prefill_chunk_size=20, max_new_tokens=4)
    assert cache.get_seq_length() == 63


def test_error_another_batch(llama: Any) -> None:
    cache = small(llama)
    llama(tokens(2, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, got keys of 3"):
        llama(tokens(3, 6), past_key_values=cache)


def test_error_padding_forgotten(llama: Any) -> None:
    cache = small(llama)
    ids, mask = padded([6, 3])
    llama(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="no attention_mask"):
        llama(tokens(2, 1), past_key_values=cache)
    other = torch.ones(2, 7)
    other[0, 0] = 0
    with pytest.raises(ValueError, match="decided when a column comes"):
        llama(tokens(2, 1), attention_mask=other, past_key_values=cache)


def test_error_mask_too_narrow(llama: Any) -> None:
    cache = small(llama)
    llama(tokens(2, 6), past_key_values=cache)
    mask = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 8\)"):
        llama(tokens(2, 2), attention_mask=mask, past_key_values=cache)


def test_error_full(llama: Any) -> None:
    cache = mkt.MixedCache(llama.config, hot_size=32, cold_size=32)
    ids = tokens(1, 80)
    llama(ids[:, :60], past_key_values=cache)
    with pytest.raises(mkv.CacheFull, match=r"5 more tokens.*of 32 hot.*cold_size"):
        llama(ids[:, 60:65], past_key_values=cache)
    # As it was before that forward, and of use.
    assert cache.get_seq_length() == len(cache.native) == 60
    llama(ids[:, 60:64], past_key_values=cache)
    with pytest.raises(mkv.CacheFull):
        llama(ids[:, 64:65], past_key_values=cache)
    standard = mkt.MixedCache(llama.config, hot_size=32, quantize=False)
    with pytest.raises(mkv.CacheFull, match="hot_size"):
        llama(ids, past_key_values=standard)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_size": 33}, "33"),
        ({"cold_size": -32}, "cold_size"),
        ({"group_size": 0}, "group_size"),
        ({"threshold": 1.5}, "threshold"),
        ({"hot_k_type": "q5_0"}, "hot_k_type"),
        ({"max_batch_size": 0}, "max_batch_size must be from 1.*got 0"),
        ({"max_batch_size": 2.5}, "max_batch_size must be an int, got float 2.5"),
        ({"threads": 0}, "threads must be from 1 to 1024, got 0"),
        ({"threads": "2"}, "threads must be an int or None, got str"),
        ({"threads": 2.0}, "threads must be an int or None, got float"),
        ({"compute_type": "f8"}, "compute_type must be"),
        ({"hot_size": 32, "sink_tokens": 32}, "sink_tokens"),
    ],
)
def test_error_options(llama: Any, options: dict[str, Any], message: str) -> None:
    """Told when the cache is made, though its tiers are made at first use."""
    with pytest.raises((ValueError, TypeError), match=message):
        mkt.MixedCache(llama.config, **options)


def test_options_are_checked_without_a_cache(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache was made")

    monkeypatch.setattr(mkv, "MixedKVCache", made)
    for name in mkv.formats.available():
        mkt.MixedCache(llama.config, hot_k_type=name, cold_k_type=name, cold_v_type=name)


def test_options_are_those_of_the_configuration(llama: Any) -> None:
    """Whatever it is called, an option reaches the native cache; sizes are for each row."""
    options = {"hot_size": 64, "cold_size": 128, "group_size": 8, "sink_tokens": 3}
    others = {"threshold": 0.5, "n_pad": 16, "hot_v_type": "f32", "cold_k_type": "f16"}
    cache = copy.deepcopy(mkt.MixedCache(llama.config, **options, **others))
    llama(tokens(2, 6), past_key_values=cache)
    config = cache.native.config
    for name, value in {**options, **others}.items():
        assert getattr(config, name) == value * (2 if name.endswith("_size") else 1), name
    assert (config.n_seq_max, config.num_layers, config.head_dim) == (2, 3, 32)
    shown = inspect.signature(mkt.MixedCache).parameters
    model_says = {
        *("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "n_seq_max"),
        *("window_left", "rope", "layer_filter"),
    }
    own = {"config", "preset", "max_batch_size", "threads", "compute_type", "record_history"}
    fields = {field.name for field in dataclasses.fields(mkv.CacheConfig)}
    assert {*shown} == own | (fields - model_says)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": 4}, r"MixedCache has no option 'sinks'.*sink_tokens"),
        ({"hot_sizes": 4}, "'hot_sizes'"),
        ({"head_dim": 32}, "head_dim from the model"),
        ({"n_seq_max": 2}, "n_seq_max from the model"),
    ],
)
def test_error_options_that_are_none(llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        mkt.MixedCache(llama.config, **options)


def test_error_too_many_rows(llama: Any) -> None:
    cache = small(llama)
    llama(tokens(2, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="max_batch_size=4"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 2\)"):
        cache.reorder_cache(torch.tensor([0, 2]))


def test_copy(llama: Any) -> None:
    cache = small(llama, sink_tokens=3)
    twin = copy.deepcopy(cache)
    llama(tokens(1, 6), past_key_values=twin)
    assert cache.get_seq_length() == 0
    with pytest.raises(NotImplementedError, match="can't be copied"):
        copy.deepcopy(twin)


def test_error_geometry_that_the_config_hides(llama: Any) -> None:
    cache = small(llama)
    attention = llama.model.layers[0].self_attn
    for layer, heads in enumerate((2, 4)):
        k, v = (torch.randn(1, heads, 3, 32) for _ in range(2))
        k, v = cache.update(k, v, layer)
        if layer == 0:
            mkt.attention_forward(attention, torch.randn(1, 4, 3, 32), k, v, None)
        else:
            with pytest.raises(ValueError, match=r"\(4, 32, 32\).*\(2, 32, 32\)"):
                mkt.attention_forward(attention, torch.randn(1, 4, 3, 32), k, v, None)


def test_error_layers_out_of_order(llama: Any) -> None:
    cache = small(llama)
    rows = torch.randn(1, 2, 3, 32)
    with pytest.raises(RuntimeError, match="begin with layer 0"):
        cache.update(rows, rows, 1)
    cache.update(rows, rows, 0)
    with pytest.raises(RuntimeError, match="never reached mixedkv"):
        cache.update(rows, rows, 1)


def test_error_arithmetic_on_handles(llama: Any) -> None:
    rows = torch.randn(1, 2, 3, 32)
    k, v = small(llama).update(rows, rows, 0)
    assert (k.shape, v.dtype, k.device.type, k.size(1)) == (rows.shape, rows.dtype, "cpu", 2)
    assert k.to("cpu") is k
    assert k.contiguous() is k
    assert "CachedRows" in repr(k)
    for misuse in (
        lambda: k + 1,
        lambda: k @ v.mT,
        lambda: k[0],
        lambda: torch.cat([k, v]),
        lambda: k.to(torch.float16),
        lambda: k.numpy(),
        lambda: torch.nn.functional.scaled_dot_product_attention(rows, k, v),
    ):
        with pytest.raises(RuntimeError, match="MixedCache"):
            misuse()


def test_error_latent_keys() -> None:
    """The model caches compressed latents and computes on them before attention."""
    sizes = {key: size for key, size in SIZES.items() if key not in ("head_dim", "pad_token_id")}
    config = transformers.DeepseekV3Config(
        **{**sizes, "num_key_value_heads": 4},
        pad_token_id=0,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        q_lora_rank=24,
        kv_lora_rank=24,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.set_attn_implementation("mixedkv")
    with pytest.raises(RuntimeError, match="between cache and attention can't be served"):
        model(tokens(1, 6), past_key_values=small(model))


def test_broken_off_forward(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A forward that broke off between two layers leaves no trace, once another one begins."""
    ids = tokens(1, 40)
    cache = mkt.MixedCache(llama.config, **ALL_F32, hot_k_type="f32", hot_v_type="f32")
    llama(ids[:, :30], past_key_values=cache)

    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = llama.model.layers[1].mlp.register_forward_pre_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        llama(ids[:, 30:], past_key_values=cache)
    hook.remove()
    with caplog.at_level(logging.WARNING, logger="mixedkv"):
        got = llama(ids[:, 30:], past_key_values=cache).logits
    assert "broke off" in caplog.text
    assert_close(got, eager_logits(llama, ids)[:, 30:])


def test_error_in_attention_restores(llama: Any) -> None:
    ids = tokens(1, 40)
    cache = small(llama)
    llama(ids[:, :30], past_key_values=cache)
    before = cache.stats()
    with pytest.raises(NotImplementedError):
        llama(ids[:, 30:], past_key_values=cache, block_indices=1)
    cache.crop(0)
    assert dataclasses.replace(cache.stats(), move_seconds=0) == dataclasses.replace(
        before, move_seconds=0
    )
