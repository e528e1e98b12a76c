"""Small random models and a tokenizer of a few words, for the tests of tools."""

from collections.abc import Iterator
from typing import Any

import mixedkv.integrations.transformers as mkt
import pytest
import torch
import transformers
from mixedkv.tools import models

WORDS = (
    *("the", "a", "cache", "key", "value", "token", "of", "is", "holds", "moves", "."),
    *("secret", "number", "As", "said", "above,", "The"),
)
VOCABULARY = 96


class Words:
    """A token for each word it knows, one for each character of others; 0 begins a text."""

    def __init__(self, begins: bool = True) -> None:
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [0] if self.begins and add_special_tokens else []
        for word in text.split():
            if word in WORDS:
                ids.append(1 + WORDS.index(word))
            else:
                ids += [1 + len(WORDS) + ord(c) % (VOCABULARY - 1 - len(WORDS)) for c in word]
        return transformers.BatchEncoding({"input_ids": ids})


def llama(**sizes: Any) -> models.LoadedModel:
    config = transformers.LlamaConfig(**_sizes(sizes))
    return _loaded(transformers.LlamaForCausalLM(config))


def gemma3(**sizes: Any) -> models.LoadedModel:
    """Sliding layers and full ones in turn, the last one slides."""
    full = _sizes(sizes)
    kinds = ["full_attention", "sliding_attention"] * full["num_hidden_layers"]
    config = transformers.Gemma3TextConfig(
        **full, sliding_window=40, layer_types=kinds[-full["num_hidden_layers"] :]
    )
    return _loaded(transformers.Gemma3ForCausalLM(config))


def sum_in_float64(model: Any) -> None:
    """Let linear layers give the same f32 numbers for any number of rows."""

    def exact(layer: torch.nn.Linear) -> Any:
        weight = layer.weight.detach().double()
        return lambda x: (x.double() @ weight.T).float()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            module.forward = exact(module)


def _sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        **sizes,
    }


def _loaded(model: Any) -> models.LoadedModel:
    mkt.register()
    model.eval().set_attn_implementation("mixedkv")
    return models.LoadedModel("small", model, Words())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch spins between the many small products of a small model, to nobody's gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
