"""Who takes part: one module a library, each an optional one but mixedkv itself.

A peer's module has a function ``load() -> Peer``, which raises :class:`AbsentError` with the
reason and the way to get it where the library is not there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from ..problem import Problem, Rows, bits_of
from ..shapes import DEFAULT_FORMATS

#: Peers in the order of the tables; "mixedkv" is always there.
NAMES = ("mixedkv", "ggml", "torch", "onnxruntime", "openvino", "gguf")

Task = Literal["decode", "prefill"]
Arithmetic = Literal["f32", "f16", "bf16", "int8"]


class AbsentError(Exception):
    """A peer can't take part; the message says why and what would help."""


@dataclass
class Contender:
    """One way of computing a problem's attention."""

    peer: str
    name: str
    #: What K and V are held in.
    kv_type: str
    #: The format of mixedkv's keys that it is compared with. Of these the contender of the same
    #: arithmetic, or that in f32 where there is none.
    against: str
    #: Bytes of K and V that a call has to read.
    kv_bytes: float
    #: The right answer: float64 [Hq, qo_len, D] on the K and V that it holds.
    answer: Callable[[], NDArray[np.float64]]
    #: Above this relative error it is wrong, and is not timed. Each arithmetic's own.
    tolerance: float
    #: Makes the call for a number of threads.
    bind: Callable[[int], Callable[[], object]]
    #: The last call's result [Hq, qo_len, D].
    result: Callable[[], NDArray[Any]]
    #: "mixed" reads both tiers, and its "part"s add up to it; "race" is everything else.
    role: Literal["race", "mixed", "part"] = "race"
    #: The coarsest that queries, weights or sums are rounded to on the way.
    arithmetic: Arithmetic = "f32"


@dataclass
class Conversion:
    """One way of converting rows of values."""

    peer: str
    name: str
    #: One of the rows' kinds.
    kind: str
    bind: Callable[[int], Callable[[], object]]
    #: The last call's result, bytes or values of the kind.
    result: Callable[[], NDArray[Any]]
    #: The share of its elements that may differ from the format's definition.
    tolerance: float = 0.0


class Peer:
    """A library that can be called; what it does not know it leaves out."""

    name: str
    version: str

    def __init__(self) -> None:
        #: What a reader of its figures should know, such as what its build lacks.
        self.notes: list[str] = []

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return its contenders for a problem, where mixedkv holds keys in these formats."""
        return []

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return its conversions of some of the rows' kinds."""
        return []


def rival(kv_type: str, formats: Sequence[str]) -> str | None:
    """Return which of mixedkv's formats keys of another library's type are compared with.

    That of the same name, or else of all whose values share scales, or of all that do not, the one
    with the nearest number of bits; None where there is none of these.
    """
    if kv_type in formats:
        return kv_type
    bits = bits_of(kv_type)
    infos = [mkv.formats.info(name) for name in formats]
    alike = [one for one in infos if (one.block_values > 1) == (bits < 16)]
    return min(alike, key=lambda one: abs(one.bits - bits)).name if alike else None


def imported(*names: str) -> list[Any]:
    """Return a peer's modules, or raise AbsentError."""
    try:
        return [importlib.import_module(name) for name in names]
    except (ImportError, OSError) as error:
        packages = " ".join(name for name in names if "." not in name)
        raise AbsentError(f"{error}: pip install {packages}") from None


_MODULES = {
    "mixedkv": "own",
    "ggml": "ggml",
    "torch": "torch_sdpa",
    "onnxruntime": "onnxruntime_gqa",
    "openvino": "openvino_paged",
    "gguf": "gguf_numpy",
}


def load(names: Sequence[str], ggml_dir: Path | None = None) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that are there, and why the others are not."""
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    for name in NAMES:
        if name not in names:
            continue
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
        try:
            peers.append(module.load(ggml_dir) if name == "ggml" else module.load())
        except AbsentError as reason:
            absent[name] = str(reason)
    return peers, absent
