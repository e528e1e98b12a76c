"""The trace format: roles, names, and what a step holds. See docs/trace-format.md.

A trace holds *steps*: forwards of a model, counted from 1. Of each recorded layer a step has the
attention's output (kqv_out), Q, K, V and the mask; where a mixed cache was at work also K_quant and
V_quant, its cold part, and on request the cold part's own mask. Shapes are in C order here (the
last axis is contiguous); ggml and the file count the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf_file import FileTensor
from .stored import Rows, data_of

VERSION = 1
ARCHITECTURE = "kqv_trace"

#: Role of a tensor -> what its name begins with; in the order of a step.
NAMES = {
    "kqv_out": "kqv_out",
    "q": "Q",
    "k": "K",
    "v": "V",
    "mask": "mask",
    "k_quant": "K_quant",
    "v_quant": "V_quant",
    "mask_quant": "mask_quant",
}
ROLES = tuple(NAMES)
#: Those of keys and values.
ROWS = ("k", "v", "k_quant", "v_quant")
#: Tensors a step -> their roles.
ROLES_BY_COUNT = {5: ROLES[:5], 7: ROLES[:7], 8: ROLES}

CACHES = ("standard", "mixed")


@dataclass(frozen=True)
class LayerInfo:
    """What the layer's attention is.

    Attributes
    ----------
    head_dim, head_dim_v
        Width of a key and of a value.
    sm_scale, logits_soft_cap
        Factor of the logits, and their soft cap (0: none).
    sinks
        Learned logits [num_qo_heads] that enter the softmax without a value, or None.
    window_left
        How many keys before its own position a query sees; -1: all; None: the trace does not say.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    sm_scale: float
    logits_soft_cap: float = 0.0
    sinks: tuple[float, ...] | None = None
    window_left: int | None = None


@dataclass(frozen=True)
class RecordedStep:
    """One layer in one step, to be written.

    Attributes
    ----------
    tensors
        Role -> array in C order: kqv_out [n, Hq * Dv] and q [Hq, n, D] float32; k and v
        [Hkv, kv, D or Dv] float32, float16 or a QuantizedArray of any format (uint8: Q4_0); masks
        [n, kv] float16 or float32.
    """

    layer: int
    step: int
    tensors: dict[str, Rows]


@dataclass
class TraceHeader:
    """What a trace says of itself.

    Attributes
    ----------
    cache
        "standard" or "mixed".
    tokens
        All token ids: the prompt's, then those that were decoded and fed back.
    step_tokens
        How many of them each step took.
    positions, positions_quant
        Step -> position of each key in k and v, and in k_quant and v_quant; -1 marks padding.
    stored
        Role of keys or values -> the format that the cache held them in, where the tensors are not
        those rows but what they stand for: of caches that rotate or center.
    notes
        More metadata, name -> text, below ``kqv_trace.``.
    """

    engine: str
    engine_version: str
    model: str
    cache: str
    tokens: list[int] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    layers: dict[int, LayerInfo] = field(default_factory=dict)
    positions: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    positions_quant: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def tensor_name(role: str, layer: int, step: int) -> str:
    """Give the name of a tensor in the file, such as ``K_quant-3_step_2``."""
    return f"{NAMES[role]}-{layer}_step_{step}"


@dataclass(frozen=True)
class StepData:
    """The arrays of one layer in one step, in C order.

    Attributes
    ----------
    out
        Recorded output [n, Hq, Dv] float32.
    q
        [Hq, n, D] float32.
    k, v
        Hot part [Hkv, kv, D or Dv]: float32, float16, or a QuantizedArray.
    mask
        [n, kv] float32, added to the logits.
    k_quant, v_quant, mask_quant
        Cold part likewise; None where there is none.
    stored
        As in `TraceHeader`.
    """

    out: NDArray[np.float32]
    q: NDArray[np.float32]
    k: Rows
    v: Rows
    mask: NDArray[np.float32]
    k_quant: Rows | None = None
    v_quant: Rows | None = None
    mask_quant: NDArray[np.float32] | None = None
    stored: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One layer in one step of a trace: tensors that are still in the file.

    Attributes
    ----------
    tensors
        Role -> tensor. Their shapes fit one another.
    kv_hot, kv_cold
        Keys in K, and in K_quant (0 where there is none).
    positions, positions_quant
        As in `TraceHeader`; None where the trace does not say.
    first
        Position of the step's first query (the others follow); None where the trace does not say.
    stored
        As in `TraceHeader`.
    """

    layer: int
    step: int
    info: LayerInfo
    tensors: dict[str, FileTensor]
    n: int
    kv_hot: int
    kv_cold: int
    positions: NDArray[np.int64] | None
    positions_quant: NDArray[np.int64] | None
    first: int | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> StepData:
        """Read the arrays. Maps keys and values, copies the rest as float32."""
        raw = {role: tensor.load() for role, tensor in self.tensors.items()}

        def rows(role: str) -> Rows:
            array = raw[role]
            return array.reshape(self.info.num_kv_heads, -1, array.shape[-1])

        q = np.asarray(raw["q"], np.float32)
        masks = self._mask(data_of(raw["mask"]))
        out = np.asarray(raw["kqv_out"], np.float32)
        cold = None
        if "mask_quant" in raw:
            cold = self._mask(data_of(raw["mask_quant"]))
        elif self.kv_cold:
            cold, masks = masks[:, : self.kv_cold], masks[:, self.kv_cold :]
        return StepData(
            out=out.reshape(self.n, self.info.num_qo_heads, self.info.head_dim_v),
            q=q.reshape(self.info.num_qo_heads, self.n, self.info.head_dim),
            k=rows("k"),
            v=rows("v"),
            mask=masks,
            k_quant=rows("k_quant") if self.kv_cold else None,
            v_quant=rows("v_quant") if self.kv_cold else None,
            mask_quant=cold,
            stored=self.stored,
        )

    def _mask(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Give the rows of the queries: a plain file's mask may have more, for padding."""
        return np.asarray(raw.reshape(-1, raw.shape[-1])[: self.n], np.float32)


@dataclass(frozen=True)
class Trace:
    """A trace that was read and whose parts fit one another.

    Attributes
    ----------
    header
        None for a plain file: one without this format's metadata, read by the order of its tensors.
    steps
        In order of (step, layer).
    unnamed
        Tensors of the file that are of no step.
    """

    path: Path
    header: TraceHeader | None
    steps: list[Step]
    unnamed: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """What recorded it."""
        return self.header.engine if self.header else "unknown"
