"""OpenVINO's paged attention: the operator that its continuous batching serves models with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem, aligned_empty
from ..shapes import DEFAULT_FORMATS
from . import AbsentError, Arithmetic, Contender, Peer, Task, imported, rival

#: Tokens of a block; the CPU plugin knows one size.
_BLOCK = 32
#: Bytes of a scale and a zero point, f32 each.
_PARAMETERS = 8


@dataclass(frozen=True)
class _Kind:
    """Types of cache and arithmetic."""

    kv_type: str
    arithmetic: Arithmetic
    tolerance: float


_DECODE = (
    _Kind("f16", "f32", 1e-4),
    _Kind("bf16", "bf16", 3e-2),
    _Kind("u8", "f32", 1e-4),
    _Kind("u4", "f32", 1e-4),
)
_PREFILL = (
    *_DECODE,
    _Kind("u8", "bf16", 3e-2),
    _Kind("u4", "bf16", 3e-2),
)


class OpenVino(Peer):
    """OpenVINO as a peer."""

    name = "openvino"

    def __init__(self, openvino: Any) -> None:
        super().__init__()
        self._ov = openvino
        self._core = openvino.Core()
        self.version: str = openvino.__version__
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._has_bf16 = "BF16" in capabilities

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return paged attention by types of cache and arithmetic."""
        kinds: Sequence[_Kind] = _DECODE if task == "decode" else _PREFILL
        return [
            self._contender(problem, kind, against)
            for kind in kinds
            if kind.arithmetic == "f32" or self._has_bf16
            if (against := rival(kind.kv_type, formats)) is not None
        ]

    def _contender(self, problem: Problem, kind: _Kind, against: str) -> Contender:
        paged = _Paged(self._ov, self._core, problem, kind)
        return Contender(
            peer=self.name,
            name=f"OpenVINO paged {kind.kv_type}"
            + (", bf16 math" if kind.arithmetic == "bf16" else ""),
            kv_type=kind.kv_type,
            against=against,
            kv_bytes=paged.kv_bytes,
            answer=lambda: problem.answer(f"openvino {kind.kv_type} {kind.arithmetic}", paged.rows),
            tolerance=kind.tolerance,
            bind=paged.bind,
            result=paged.result,
            arithmetic=kind.arithmetic,
        )


