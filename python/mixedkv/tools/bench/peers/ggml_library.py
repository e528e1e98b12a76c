"""ggml's shared libraries by ctypes: the functions in use, typed, and graphs of them.

Only exported functions are called: tensors get their memory through ggml's own buffers, so that no
offset of a structure is assumed. What is read of structures are the heads of ``ggml_cplan`` and of
the two tables of what a type can do.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import aligned_empty

#: Environment variable that names the directory of ggml's shared libraries.
ENV = "MIXEDKV_GGML_DIR"

F32, F16 = 0, 1


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


class _CpuTraits(ctypes.Structure):
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
    ]


#: Converts so many values, from float or to it.
_CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


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


class Library:
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
        self.get_type_traits = bind(base, "ggml_get_type_traits", ctypes.POINTER(_TypeTraits), i32)
        self.get_cpu_traits = bind(cpu, "ggml_get_type_traits_cpu", ctypes.POINTER(_CpuTraits), i32)
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

    def from_float(self, kind: int) -> Any:
        """Return the function that makes a type's rows, as caches call it, or None."""
        address = self.get_cpu_traits(kind).contents.from_float
        return _CONVERT(address) if address else None

    def to_float(self, kind: int) -> Any:
        """Return the function that reads a type's rows, or None."""
        address = self.get_type_traits(kind).contents.to_float
        return _CONVERT(address) if address else None

    def attends(self, kind: int) -> bool:
        """Whether flash attention takes keys and values of a type; it ends the program else."""
        traits = self.get_cpu_traits(kind).contents
        queries = traits.vec_dot and self.from_float(traits.vec_dot_type) is not None
        return bool(queries and (kind == F32 or self.to_float(kind) is not None))


class Graph:
    """A context, its tensors' memory, and a graph that computes the last one."""

    def __init__(self, library: Library) -> None:
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
