from types import TracebackType
from typing import Any, type_check_only

import numpy as np
from numpy.typing import NDArray

__version__: str

class CacheFull(RuntimeError): ...  # noqa: N818

def compiled_isas() -> list[tuple[str, bool, str, bool]]: ...
def auto_compute_type() -> str: ...
def active_isa() -> str: ...
def select_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def formats() -> list[tuple[str, int, int, int, float, bool]]: ...
def convert(
    x: NDArray[Any],
    x_format: str,
    out: NDArray[Any],
    out_format: str,
    check: bool,
    fit_scales: bool,
    threads: int,
) -> tuple[int, int, float] | None: ...
def attend(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    k_format: str,
    v_format: str,
    ms: NDArray[np.float32] | None,
    acc: NDArray[np.float32] | None,
    out: NDArray[np.float32] | None,
    lse: NDArray[np.float32] | None,
    mask: NDArray[Any] | None,
    alibi_slopes: NDArray[np.float32] | None,
    sinks: NDArray[np.float32] | None,
    sm_scale: float,
    logits_soft_cap: float,
    causal: bool,
    window_left: int,
    window_right: int,
    q_start: int,
    kv_start: int,
    threads: int,
    compute_type: str,
) -> None: ...
def attend_paged(
    q: NDArray[Any],
    k_pages: NDArray[Any],
    v_pages: NDArray[Any],
    k_format: str,
    v_format: str,
    qo_indptr: NDArray[np.int64],
    indptr: NDArray[np.int64],
    indices: NDArray[np.int64],
    last_page_len: NDArray[np.int64],
    out: NDArray[np.float32],
    lse: NDArray[np.float32] | None,
    alibi_slopes: NDArray[np.float32] | None,
    sinks: NDArray[np.float32] | None,
    sm_scale: float,
    logits_soft_cap: float,
    causal: bool,
    window_left: int,
    window_right: int,
    threads: int,
    compute_type: str,
) -> None: ...
def finalize(
    ms: NDArray[np.float32],
    acc: NDArray[np.float32],
    sinks: NDArray[np.float32] | None,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
def merge(
    ms_a: NDArray[np.float32],
    acc_a: NDArray[np.float32],
    ms_b: NDArray[np.float32],
    acc_b: NDArray[np.float32],
) -> None: ...
def merge_states(
    outs: NDArray[np.float32],
    lses: NDArray[np.float32],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
def cache_config_fields() -> list[tuple[str, Any, str]]: ...
def check_config(**options: Any) -> None: ...

# pybind11's, which has no name to import it by.
@type_check_only
class _Pybind11Type(type): ...

class Guard(metaclass=_Pybind11Type):
    def __init__(self, what: str) -> None: ...
    def __enter__(self) -> Guard: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class MixedCache(metaclass=_Pybind11Type):
    def __init__(self, **options: Any) -> None: ...
    def config(self) -> dict[str, Any]: ...
    def find_slot(
        self, pos: NDArray[np.int64], begin: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> tuple[int, int, int, int] | None: ...
    def store(
        self, layer: int, k: NDArray[Any], v: NDArray[Any], k_format: str, v_format: str
    ) -> None: ...
    def attend(
        self,
        layer: int,
        q: NDArray[Any],
        out: NDArray[np.float32],
        lse: NDArray[np.float32] | None,
        sm_scale: float,
        logits_soft_cap: float,
        window_left: int | None,
        alibi_slopes: NDArray[np.float32] | None,
        sinks: NDArray[np.float32] | None,
        threads: int,
        compute_type: str,
    ) -> None: ...
    def commit(self) -> None: ...
    def restore(self) -> None: ...
    def seq_rm(self, seq: int, p0: int, p1: int) -> None: ...
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None: ...
    def seq_keep(self, seq: int) -> None: ...
    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None: ...
    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None: ...
    def seq_gather(self, sources: NDArray[np.int64]) -> None: ...
    def seq_pos_min(self, seq: int) -> int: ...
    def seq_pos_max(self, seq: int) -> int: ...
    def clear(self) -> None: ...
    def size(self) -> int: ...
    def layers(self) -> list[int]: ...
    def positions(self, seq: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]: ...
    def keys(self, layer: int, seq: int) -> NDArray[np.float32]: ...
    def values(self, layer: int, seq: int) -> NDArray[np.float32]: ...
    def export_rows(
        self, layer: int, seq: int, dequantize: bool
    ) -> tuple[
        tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]],
        tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]],
    ]: ...
    def stats(self) -> dict[str, Any]: ...
