"""What tests of the integration share: tiny random models, caches that lose nothing, and what
transformers gives by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv.integrations.transformers as mkt  # noqa: E402

mkt.register()


VOCAB = 199
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def _mistral() -> Any:
    """All layers slide."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=9))


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def _gemma2() -> Any:
    """Layers alternate, logits are soft-capped."""
    config = transformers.Gemma2Config(
        **SIZES,
        sliding_window=9,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> Any:
    """Layers alternate."""
    config = transformers.Gemma3TextConfig(
        **SIZES,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def _gemma4() -> Any:
    """Layers differ in head_dim, and the last two use the keys of earlier ones."""
    config = transformers.Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": 6, "num_attention_heads": 4},
        sliding_window=9,
        global_head_dim=64,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
    )
    return transformers.Gemma4ForCausalLM(config)


def _gpt_oss() -> Any:
    """A learned sink for each head takes part in the softmax."""
    config = transformers.GptOssConfig(
        **SIZES,
        sliding_window=9,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt_oss": _gpt_oss,
}
_made: dict[str, Any] = {}


def make_model(name: str) -> Any:
    """Give the model of this name, made once, always with the same weights."""
    if name not in _made:
        torch.manual_seed(len(name))
        _made[name] = MODELS[name]().eval()
    model = _made[name]
    model.set_attn_implementation("mixedkv")
    return model


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


# Two ways to lose nothing: everything stays hot, or a small hot tier and a cold one of f32.
ALL_HOT = {"hot_size": 128, "cold_size": 32, "threshold": 1.0}
ALL_F32 = {
    "hot_size": 16,
    "cold_size": 128,
    "group_size": 4,
    "n_pad": 8,
    "cold_k_type": "f32",
    "cold_v_type": "f32",
}


@pytest.fixture(params=["all_hot", "moving"])
def lossless(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a cache that keeps every bit of f32."""
    sizes = ALL_HOT if request.param == "all_hot" else ALL_F32
    return {**sizes, "hot_k_type": "f32", "hot_v_type": "f32"}


def tokens(rows: int, columns: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, columns), generator=generator)


def padded(lengths: list[int], seed: int = 0) -> tuple[Any, Any]:
    """Left-padded rows and their mask."""
    ids = tokens(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return ids * mask, mask


def eager(model: Any, ids: Any, **kwargs: Any) -> Any:
    """What transformers generates by itself."""
    model.set_attn_implementation("eager")
    try:
        return generate(model, ids, **kwargs)
    finally:
        model.set_attn_implementation("mixedkv")


def generate(model: Any, ids: Any, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **kwargs)


def eager_logits(model: Any, ids: Any, **kwargs: Any) -> Any:
    model.set_attn_implementation("eager")
    try:
        return model(ids, use_cache=False, **kwargs).logits
    finally:
        model.set_attn_implementation("mixedkv")


def assert_same(a: Any, b: Any) -> None:
    assert a.tolist() == b.tolist()


def assert_close(got: Any, expected: Any) -> None:
    """Equal up to the rounding of a few layers in f32."""
    error = (got - expected).norm() / expected.norm()
    assert error < 1e-5
