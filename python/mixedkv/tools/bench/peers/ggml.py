"""ggml's CPU operators; its bytes lie as llama.cpp lays them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from ..problem import Problem, Rows, aligned, aligned_empty
from ..shapes import DEFAULT_FORMATS
from . import AbsentError, Arithmetic, Contender, Conversion, Peer, Task
from .ggml_library import ENV, F16, F32, Graph, Library, find_libraries

#: Values that a conversion takes in one call: what the first step leaves stays in cache.
_CHUNK = 32768
#: Bytes that may differ when ggml packs: its vector code for 8 bits multiplies by what its own
#: definition divides by, and rounds a half to even, so that a code in a thousand is the next one.
_OTHER_BYTES = 5e-3
#: Values from which a conversion is worth handing out to threads.
_PARALLEL = 1 << 21


def _tolerance(kv_type: str, kv_len: int) -> float:
    """Return the error that ggml's arithmetic explains.

    With f16 keys it accumulates in f16, more roughly the longer the context is; with keys in blocks
    it rounds the query to 8 bits a value, with bf16 to those.
    """
    if kv_type == "f32":
        return 1e-4
    return 1e-2 * math.sqrt(max(1.0, kv_len / 1024)) if kv_type == "f16" else 2e-2


#: Converts from a source to a target, through a scratch, a number of rows.
_Converter = Callable[[int, int, int, int], object]


def _arithmetic(kv_type: str, qo_len: int) -> Arithmetic:
    """Return what flash attention rounds to."""
    if mkv.formats.info(kv_type).block_values > 1:
        return "int8"
    if kv_type == "bf16":
        return "bf16"
    # With many queries on f16 keys, flash attention computes tiles in f32.
    return "f16" if kv_type == "f16" and qo_len == 1 else "f32"


class Ggml(Peer):
    """ggml as a peer."""

    name = "ggml"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._library = Library(directory)
        self.version = self._library.version().decode()
        features = [name for name, there in self._library.has.items() if there]
        self.notes = [f"ggml from {directory}, built with {', '.join(features) or 'no SIMD'}"]
        lacking = _cpu_features() - set(features)
        if lacking:
            self.notes.append(
                f"this ggml was not built for this machine (without {', '.join(sorted(lacking))}): "
                "its figures are too low; see mixedkv bench --build-ggml"
            )

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return flash attention by type and layout, and matmul with softmax in f16."""
        kinds = {name: mkv.formats.info(name).ggml_type for name in formats}
        contenders = [
            self._flash(problem, kv_type, kind, token_major=token_major)
            for kv_type, kind in kinds.items()
            if kind is not None and self._library.attends(kind)
            for token_major in (False, True)
        ]
        return [*contenders, self._matmul(problem)] if "f16" in formats else contenders

    def _mask(self, problem: Problem, queries: int) -> NDArray[np.float16] | None:
        """Causal, -inf where hidden; none for a single query, which sees all."""
        if problem.qo_len == 1:
            return None
        last = problem.kv_len - problem.qo_len + np.arange(problem.qo_len)
        hidden = np.arange(problem.kv_len) > last[:, None]
        mask = np.where(hidden, np.float16(-np.inf), np.float16(0))
        return aligned(np.tile(mask, (queries // problem.qo_len, 1)))

    def _flash(self, problem: Problem, kv_type: str, kind: int, *, token_major: bool) -> Contender:
        hq, hkv, d = problem.shape.sizes
        n, rows = problem.kv_len, problem.rows(kv_type)
        graph = Graph(self._library)
        q = graph.leaf(problem.q, F32, d, problem.qo_len, hq, 1)
        if token_major:
            # llama.cpp's cache: one token's heads side by side.
            k, v = (
                graph.swapped(graph.leaf(aligned(x.transpose(1, 0, 2)), kind, d, hkv, n, 1))
                for x in rows
            )
        else:
            k, v = (graph.leaf(np.ascontiguousarray(x), kind, d, n, hkv, 1) for x in rows)
        mask = self._mask(problem, problem.qo_len)
        tensor = None if mask is None else graph.leaf(mask, F16, n, problem.qo_len, 1, 1)
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
            answer=lambda: problem.answer_in(kv_type),
            tolerance=_tolerance(kv_type, n),
            bind=graph.bind,
            result=lambda: memory.reshape(problem.qo_len, hq, d).swapaxes(0, 1),
            arithmetic=_arithmetic(kv_type, problem.qo_len),
        )

    def _matmul(self, problem: Problem) -> Contender:
        """K times Q, softmax, V times the weights, the GQA group as further query rows.

        V lies transposed, as llama.cpp keeps it for this path.
        """
        hq, hkv, d = problem.shape.sizes
        n, queries = problem.kv_len, problem.qo_len * problem.shape.group
        graph = Graph(self._library)
        q = graph.leaf(problem.q, F32, d, queries, hkv, 1)
        k = graph.leaf(np.ascontiguousarray(problem.k), F16, d, n, hkv, 1)
        v = graph.leaf(aligned(problem.v.swapaxes(1, 2)), F16, n, d, hkv, 1)
        mask = self._mask(problem, queries)
        tensor = None if mask is None else graph.leaf(mask, F16, n, queries, 1, 1)
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
            answer=lambda: problem.answer_in("f16"),
            tolerance=_tolerance("f16", n),
            bind=graph.bind,
            result=lambda: memory.reshape(hq, problem.qo_len, d),
            arithmetic="f16",
        )

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return conversions by rows; f16 goes through f32 a chunk at a time, as ggml does it."""
        found = ((kind, self._converter(kind, rows.shape[1])) for kind in rows.kinds)
        return [self._conversion(kind, rows, convert) for kind, convert in found if convert]

    def _conversion(self, kind: str, rows: Rows, convert: _Converter) -> Conversion:
        source, target = rows.arrays(kind)
        n, width = rows.shape
        step = max(1, _CHUNK // width)
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

        tolerance = _OTHER_BYTES if target.dtype == np.uint8 else 0.0
        return Conversion(self.name, self.name, kind, bind, lambda: target, tolerance)

    def _converter(self, kind: str, width: int) -> _Converter | None:
        """Return the function of a conversion; None where ggml lacks it."""
        source_type, target_type = kind.split("->")
        library = self._library
        pack = source_type in ("f32", "f16")
        number = mkv.formats.info(target_type if pack else source_type).ggml_type
        if number is None:
            return None
        convert = library.from_float(number) if pack else library.to_float(number)
        if convert is None:
            return None
        widen, narrow = library.f16_to_f32, library.f32_to_f16

        def direct(source: int, target: int, scratch: int, count: int) -> None:
            convert(source, target, count * width)

        def from_f16(source: int, target: int, scratch: int, count: int) -> None:
            widen(source, scratch, count * width)
            convert(scratch, target, count * width)

        def to_f16(source: int, target: int, scratch: int, count: int) -> None:
            convert(source, scratch, count * width)
            narrow(scratch, target, count * width)

        if "f16" not in (source_type, target_type):
            return direct
        return from_f16 if pack else to_f16


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
