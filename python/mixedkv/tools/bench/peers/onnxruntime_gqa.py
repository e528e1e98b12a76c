"""onnxruntime's GroupQueryAttention, past and present sharing one buffer, called by IO binding."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem, aligned, aligned_empty, bits_of
from ..shapes import DEFAULT_FORMATS
from . import Contender, Peer, Task, imported, rival


@dataclass(frozen=True)
class _Kind:
    """A type of cache and the settings that go with it."""

    kv_type: str
    #: Element type of queries and results.
    q_type: Any
    tolerance: float
    #: Scales of a quantised cache: one a tensor, or one a channel of each head.
    scales: str = "NONE"
    bits: int = 0


_KINDS = (
    _Kind("f32", np.float32, 1e-4),
    _Kind("f16", np.float16, 3e-3),
    _Kind("int8", np.float32, 1e-4, "PER_CHANNEL", 8),
    _Kind("int4", np.float32, 1e-4, "PER_CHANNEL", 4),
)


class OnnxRuntime(Peer):
    """onnxruntime as a peer."""

    name = "onnxruntime"

    def __init__(self, onnxruntime: Any, onnx: Any) -> None:
        super().__init__()
        self._ort = onnxruntime
        self._onnx = onnx
        self.version: str = onnxruntime.__version__
        schemas = importlib.import_module("onnxruntime.capi._pybind_state")
        attributes: set[str] = set()
        for schema in schemas.get_all_operator_schema():
            if schema.name == "GroupQueryAttention":
                attributes |= set(schema.attributes)
        self._quantised = "kv_cache_bit_width" in attributes
        if not self._quantised:
            self.notes.append(
                f"onnxruntime {self.version} knows no quantised cache in GroupQueryAttention"
            )

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return GroupQueryAttention by type of its cache."""
        return [
            self._contender(problem, kind, against)
            for kind in _KINDS
            if self._quantised or not kind.bits
            if (against := rival(kind.kv_type, formats)) is not None
        ]

    def _model(self, problem: Problem, kind: _Kind) -> bytes:
        helper, types = self._onnx.helper, self._onnx.TensorProto
        hq, hkv, d = problem.shape.sizes
        q_type = types.FLOAT16 if kind.q_type is np.float16 else types.FLOAT
        kv_type = {
            "f32": types.FLOAT,
            "f16": types.FLOAT16,
            "int8": types.INT8,
            "int4": types.UINT8,
        }[kind.kv_type]
        cache = [1, hkv, None, d // 2 if kind.bits == 4 else d]
        info = helper.make_tensor_value_info
        inputs = [
            info("q", q_type, [1, None, hq * d]),
            info("k", q_type, [1, None, hkv * d]),
            info("v", q_type, [1, None, hkv * d]),
            info("past_k", kv_type, cache),
            info("past_v", kv_type, cache),
            info("seqlens_k", types.INT32, [1]),
            info("total", types.INT32, [1]),
        ]
        names = [one.name for one in inputs]
        attributes: dict[str, Any] = {
            "num_heads": hq,
            "kv_num_heads": hkv,
            "scale": problem.sm_scale,
        }
        if kind.bits:
            for name in ("k_scale", "v_scale"):
                inputs.append(info(name, types.FLOAT, [1, hkv, 1, d]))
            # Rotary caches, positions, bias and sinks come between, and are left out.
            names += ["", "", "", "", "", "k_scale", "v_scale"]
            attributes |= {
                "kv_cache_bit_width": kind.bits,
                "k_quant_type": kind.scales,
                "v_quant_type": kind.scales,
            }
        node = helper.make_node(
            "GroupQueryAttention",
            names,
            ["out", "present_k", "present_v"],
            domain="com.microsoft",
            **attributes,
        )
        outputs = [
            info("out", q_type, None),
            info("present_k", kv_type, None),
            info("present_v", kv_type, None),
        ]
        model = helper.make_model(
            helper.make_graph([node], "attention", inputs, outputs),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        )
        model.ir_version = 10
        serialized: bytes = model.SerializeToString()
        return serialized

    def _contender(self, problem: Problem, kind: _Kind, against: str) -> Contender:
        ort = self._ort
        hq, hkv, d = problem.shape.sizes
        n, queries = problem.kv_len, problem.qo_len
        k, k_scale = _encode(problem.k, kind)
        v, v_scale = _encode(problem.v, kind)

        def tokens(x: NDArray[Any]) -> NDArray[Any]:
            """[heads, n, d] as [1, n, heads * d]."""
            return aligned(x.swapaxes(0, 1).reshape(1, x.shape[1], -1).astype(kind.q_type))

        arrays: dict[str, NDArray[Any]] = {
            "q": tokens(problem.q),
            # The queries' own tokens, which the call writes into the cache.
            "k": tokens(problem.k[:, n - queries :]),
            "v": tokens(problem.v[:, n - queries :]),
            "past_k": k,
            "past_v": v,
            "seqlens_k": np.array([n - 1], np.int32),
            "total": np.array([n], np.int32),
        }
        if kind.bits:
            arrays |= {"k_scale": k_scale, "v_scale": v_scale}
        out = aligned_empty((1, queries, hq * d), kind.q_type)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        result = ort.OrtValue.ortvalue_from_numpy(out)
        model = self._model(problem, kind)

        def bind(threads: int) -> Callable[[], object]:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # Spinning bridges the gap to the next call, but would go on through others' turns.
            options.add_session_config_entry("session.intra_op.spin_duration_us", "2000")
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("out", result)
            binding.bind_ortvalue_output("present_k", values["past_k"])
            binding.bind_ortvalue_output("present_v", values["past_v"])
            run = session.run_with_iobinding
            return lambda: run(binding)

        def rows(head: int) -> tuple[NDArray[Any], NDArray[Any]]:
            """Return what the cache holds after the call."""
            held = values["past_k"].numpy()[0, head], values["past_v"].numpy()[0, head]
            if not kind.bits:
                return held
            k_codes, v_codes = (_decode(codes, kind) for codes in held)
            return k_codes * k_scale[0, head], v_codes * v_scale[0, head]

        q = arrays["q"].reshape(queries, hq, d).swapaxes(0, 1)
        return Contender(
            peer=self.name,
            name=f"onnxruntime GQA {kind.kv_type}",
            kv_type=kind.kv_type,
            against=against,
            kv_bytes=2 * hkv * d * n * bits_of(kind.kv_type) / 8,
            answer=lambda: problem.answer(f"onnxruntime {kind.kv_type}", rows, q),
            tolerance=kind.tolerance,
            bind=bind,
            result=lambda: result.numpy().reshape(queries, hq, d).swapaxes(0, 1),
            arithmetic="f16" if kind.q_type is np.float16 else "f32",
        )


def _encode(x: NDArray[np.float16], kind: _Kind) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Return the cache [1, heads, n, width] and its scales [1, heads, 1, d]."""
    heads, n, d = x.shape
    if not kind.bits:
        return aligned(x[None].astype(np.float32 if kind.kv_type == "f32" else np.float16)), (
            np.ones((1, heads, 1, d), np.float32)
        )
    most = 2 ** (kind.bits - 1) - 1
    dtype, width = (np.uint8, d // 2) if kind.bits == 4 else (np.int8, d)
    cache = aligned_empty((1, heads, n, width), dtype)
    scales = np.empty((1, heads, 1, d), np.float32)
    for head in range(heads):
        values = x[head].astype(np.float32)
        scales[0, head, 0] = np.abs(values).max(axis=0) / most
        codes = np.clip(np.rint(values / scales[0, head]), -most - 1, most).astype(np.int8)
        if kind.bits == 4:
            biased = (codes + 8).astype(np.uint8)
            codes = biased[:, ::2] | biased[:, 1::2] << 4
        cache[0, head] = codes
    return cache, scales


def _decode(codes: NDArray[Any], kind: _Kind) -> NDArray[np.float32]:
    """Return the codes [n, d] as numbers, before their scale."""
    if kind.bits == 8:
        return codes.astype(np.float32)
    values = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    values[:, ::2] = codes & 15
    values[:, 1::2] = codes >> 4
    values -= 8
    return values


def load() -> OnnxRuntime:
    """Return onnxruntime, or raise AbsentError."""
    return OnnxRuntime(*imported("onnxruntime", "onnx"))
