"""Recording llama.cpp: what its flash attention got and gave.

llama.cpp runs a GGUF model through llama-cpp-python; its eval callback hands out the graph's
tensors. At each flash attention node the sources (Q, K, V, mask) and the result are copied out, by
their strides: Q, K and V are views whose shapes say nothing of how they lie in memory.

Needs the extra ``mixedkv[llama]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from ..llama import context_params, loaded_model
from ..progress import SILENT, Progress
from .format import LayerInfo, TraceHeader
from .gguf_file import FORMATS
from .layout import watched
from .record import Listener, Recorder, Recording, Settings
from .stored import Rows, copied

ROUNDING = {"f16": 5e-3, "q4_0": 3e-2}
"""Relative error (norm over norm, a step) of llama.cpp's own attention against exact arithmetic,
by the cache's type: what it may come to in a sound trace of some hundred keys. It adds up f16
values in f16, which rounds the sum by up to 2^-11 at every key, so that the error grows with the
root of their number; for Q4_0 keys it rounds the query to 8 bits a value, and that goes into
exponents. `verify` fails both by default; with a tolerance of this size it still tells permuted
outputs and exchanged heads, which are off by about as much as the output itself."""

_NODE = b"FLASH_ATTN_EXT"
_MAX_SOURCES = 10


class _Tensor(ctypes.Structure):
    """struct ggml_tensor, as far as its name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_float * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * _MAX_SOURCES),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def record(
    path: Path,
    prompt: str,
    settings: Settings,
    *,
    prompt_tokens: int | None = None,
    listener: Listener | None = None,
    progress: Progress = SILENT,
) -> Recording:
    """Run a GGUF model over a prompt and some decode steps, and record its attention.

    Parameters
    ----------
    prompt_tokens
        Cut the prompt to that many tokens.

    Raises
    ------
    ValueError
        The model can't be loaded, or the settings don't fit it.
    """
    import llama_cpp

    with loaded_model(path) as model:
        tokens = _tokenize(llama_cpp, model, prompt)[:prompt_tokens]
        if not tokens:
            raise ValueError("the prompt has no token")
        header = TraceHeader(
            engine="llama.cpp",
            engine_version=f"llama-cpp-python {llama_cpp.__version__}",
            model=path.stem,
            cache="standard",
        )
        recorder = Recorder(header, llama_cpp.llama_model_n_layer(model), settings, listener)
        watcher = _Watcher(_ggml(llama_cpp), recorder, settings)
        callback = llama_cpp.ggml_backend_sched_eval_callback(watcher)
        context = llama_cpp.llama_init_from_model(
            model, _context_params(settings, len(tokens), callback)
        )
        if not context:
            raise ValueError("llama.cpp refuses these settings (cache types, length)")
        try:
            _run(llama_cpp, model, context, watcher, tokens, settings, progress)
        finally:
            llama_cpp.llama_free(context)
    return recorder.finish()


def _tokenize(llama_cpp: Any, model: Any, prompt: str) -> list[int]:
    vocab = llama_cpp.llama_model_get_vocab(model)
    raw = prompt.encode()
    room = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, len(room), True, False)
    if count < 0:
        raise ValueError("llama.cpp can't tokenize the prompt")
    return list(room[:count])


def _context_params(settings: Settings, prompt: int, callback: Any) -> Any:
    params = context_params(
        number_of(settings.k_type), number_of(settings.v_type), settings.threads
    )
    # The whole prompt is one step.
    params.n_ctx = prompt + settings.steps + 1
    params.n_batch = params.n_ubatch = prompt
    params.cb_eval = callback
    return params


def number_of(name: str) -> int:
    """Give ggml's number of a format."""
    number = mkv.formats.info(name).ggml_type
    if number is None:
        raise ValueError(f"llama.cpp has no {name}")
    return number


def _run(
    llama_cpp: Any,
    model: Any,
    context: Any,
    watcher: _Watcher,
    prompt: list[int],
    settings: Settings,
    progress: Progress,
) -> None:
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rng = np.random.default_rng(settings.seed)
    fed = prompt
    for step in range(1, settings.steps + 2):
        watcher.recorder.begin(step, fed)
        array = (llama_cpp.llama_token * len(fed))(*fed)
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(fed)))
        if watcher.error is not None:
            raise watcher.error
        if code:
            raise ValueError(f"llama.cpp failed in step {step} with code {code}")
        progress.at(step, settings.steps + 1)
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        logits = np.ctypeslib.as_array(pointer, (vocab_size,)).astype(np.float64)
        token = int(logits.argmax())
        if settings.sample:
            weights = np.exp(logits - logits.max())
            token = int(rng.choice(vocab_size, p=weights / weights.sum()))
        fed = [token]


