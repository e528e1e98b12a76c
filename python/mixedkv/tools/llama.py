"""llama.cpp through llama-cpp-python, as far as tracing and evaluating have it in common.

Needs the extra ``mixedkv[llama]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_quiet: Any = None
"""The callback that takes llama.cpp's log; it must outlive every model."""


@contextmanager
def loaded_model(path: Path) -> Iterator[Any]:
    """Load a GGUF file on the CPU, and give llama.cpp's pointer to it; freed at the end.

    Raises
    ------
    ValueError
        It is no file that llama.cpp can load.
    """
    import llama_cpp

    global _quiet
    if not path.is_file():
        raise ValueError(f"{path} is not a GGUF file: llama.cpp runs nothing else")
    _quiet = _quiet or llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise ValueError(f"llama.cpp can't load {path}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def context_params(k_type: int, v_type: int, threads: int | None) -> Any:
    """Give the parameters of a context on the CPU with flash attention.

    Parameters
    ----------
    k_type, v_type
        Types of the cache, by ggml's numbers.
    threads
        None: llama.cpp's own choice.
    """
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.type_k, params.type_v = k_type, v_type
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.offload_kqv = params.op_offload = False
    if threads is not None:
        params.n_threads = params.n_threads_batch = threads
    return params
