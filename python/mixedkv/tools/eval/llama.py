"""llama.cpp's own caches, fed the same tokens: llama-cpp-python runs the GGUF file.

llama.cpp writes keys and values into its cache, in the cache's type, before it attends, so that a
chunk of tokens sees what tokens one by one would see. Its arithmetic differs from transformers' on
the same weights; its quantised caches are therefore compared with its own f16 one.

Needs the extra ``mixedkv[llama]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..llama import context_params

TYPES = ("f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
"""Types of llama.cpp's cache, of keys and of values."""

_BATCH = 512


def check_type(kind: str) -> None:
    """Raise ValueError where llama.cpp has no cache of this type."""
    if kind not in TYPES:
        raise ValueError(f"llama must be one of {', '.join(TYPES)}, got {kind!r}")


def _ggml_type(kind: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def bits_of(kind: str) -> float:
    """Give the bits of a value in a cache of llama.cpp's, one of `TYPES`."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[_ggml_type(kind)]
    return 8 * size / values


def feed(
    model: Any, inputs: torch.Tensor, first: int, kind: str, threads: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed tokens through an empty cache of a type, and give logits as they come.

    Parameters
    ----------
    model
        From `mixedkv.tools.llama.loaded_model`.
    inputs
        int64 [tokens].
    first
        Index of the first token after which logits are wanted.
    kind
        One of `TYPES`, of keys and of values.
    threads
        Of llama.cpp.

    Yields
    ------
    tuple
        Tokens fed so far, and the logits [n, vocabulary] after the last n of them; n may be 0.
    """
    import llama_cpp as lib

    tokens = inputs.tolist()
    number = int(_ggml_type(kind))
    params = context_params(number, number, threads)
    params.n_ctx = len(tokens)
    params.n_batch = params.n_ubatch = min(_BATCH, len(tokens))
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise ValueError(f"llama.cpp has no cache of type {kind} for this model")
    vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
    batch = lib.llama_batch_init(_BATCH, 0, 1)
    try:
        for begin in range(0, len(tokens), _BATCH):
            part = tokens[begin : begin + _BATCH]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, begin + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = begin + i >= first
            code = lib.llama_decode(context, batch)
            if code:
                raise ValueError(f"llama.cpp failed at token {begin} with code {code}")
            wanted = range(max(first - begin, 0), len(part))
            logits = np.empty((len(wanted), vocab_size), np.float32)
            for row, i in zip(logits, wanted, strict=True):
                row[:] = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocab_size,))
            yield begin + len(part), torch.from_numpy(logits)
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