class _Paged:
    """A paged cache that holds a problem's keys and values, and the calls on it."""

    def __init__(self, ov: Any, core: Any, problem: Problem, kind: _Kind) -> None:
        self._ov = ov
        self._core = core
        self._problem = problem
        self._kind = kind
        self._model = self._build()
        self._blocks = -(-problem.kv_len // _BLOCK)
        self._bound: tuple[Any, Any] = None, None
        compiled = self._compile(1)
        self._caches = {
            name: self._cache(compiled.input(name)) for name in ("key_cache.0", "value_cache.0")
        }
        self.kv_bytes = float(sum(memory.nbytes for memory, _ in self._caches.values()))
        self._fill(compiled)

    def _build(self) -> Any:
        op, types = self._ov.op, self._ov.Type
        hq, hkv, d = self._problem.shape.sizes

        def parameter(name: str, kind: Any, *sizes: int) -> Any:
            one = op.Parameter(kind, self._ov.PartialShape(list(sizes)))
            one.set_friendly_name(name)
            one.get_output_tensor(0).set_names({name})
            return one

        def constant(value: Any, dtype: Any) -> Any:
            return op.Constant(np.array(value, dtype))

        parameters = [
            parameter("q", types.f32, -1, hq * d),
            parameter("k", types.f32, -1, hkv * d),
            parameter("v", types.f32, -1, hkv * d),
            # The plugin chooses type and layout of the caches.
            parameter("key_cache.0", types.dynamic, -1, _BLOCK, -1),
            parameter("value_cache.0", types.dynamic, -1, _BLOCK, -1),
            parameter("past_lens", types.i32, -1),
            parameter("subsequence_begins", types.i32, -1),
            parameter("block_indices", types.i32, -1),
            parameter("block_indices_begins", types.i32, -1),
            parameter("max_context_len", types.i32),
            parameter("score_aggregation_window", types.i32, -1),
        ]
        inputs = [
            *parameters[:9],
            constant(self._problem.sm_scale, np.float32),
            constant(0, np.int32),  # sliding window
            constant([], np.float32),  # ALiBi slopes
            *parameters[9:],
            # Rotation of cached keys: indices, deltas, table.
            constant([], np.int32),
            constant(np.zeros((0, 1)), np.int32),
            constant(np.zeros((0, 1)), np.float32),
            # Sparse attention (xattention): threshold, block size, stride.
            constant([], np.float32),
            constant(64, np.int32),
            constant(8, np.int32),
            constant([], np.float32),  # sinks
            # Adaptive eviction: start size, evictable sizes, block sets and their begins.
            constant(0, np.int32),
            constant([], np.int32),
            constant([], np.int32),
            constant([], np.int32),
            constant([], np.int32),  # token types
            # Masks among draft tokens, and their begins.
            constant([], np.uint8),
            constant([], np.int32),
        ]
        node = op._PagedAttentionExtension([one.output(0) for one in inputs])
        info = node.get_rt_info()
        for name, value in (
            ("num_k_heads", hkv),
            ("k_head_size", d),
            ("num_v_heads", hkv),
            ("v_head_size", d),
        ):
            info[name] = value
        return self._ov.Model([node.output(0)], parameters, "attention")

    def _compile(self, threads: int) -> Any:
        kind = self._kind
        return self._core.compile_model(
            self._model,
            "CPU",
            {
                "KEY_CACHE_PRECISION": kind.kv_type,
                "VALUE_CACHE_PRECISION": kind.kv_type,
                "INFERENCE_PRECISION_HINT": kind.arithmetic,
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                # Pinned threads would sit where other contenders run.
                "ENABLE_CPU_PINNING": False,
            },
        )

    def _cache(self, port: Any) -> tuple[NDArray[np.uint8], Any]:
        """Return zeroed memory for a cache in the plugin's type and layout, and its tensor."""
        element = port.get_element_type()
        sizes = [one.get_length() if one.is_static else 0 for one in port.get_partial_shape()]
        sizes[0] = self._blocks
        size = int(np.prod(sizes)) * element.bitwidth // 8
        memory = aligned_empty((size,), np.uint8)
        memory.fill(0)
        if element.bitwidth >= 8:
            view = memory.view({8: np.uint8, 16: np.uint16}[element.bitwidth])
            return memory, self._ov.Tensor(view, self._ov.Shape(sizes), element)
        return memory, self._ov.Tensor(memory, self._ov.Shape(sizes), element)

    def _fill(self, compiled: Any) -> None:
        """Write the tokens before the queries: a block a sequence, all of them in one call."""
        hq, _, d = self._problem.shape.sizes
        past = self._problem.kv_len - self._problem.qo_len
        if not past:
            return
        blocks = -(-past // _BLOCK)
        request = compiled.create_infer_request()
        keep = self._set(
            request,
            q=np.zeros((past, hq * d), np.float32),
            k=self._tokens(self._problem.k, 0, past),
            v=self._tokens(self._problem.v, 0, past),
            past_lens=np.zeros(blocks, np.int32),
            subsequence_begins=np.minimum(np.arange(blocks + 1) * _BLOCK, past),
            block_indices=np.arange(blocks),
            block_indices_begins=np.arange(blocks + 1),
            max_context_len=np.array(_BLOCK),
            score_aggregation_window=np.zeros(blocks, np.int32),
        )
        request.infer()
        del keep

    def bind(self, threads: int) -> Callable[[], object]:
        """Return the call for a number of threads."""
        problem = self._problem
        n, queries = problem.kv_len, problem.qo_len
        request = self._compile(threads).create_infer_request()
        keep = self._set(
            request,
            q=self._tokens(problem.q, 0, queries),
            k=self._tokens(problem.k, n - queries, n),
            v=self._tokens(problem.v, n - queries, n),
            past_lens=np.array([n - queries]),
            subsequence_begins=np.array([0, queries]),
            block_indices=np.arange(self._blocks),
            block_indices_begins=np.array([0, self._blocks]),
            max_context_len=np.array(n),
            score_aggregation_window=np.zeros(1, np.int32),
        )
        self._bound = request, keep
        infer = request.infer

        # The default argument keeps the tensors' memory alive with the call.
        def call(_keep: object = keep) -> None:
            infer()

        return call

    def result(self) -> NDArray[np.float32]:
        """Return the last bound call's result [Hq, qo_len, D]."""
        hq, _, d = self._problem.shape.sizes
        request, _ = self._bound
        data = np.array(request.get_output_tensor(0).data, np.float32)
        heads: NDArray[np.float32] = data.reshape(self._problem.qo_len, hq, d).swapaxes(0, 1)
        return heads

    def _tokens(self, x: NDArray[Any], begin: int, end: int) -> NDArray[np.float32]:
        """Return [heads, n, d] as f32 [end - begin, heads * d]."""
        rows: NDArray[np.float32] = np.array(x[:, begin:end].swapaxes(0, 1), np.float32, order="C")
        tokens: NDArray[np.float32] = rows.reshape(end - begin, -1)
        return tokens

    def _set(self, request: Any, **arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """Give a request its inputs, and return the arrays that it will read."""
        tensor = self._ov.Tensor
        kept = []
        for name, array in arrays.items():
            own = array if array.dtype == np.float32 else array.astype(np.int32)
            kept.append(np.ascontiguousarray(own) if own.ndim else own)
            request.set_tensor(name, tensor(kept[-1], shared_memory=bool(own.ndim)))
        for name, (_, cache) in self._caches.items():
            request.set_tensor(name, cache)
        return kept

    def rows(self, head: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what the cache holds of a kv head: K and V [kv_len, d]."""
        _, hkv, d = self._problem.shape.sizes
        k, v = (memory.reshape(self._blocks, hkv, -1) for memory, _ in self._caches.values())
        return self._keys(k[:, head], d), self._values(v[:, head], d)

    def _keys(self, blocks: NDArray[np.uint8], d: int) -> NDArray[Any]:
        """Quantised keys: a scale and a zero point a channel of each block, then its rows."""
        if self._kind.kv_type in ("f16", "bf16"):
            return self._halves(blocks, d)
        head = np.ascontiguousarray(blocks[:, : _PARAMETERS * d]).view(np.float32)
        scale, zero = head[:, None, :d], head[:, None, d:]
        codes = self._codes(blocks[:, _PARAMETERS * d :]).reshape(self._blocks, _BLOCK, d)
        return ((codes - zero) * scale).reshape(-1, d)[: self._problem.kv_len]

    def _values(self, blocks: NDArray[np.uint8], d: int) -> NDArray[Any]:
        """Quantised values: a scale and a zero point before each row."""
        if self._kind.kv_type in ("f16", "bf16"):
            return self._halves(blocks, d)
        rows = blocks.reshape(self._blocks * _BLOCK, -1)[: self._problem.kv_len]
        head = np.ascontiguousarray(rows[:, :_PARAMETERS]).view(np.float32)
        codes = self._codes(rows[:, _PARAMETERS:])
        return (codes - head[:, 1:]) * head[:, :1]

    def _halves(self, blocks: NDArray[np.uint8], d: int) -> NDArray[Any]:
        rows = np.ascontiguousarray(blocks).reshape(-1, 2 * d)[: self._problem.kv_len]
        if self._kind.kv_type == "f16":
            return rows.view(np.float16)
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def _codes(self, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return codes as numbers; of two in a byte the first is the upper one."""
        if self._kind.kv_type == "u8":
            return packed.astype(np.float32)
        codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.float32)
        codes[:, ::2] = packed >> 4
        codes[:, 1::2] = packed & 15
        return codes


def load() -> OpenVino:
    """Return OpenVINO, or raise AbsentError."""
    (openvino,) = imported("openvino")
    if not hasattr(openvino.op, "_PagedAttentionExtension"):
        raise AbsentError(
            f"openvino {openvino.__version__} shows Python no paged attention: "
            "pip install --upgrade openvino"
        )
    return OpenVino(openvino)
