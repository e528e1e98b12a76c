"""ggml's CPU operators, by ctypes on its shared libraries; its bytes lie as llama.cpp lays them.

Only exported functions are called: tensors get their memory through ggml's own buffers, so that no
offset of a structure is assumed. The one structure read is the head of ``ggml_cplan``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import KINDS, Problem, Rows, aligned, aligned_empty
from . import AbsentError, Contender, Conversion, Peer, Task

#: Environment variable that names the directory of ggml's shared libraries.
ENV = "MIXEDKV_GGML_DIR"

_F32, _F16, _Q4_0 = 0, 1, 2
_TYPES = {"f16": _F16, "q4_0": _Q4_0}
#: Values that a conversion takes in one call: what the first step leaves stays in cache.
_CHUNK = 32768
#: Values from which a conversion is worth handing out to threads.
_PARALLEL = 1 << 21


def _tolerance(kv_type: str, kv_len: int) -> float:
    """Return the error that ggml's arithmetic explains.

    With f16 keys it accumulates in f16, more roughly the longer the context is; with Q4_0 keys it
    rounds the query to 8 bits.
    """
    return 1e-2 * math.sqrt(max(1.0, kv_len / 1024)) if kv_type == "f16" else 2e-2


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class _CPlan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        # Room for whatever follows in the version at hand.
        ("rest", ctypes.c_uint8 * 108),
    ]


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def find_libraries(directory: Path | None) -> Path | None:
    """Return where libggml-base.so and libggml-cpu.so lie together, or None.

    Looks in the directory given, in $MIXEDKV_GGML_DIR, where ``--build-ggml`` builds, and in an
    installed llama-cpp-python, in this order; the first two may hold them in a subdirectory.
    """
    from .ggml_build import build_directory

    places: list[Path] = []
    if directory is not None:
        places.append(directory)
    elif os.environ.get(ENV):
        places.append(Path(os.environ[ENV]))
    else:
        built = build_directory()
        if built is not None:
            places.append(built)
        spec = importlib.util.find_spec("llama_cpp")
        if spec is not None:
            places += [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        for sub in ("", "src", "lib", "bin", "build/src", "build/bin"):
            if all((place / sub / f"libggml-{part}.so").is_file() for part in ("base", "cpu")):
                return place / sub
    return None


class _Library:
    """The functions in use, typed."""

    def __init__(self, directory: Path) -> None:
        base = ctypes.CDLL(str(directory / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"))
        p, size, f32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
        i32, i64 = ctypes.c_int, ctypes.c_int64

        def bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
            return function

        self.version = bind(base, "ggml_version", ctypes.c_char_p)
        self.init = bind(base, "ggml_init", p, _InitParams)
        self.free = bind(base, "ggml_free", None, p)
        self.new_tensor_4d = bind(base, "ggml_new_tensor_4d", p, p, i32, i64, i64, i64, i64)
        self.permute = bind(base, "ggml_permute", p, p, p, i32, i32, i32, i32)
        self.flash_attn_ext = bind(base, "ggml_flash_attn_ext", p, p, p, p, p, p, f32, f32, f32)
        self.mul_mat = bind(base, "ggml_mul_mat", p, p, p, p)
        self.soft_max_ext = bind(base, "ggml_soft_max_ext", p, p, p, p, f32, f32)
        self.new_graph = bind(base, "ggml_new_graph", p, p)
        self.build_forward_expand = bind(base, "ggml_build_forward_expand", None, p, p)
        self.nbytes = bind(base, "ggml_nbytes", size, p)
        self.buffer_from_ptr = bind(base, "ggml_backend_cpu_buffer_from_ptr", p, p, size)
        self.buffer_free = bind(base, "ggml_backend_buffer_free", None, p)
        self.tensor_alloc = bind(base, "ggml_backend_tensor_alloc", i32, p, p, p)
        self.view_init = bind(base, "ggml_backend_view_init", i32, p)
        self.quantize_chunk = bind(base, "ggml_quantize_chunk", size, i32, p, p, i64, i64, i64, p)
        self.get_type_traits = bind(base, "ggml_get_type_traits", ctypes.POINTER(_TypeTraits), i32)
        self.cpu_init = bind(cpu, "ggml_cpu_init", None)
        self.graph_plan = bind(cpu, "ggml_graph_plan", _CPlan, p, i32, p)
        self.graph_compute = bind(cpu, "ggml_graph_compute", i32, p, ctypes.POINTER(_CPlan))
        self.f16_to_f32 = bind(cpu, "ggml_cpu_fp16_to_fp32", None, p, p, i64)
        self.f32_to_f16 = bind(cpu, "ggml_cpu_fp32_to_fp16", None, p, p, i64)
        self.has = {
            name: bool(bind(cpu, f"ggml_cpu_has_{name}", i32)())
            for name in ("avx2", "avx512", "avx512_vnni", "neon", "dotprod")
            if hasattr(cpu, f"ggml_cpu_has_{name}")
        }
        self.cpu_init()


class _Graph:
    """A context, its tensors' memory, and a graph that computes the last one."""

    def __init__(self, library: _Library) -> None:
        self._library = library
        self._context = library.init(_InitParams(1 << 20, None, True))
        if not self._context:
            raise MemoryError("ggml_init")
        self._buffers: list[int] = []
        self._memory: list[NDArray[Any]] = []
        self._graph: int | None = None
        self._work: NDArray[np.uint8] | None = None

    def __del__(self) -> None:
        for buffer in self._buffers:
            self._library.buffer_free(buffer)
        self._library.free(self._context)

    def leaf(self, array: NDArray[Any], kind: int, *sizes: int) -> int:
        """Return a tensor over an array's memory, in ggml's order of sizes."""
        tensor: int = self._library.new_tensor_4d(self._context, kind, *sizes)
        self._give(tensor, array)
        return tensor

    def swapped(self, tensor: int) -> int:
        """Return a view with the second and third axes exchanged."""
        view: int = self._library.permute(self._context, tensor, 0, 2, 1, 3)
        if self._library.view_init(view) != 0:
            raise MemoryError("ggml_backend_view_init")
        return view

    def node(self, function: Callable[..., int], *arguments: Any) -> tuple[int, NDArray[Any]]:
        """Return an operator's f32 result, and its memory."""
        tensor = function(self._context, *arguments)
        memory = aligned_empty((self._library.nbytes(tensor) // 4,), np.float32)
        self._give(tensor, memory)
        return tensor, memory

    def _give(self, tensor: int, array: NDArray[Any]) -> None:
        library = self._library
        if library.nbytes(tensor) != array.nbytes:
            raise RuntimeError(f"{library.nbytes(tensor)} bytes in ggml, {array.nbytes} here")
        buffer = library.buffer_from_ptr(array.ctypes.data, array.nbytes)
        self._buffers.append(buffer)
        self._memory.append(array)
        if library.tensor_alloc(buffer, tensor, array.ctypes.data) != 0:
            raise MemoryError("ggml_backend_tensor_alloc")

    def finish(self, tensor: int) -> None:
        """Take the graph that ends in a tensor."""
        self._graph = self._library.new_graph(self._context)
        self._library.build_forward_expand(self._graph, tensor)

    def bind(self, threads: int) -> Callable[[], object]:
        """Return the call that computes the graph."""
        graph, compute = self._graph, self._library.graph_compute
        plan = self._library.graph_plan(graph, threads, None)
        work = aligned_empty((max(plan.work_size, 64),), np.uint8)
        plan.work_data = work.ctypes.data
        pointer = ctypes.pointer(plan)

        # The arguments' defaults keep the graph's memory alive with the call.
        def call(_keep: tuple[Any, ...] = (self, work, plan)) -> None:
            if compute(graph, pointer) != 0:
                raise RuntimeError("ggml_graph_compute failed")

        return call


class Ggml(Peer):
    """ggml as a peer."""

    name = "ggml"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._library = _Library(directory)
        self.version = self._library.version().decode()
        features = [name for name, there in self._library.has.items() if there]
        self.notes = [f"ggml from {directory}, built with {', '.join(features) or 'no SIMD'}"]
        lacking = _cpu_features() - set(features)
        if lacking:
            self.notes.append(
                f"this ggml was not built for this machine (without {', '.join(sorted(lacking))}): "
                "its figures are too low; see mixedkv bench --build-ggml"
            )

    def attention(self, task: Task, problem: Problem) -> list[Contender]:
        """Return flash attention by type and layout, and matmul with softmax in f16."""
        return [
            *(
                self._flash(problem, kv_type, token_major=token_major)
                for kv_type in ("f16", "q4_0")
                for token_major in (False, True)
            ),
            self._matmul(problem),
        ]

    def _mask(self, problem: Problem, queries: int) -> NDArray[np.float16] | None:
        """Causal, -inf where hidden; none for a single query, which sees all."""
        if problem.qo_len == 1:
            return None
        last = problem.kv_len - problem.qo_len + np.arange(problem.qo_len)
        hidden = np.arange(problem.kv_len) > last[:, None]
        mask = np.where(hidden, np.float16(-np.inf), np.float16(0))
        return aligned(np.tile(mask, (queries // problem.qo_len, 1)))

    def _flash(self, problem: Problem, kv_type: str, *, token_major: bool) -> Contender:
        hq, hkv, d = problem.shape.sizes
        n, kind = problem.kv_len, _TYPES[kv_type]
        rows = (problem.k, problem.v) if kv_type == "f16" else (problem.k_q4_0, problem.v_q4_0)
        graph = _Graph(self._library)
        q = graph.leaf(problem.q, _F32, d, problem.qo_len, hq, 1)
        if token_major:
            # llama.cpp's cache: one token's heads side by side.
            k, v = (
                graph.swapped(graph.leaf(aligned(x.transpose(1, 0, 2)), kind, d, hkv, n, 1))
                for x in rows
            )
        else:
            k, v = (graph.leaf(np.ascontiguousarray(x), kind, d, n, hkv, 1) for x in rows)
        mask = self._mask(problem, problem.qo_len)
        tensor = None if mask is None else graph.leaf(mask, _F16, n, problem.qo_len, 1, 1)
        node, memory = graph.node(
            self._library.flash_attn_ext, q, k, v, tensor, problem.sm_scale, 0.0, 0.0
        )
        graph.finish(node)
        layout = "token-major" if token_major else "head-major"
        return Contender(
            peer=self.name,
            name=f"ggml {kv_type} flash, {layout}",
            kv_type=kv_type,
            against=kv_type,
            kv_bytes=n * problem.row_bytes(kv_type),
            answer=problem.answer_f16 if kv_type == "f16" else problem.answer_q4_0,
            tolerance=_tolerance(kv_type, n),
            bind=graph.bind,
            result=lambda: memory.reshape(problem.qo_len, hq, d).swapaxes(0, 1),
            # With many queries on f16 keys, flash attention computes tiles in f32.
            arithmetic="int8" if kv_type == "q4_0" else "f32" if problem.qo_len > 1 else "f16",
        )

    def _matmul(self, problem: Problem) -> Contender:
        """K times Q, softmax, V times the weights, the GQA group as further query rows.

        V lies transposed, as llama.cpp keeps it for this path.
        """
        hq, hkv, d = problem.shape.sizes
        n, queries = problem.kv_len, problem.qo_len * problem.shape.group
        graph = _Graph(self._library)
        q = graph.leaf(problem.q, _F32, d, queries, hkv, 1)
        k = graph.leaf(np.ascontiguousarray(problem.k), _F16, d, n, hkv, 1)
        v = graph.leaf(aligned(problem.v.swapaxes(1, 2)), _F16, n, d, hkv, 1)
        mask = self._mask(problem, queries)
        tensor = None if mask is None else graph.leaf(mask, _F16, n, queries, 1, 1)
        logits, _ = graph.node(self._library.mul_mat, k, q)
        weights, _ = graph.node(self._library.soft_max_ext, logits, tensor, problem.sm_scale, 0.0)
        node, memory = graph.node(self._library.mul_mat, v, weights)
        graph.finish(node)
        return Contender(
            peer=self.name,
            name="ggml f16 matmul + softmax",
            kv_type="f16",
            against="f16",
            kv_bytes=n * problem.row_bytes("f16"),
            answer=problem.answer_f16,
            tolerance=_tolerance("f16", n),
            bind=graph.bind,
            result=lambda: memory.reshape(hq, problem.qo_len, d),
            arithmetic="f16",
        )

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return conversions by rows; f16 goes through f32 a chunk at a time, as ggml does it."""
        return [self._conversion(kind, rows) for kind in KINDS]

    def _conversion(self, kind: str, rows: Rows) -> Conversion:
        source, target = rows.arrays(kind)
        n, width = rows.f32.shape
        step = max(1, _CHUNK // width)
        convert = self._converter(kind, width)
        source_row, target_row = source.strides[0], target.strides[0]

        def part(begin: int, end: int, scratch: NDArray[np.float32]) -> None:
            from_, to, between = source.ctypes.data, target.ctypes.data, scratch.ctypes.data
            for row in range(begin, end, step):
                count = min(step, end - row)
                convert(from_ + row * source_row, to + row * target_row, between, count)

        def bind(threads: int) -> Callable[[], object]:
            # ggml converts rows on one thread; more pay from some size on only.
            workers = threads if n * width >= _PARALLEL else 1
            scratches = [aligned_empty((step * width,), np.float32) for _ in range(workers)]
            if workers == 1:
                return lambda: part(0, n, scratches[0])
            pool = ThreadPoolExecutor(workers)
            cuts = [n * i // workers for i in range(workers + 1)]
            spans = list(zip(cuts, cuts[1:], scratches, strict=False))
            return lambda: list(pool.map(lambda span: part(*span), spans))

        return Conversion(self.name, self.name, kind, bind, lambda: target)

    def _converter(self, kind: str, width: int) -> Callable[[int, int, int, int], object]:
        """Return a function of source, target, scratch and a number of rows."""
        library = self._library
        to_float = _TO_FLOAT(library.get_type_traits(_Q4_0).contents.to_float)
        quantize, widen, narrow = library.quantize_chunk, library.f16_to_f32, library.f32_to_f16

        def f16_to_q4_0(source: int, target: int, scratch: int, count: int) -> None:
            widen(source, scratch, count * width)
            quantize(_Q4_0, scratch, target, 0, count, width, None)

        def q4_0_to_f16(source: int, target: int, scratch: int, count: int) -> None:
            to_float(source, scratch, count * width)
            narrow(scratch, target, count * width)

        def f32_to_q4_0(source: int, target: int, scratch: int, count: int) -> None:
            quantize(_Q4_0, source, target, 0, count, width, None)

        def q4_0_to_f32(source: int, target: int, scratch: int, count: int) -> None:
            to_float(source, target, count * width)

        return dict(zip(KINDS, (f32_to_q4_0, f16_to_q4_0, q4_0_to_f32, q4_0_to_f16), strict=True))[
            kind
        ]


def _cpu_features() -> set[str]:
    """Return which of the named features this CPU has, as far as the kernel says."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    except OSError:
        return set()
    names = {"avx2": "avx2", "avx512": "avx512f", "dotprod": "asimddp"}
    names["avx512_vnni"] = "avx512_vnni"
    return {name for name, flag in names.items() if flag in flags}


def load(directory: Path | None = None) -> Ggml:
    """Return ggml, or raise AbsentError."""
    place = find_libraries(directory)
    if place is None:
        looked = str(directory or os.environ.get(ENV) or "")
        raise AbsentError(
            f"libggml-base.so and libggml-cpu.so are not {f'in {looked}' if looked else 'there'}: "
            f"run mixedkv bench --build-ggml, or name their directory by --ggml-dir or {ENV}"
        )
    try:
        return Ggml(place)
    except (OSError, AttributeError) as error:
        raise AbsentError(f"the libraries in {place} can't be used: {error}") from None