def _ggml(llama_cpp: Any) -> Any:
    """Give the ggml library that llama_cpp has loaded, with two functions declared."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = [*folder.glob("libggml-base.*"), *folder.glob("ggml-base.*")]
    for name in sorted(found, key=lambda one: len(one.name)):
        library = ctypes.CDLL(str(name))
        for function in ("ggml_op_desc", "ggml_get_name"):
            getattr(library, function).restype = ctypes.c_void_p
            getattr(library, function).argtypes = [ctypes.c_void_p]
        return library
    raise ValueError(f"llama-cpp-python has no ggml library in {folder}")


class _Watcher:
    """The eval callback: asked of every node, then told when the wanted ones are computed."""

    def __init__(self, ggml: Any, recorder: Recorder, settings: Settings) -> None:
        self.ggml = ggml
        self.recorder = recorder
        self.settings = settings
        self.error: Exception | None = None

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        # An exception must not cross llama.cpp: it is kept, and the graph is broken off.
        try:
            if ctypes.string_at(self.ggml.ggml_op_desc(address)) != _NODE:
                return not ask
            node = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
            if self.ggml.ggml_get_name(address) != address + _Tensor.name.offset:
                raise ValueError("this llama.cpp lays its tensors out in another way")
            layer = _layer_of(node.src[1])
            if layer not in self.recorder.wanted:
                return not ask
            if not ask:
                self._record(node, layer)
        except Exception as error:
            self.error = error
            return False
        return True

    def _record(self, node: _Tensor, layer: int) -> None:
        if not node.src[3]:
            raise ValueError(f"layer {layer}: llama.cpp attends without a mask")
        # ggml's order: Q [D, n, Hq], K and V [D, kv, Hkv], mask [kv, n], result [Dv, Hq, n].
        q = watched("Q, llama.cpp's view", _view(node.src[0].contents))
        k = watched("K, llama.cpp's view", _view(node.src[1].contents))
        v = watched("V, llama.cpp's view", _view(node.src[2].contents))
        mask = watched("mask, llama.cpp's", _view(node.src[3].contents))
        out = watched("kqv_out, llama.cpp's [query, head, dim]", _view(node))
        if any(array.shape[0] != 1 for array in (q, k, v, mask, out)) or mask.shape[1] != 1:
            raise ValueError(f"layer {layer}: llama.cpp attends over several streams at once")
        n = q.shape[2]
        mask = mask[0, 0, :n]
        # Cells behind the last one that some query sees are padding, and hold anything.
        kv = int(np.flatnonzero(~np.isneginf(mask).all(0)).max()) + 1
        scale, alibi, cap = (float(x) for x in node.op_params[:3])
        if alibi:
            raise ValueError(f"layer {layer}: ALiBi can't be recorded")
        sinks = None
        if node.src[4]:
            sinks = tuple(float(x) for x in _view(node.src[4].contents).ravel())
        tensors: dict[str, Rows] = {
            "kqv_out": np.array(out[0], np.float32, order="C").reshape(n, -1),
            "q": np.array(q[0], np.float32, order="C"),
            "k": copied(k[0, :, :kv]),
            "v": copied(v[0, :, :kv]),
            "mask": np.array(mask[:, :kv], order="C"),
        }
        for role, array in tensors.items():
            watched(f"{role}, copied", array)
        for name, asked, source in (
            ("k", self.settings.k_type, node.src[1]),
            ("v", self.settings.v_type, node.src[2]),
        ):
            # The cache may be of one type, and what its attention reads of another.
            found = FORMATS[source.contents.type].name
            if found != asked:
                notes = self.recorder.header.notes
                notes[f"cast_{name}"] = f"{asked} in the cache, {found} in attention"
        info = LayerInfo(
            num_qo_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            head_dim_v=out.shape[3],
            # ggml divides the scale by the cap that it multiplies with again.
            sm_scale=scale,
            logits_soft_cap=cap,
            sinks=sinks,
        )
        self.recorder.add(layer, info, tensors)


def _layer_of(pointer: Any) -> int:
    """Find the layer by the cache's name behind a view, cache_k_l<layer>; -1: there is none."""
    for _ in range(16):
        if not pointer:
            return -1
        tensor = pointer.contents
        match = re.match(rb"cache_k_l(\d+)", tensor.name)
        if match is not None:
            return int(match[1])
        pointer = tensor.view_src or tensor.src[0]
    return -1


def _view(tensor: _Tensor) -> Any:
    """View a tensor in llama.cpp's memory, in C order and by its strides.

    Float32 or float16 [ne3, ne2, ne1, ne0], or a QuantizedArray of that shape.
    """
    ne, nb = list(tensor.ne)[::-1], list(tensor.nb)[::-1]
    format = FORMATS.get(tensor.type)
    if format is None:
        raise ValueError(f"llama.cpp's tensor {tensor.name!r} has the ggml type {tensor.type}")
    dtype: np.dtype[Any] = np.dtype(np.float32 if format.name == "f32" else np.float16)
    if format.packed:
        dtype = np.dtype(np.uint8)
        ne[3], nb[3] = format.row_bytes(ne[3]), 1
    if not tensor.data or math.prod(ne) == 0:
        raise ValueError(f"llama.cpp's tensor {tensor.name!r} has no data")
    span = sum((n - 1) * stride for n, stride in zip(ne, nb, strict=True)) + dtype.itemsize
    memory = (ctypes.c_char * span).from_address(tensor.data)
    view: NDArray[Any] = np.ndarray(ne, dtype, memory, strides=nb)
    return mkv.QuantizedArray(view, format.name) if format.packed else view
