"""attention through mixedkv without a MixedCache, and the masks that it recognises."""

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
from mixedkv.integrations.transformers import masks  # noqa: E402
from tiny_models import (  # noqa: E402
    SIZES,
    VOCAB,
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
from tiny_models import model as model  # noqa: E402

# --- attention without a MixedCache -----------------------------------------------------------


def test_threads_are_woken_for_long_attention_only(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    attend = mkv.MixedKVCache.attend

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["threads"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(mkv.MixedKVCache, "attend", watched)
    ids = tokens(1, 128)
    # 4 heads of 32 and 32 dimensions: 128 queries by 128 keys are 4.2 million multiply-adds.
    for threads, steps, expected in (
        (None, [128], [1]),
        (None, [128, 128], [1, None]),
        (2, [128, 1], [2, 2]),
    ):
        cache = mkt.MixedCache(llama.config, hot_size=512, threads=threads)
        asked.clear()
        for width in steps:
            llama(ids[:, :width], past_key_values=cache)
        assert asked == [each for each in expected for _ in range(3)]


@pytest.mark.parametrize("lengths", [[40], [40, 23]], ids=["plain", "padded"])
def test_float16(lengths: list[int]) -> None:
    """What comes in goes out, in the model's dtype and close to its own attention."""
    half = copy.deepcopy(make_model("llama")).to(torch.float16)
    ids, mask = padded(lengths)
    cache = mkt.MixedCache(half.config, hot_size=64)
    found = half(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert found.dtype == torch.float16
    wanted = eager_logits(half, ids, attention_mask=mask)[:, -1]
    assert float((found - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


def test_without_cache(model: Any) -> None:
    ids, mask = padded([20, 8])
    got = model(ids, attention_mask=mask, use_cache=False).logits
    seen = mask.bool()
    assert_close(got[seen], eager_logits(model, ids, attention_mask=mask)[seen])
    assert_close(model(ids, use_cache=False).logits, eager_logits(model, ids))


def test_dynamic_cache(model: Any) -> None:
    ids, mask = padded([20, 8])
    got = generate(model, ids, attention_mask=mask)
    assert_same(got, eager(model, ids, attention_mask=mask))
    assert_same(generate(model, ids), eager(model, ids))


def test_static_cache(llama: Any) -> None:
    ids = tokens(2, 20)
    got = generate(llama, ids, cache_implementation="static", disable_compile=True)
    assert_same(got, eager(llama, ids))


def test_packed_sequences_without_cache(llama: Any) -> None:
    ids = tokens(1, 12)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    got = llama(ids, position_ids=position_ids, use_cache=False).logits
    assert_close(got, eager_logits(llama, ids, position_ids=position_ids))


def test_ready_made_mask_without_cache(llama: Any) -> None:
    ids = tokens(1, 6)
    seen = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    seen |= torch.eye(6, dtype=torch.bool)
    added = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = eager_logits(llama, ids, attention_mask=added)
    for mask in (seen, added):
        assert_close(llama(ids, attention_mask=mask, use_cache=False).logits, expected)


def test_encoder() -> None:
    """Bidirectional attention, with and without padding."""
    sizes = {key: size for key, size in SIZES.items() if "key_value" not in key}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ids, mask = padded([20, 8])
    expected = model(ids, attention_mask=mask).last_hidden_state, model(ids).last_hidden_state
    model.set_attn_implementation("mixedkv")
    got = model(ids, attention_mask=mask).last_hidden_state, model(ids).last_hidden_state
    seen = mask.bool()
    assert_close(got[0][seen], expected[0][seen])
    assert_close(got[1], expected[1])


def test_encoder_decoder() -> None:
    """Self and cross attention over caches of transformers' own."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.3,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    ids, mask = padded([20, 8])
    options = {"attention_mask": mask, "eos_token_id": None, "max_new_tokens": 12}
    expected = eager(model, ids, **options)
    assert_same(generate(model, ids, **options), expected)


# --- masks -------------------------------------------------------------------------------------


def test_masks_are_recognised() -> None:
    from transformers import masking_utils as hf

    causal = hf.causal_mask_function
    assert masks.recognise(causal) == (True, None)
    assert masks.recognise(hf.sliding_window_causal_mask_function(5)) == (True, 5)
    for other in (
        hf.bidirectional_mask_function,
        hf.sliding_window_bidirectional_mask_function(5),
        hf.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.int64)),
        hf.and_masks(causal, causal),
        hf.and_masks(hf.sliding_window_overlay(5), hf.bidirectional_mask_function),
        hf.and_masks(hf.sliding_window_overlay(5), causal, causal),
        hf.or_masks(hf.sliding_window_overlay(5), causal),
        hf.and_masks(hf.sliding_window_bidirectional_overlay(5), causal),
        hf.and_masks(causal, hf.packed_sequence_mask_function(torch.zeros(1, 2))),
        lambda b, h, q, k: k <= q,
    ):
        assert masks.recognise(other) == (False, None)


def test_mask_stands_for_what_sdpa_mask_makes() -> None:
    from transformers import masking_utils as hf

    _, padding = padded([9, 4])
    for function in (hf.causal_mask_function, hf.sliding_window_causal_mask_function(3)):
        arguments = {
            "batch_size": 2,
            "q_length": 4,
            "kv_length": 9,
            "q_offset": 5,
            "mask_function": function,
            "attention_mask": padding.bool(),
        }
        plan = masks.plan_of(mkt.describe_mask(**arguments, allow_is_causal_skip=True))
        assert plan is not None
        assert plan.causal
        assert plan.aligned
        expected = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert torch.equal(plan.dense(), expected)
        q, k = np.meshgrid(np.arange(5, 9), np.arange(9), indexing="ij")
        seen = (k <= q) & (k > q - (plan.window or 99))
        assert np.array_equal(expected[0, 0], seen & padding[0].bool().numpy())


def test_mask_computed_with_is_the_full_mask() -> None:
    _, padding = padded([9, 4])
    mask = mkt.describe_mask(2, 9, 9, attention_mask=padding.bool())
    full = masks.plan_of(mask).dense()
    assert mask.shape == full.shape
    assert mask.dtype == full.dtype
    for made, expected in (
        (mask.clone(), full),
        (mask[..., :5], full[..., :5]),
        (mask[:, :, :3, :], full[:, :, :3, :]),
        (~mask, ~full),
        (torch.where(mask, 0.0, -1.0), torch.where(full, 0.0, -1.0)),
        (torch.cat([mask, mask], 1), torch.cat([full, full], 1)),
    ):
        assert torch.equal(made, expected)
        assert masks.plan_of(made) is None
    last = mask[:, :, -3:, :]
    assert last.shape == (2, 1, 3, 9)
    assert torch.equal(masks.plan_of(last).dense(), full[:, :, -3:])


def test_plain_causal_needs_no_mask() -> None:
    ones = torch.ones(2, 9, dtype=torch.bool)
    assert mkt.describe_mask(2, 4, 9, 5, attention_mask=ones) is None
    assert mkt.describe_mask(2, 4, 9, 5) is None
    assert mkt.describe_mask(2, 4, 9, 0) is not None  # static shapes: keys beyond the last query
