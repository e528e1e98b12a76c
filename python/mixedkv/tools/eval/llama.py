"""llama.cpp's own caches, fed the same tokens: llama-cpp-python runs the GGUF file.

llama.cpp writes keys and values into its cache, in the cache's type, before it attends, so that a
chunk of tokens sees what tokens one by one would see. Its arithmetic differs from transformers' on
the same weights; its quantised caches are therefore compared with its own f16 one.

Needs the extra ``mixedkv[llama]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixedkv as mkv

GGML_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20}
"""Types of llama.cpp's cache, and ggml's numbers for them."""

_BITS = {"q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0}
_BATCH = 512


def bits_of(kind: str) -> float:
    """Give the bits of a value in a cache of llama.cpp's."""
    return _BITS[kind] if kind in _BITS else mkv.formats.info(kind).bits


def check_type(kind: str) -> None:
    """Raise ValueError where llama.cpp has no cache of this type."""
    if kind not in GGML_TYPES:
        raise ValueError(f"llama must be one of {', '.join(GGML_TYPES)}, got {kind!r}")


class Model:
    """A GGUF model that llama.cpp runs.

    Parameters
    ----------
    path
        The file.
    threads
        Of llama.cpp.

    Raises
    ------
    ValueError
        It is no file that llama.cpp can load.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = threads
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ValueError(f"llama.cpp can't load {path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocab))

    def close(self) -> None:
        """Give the model's memory back."""
        self._lib.llama_model_free(self._model)

    def feed(
        self, inputs: torch.Tensor, first: int, kind: str
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Feed tokens through an empty cache of a type, and give logits as they come.

        Parameters
        ----------
        inputs
            int64 [tokens].
        first
            Index of the first token after which logits are wanted.
        kind
            One of `GGML_TYPES`, of keys and of values.

        Yields
        ------
        tuple
            Tokens fed so far, and the logits [n, vocabulary] after the last n of them; n may be 0.
        """
        lib, tokens = self._lib, inputs.tolist()
        params = lib.llama_context_default_params()
        params.n_ctx = len(tokens)
        params.n_batch = params.n_ubatch = min(_BATCH, len(tokens))
        params.type_k = params.type_v = GGML_TYPES[kind]
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.offload_kqv = params.op_offload = False
        params.n_threads = params.n_threads_batch = self._threads
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(f"llama.cpp has no cache of type {kind} for this model")
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
                rows = [
                    np.ctypeslib.as_array(
                        lib.llama_get_logits_ith(context, i), (self.vocab_size,)
                    ).copy()
                    for i in wanted
                ]
                empty = np.empty((0, self.vocab_size), np.float32)
                yield begin + len(part), torch.from_numpy(np.stack(rows) if rows else empty)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
