"""mixedkv as attention and as KV cache of Hugging Face transformers.

>>> import mixedkv.integrations.transformers as mkt
>>> mkt.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mixedkv")
>>> cache = mkt.MixedCache(model.config, cold_size=4096)
>>> model.generate(**inputs, past_key_values=cache)

Three parts work together:

- `cache.MixedCache` takes each layer's new keys and values. What it hands back to the model are
  not tensors to compute with but *handles* (`rows.CachedRows`): the rows stay in mixedkv. The
  native caches are in `groups`, a forward and its padding in `steps`, the rows and columns so far
  in `batch`, a layer's attention in `attending`, mixedkv's options in `options`.
- `masks.describe_mask`, registered as the mask function, says in a few words what the model
  masks: causal, a sliding window, padded columns; no [queries, keys] array is made.
- `attention.attention_forward`, registered as the attention function, finds the cache by the
  handle and lets it store the new rows and attend over everything it holds. Keys that are plain
  tensors (no cache, or a cache of transformers' own) go to `mixedkv.attention`.

Served: decoder layers with full or sliding-window causal attention, grouped query heads, soft
capped logits, learned attention sinks, keys and values of different width, layers that reuse
another layer's keys; `generate()` greedy, sampled, with beams, with left padding, in prefill
chunks, with assisted generation and prompt lookup, over several turns. Everything else is refused
with an error, never computed under a mask that is not the model's.

Not served: gradients, attention weights as output, dropout, devices other than the CPU, static
shapes and torch.compile, continuous batching, packed sequences, custom 4-D masks with a
MixedCache, chunked, linear and bidirectional attention with a MixedCache, and copy.deepcopy of a
cache that holds tokens. Where layers use the keys of an earlier layer again, a prompt longer than
the hot tier may have to come in chunks; an error tells.

Tried with transformers 5.20.0, 5.22.0 and 5.23.0, and torch 2.13.0.
"""

from .attention import attention_forward
from .cache import MixedCache
from .masks import describe_mask
from .options import preset_options
from .records import Observation, Occupancy
from .registry import NAME, register
from .rows import CachedRows

__all__ = [
    "NAME",
    "CachedRows",
    "MixedCache",
    "Observation",
    "Occupancy",
    "attention_forward",
    "describe_mask",
    "preset_options",
    "register",
]
