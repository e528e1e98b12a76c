"""The trace format: names, roles, metadata; writing and reading. See docs/trace-format.md.

A trace holds *steps*: forwards of a model, counted from 1. Of each recorded layer a step has the
attention's output (kqv_out), Q, K, V and the mask; where a mixed cache was at work also K_quant and
V_quant, its cold part, and on request the cold part's own mask. Shapes are in C order here (the
last axis is contiguous); ggml and the file count the other way round.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf_file import F16, F32, Q4_0, TYPE_NAMES, FileTensor, TraceError, read_gguf

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
#: Tensors a step -> their roles.
ROLES_BY_COUNT = {5: ROLES[:5], 7: ROLES[:7], 8: ROLES}

_PLAIN_NAME = re.compile(r"^(?P<tensor>.*?)(?:-(?P<layer>\d{1,6}))?_step_(?P<step>\d{1,9})$")


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
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    sm_scale: float
    logits_soft_cap: float = 0.0
    sinks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RecordedStep:
    """One layer in one step, to be written.

    Attributes
    ----------
    tensors
        Role -> array in C order: kqv_out [n, Hq * Dv] and q [Hq, n, D] float32; k and v
        [Hkv, kv, D or Dv] float32, float16 or Q4_0 rows (uint8); masks [n, kv] float16 or float32.
    """

    layer: int
    step: int
    tensors: dict[str, NDArray[Any]]


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
    notes: dict[str, str] = field(default_factory=dict)


def tensor_name(role: str, layer: int, step: int) -> str:
    """Give the name of a tensor in the file, such as ``K_quant-3_step_2``."""
    return f"{NAMES[role]}-{layer}_step_{step}"


def write_trace(path: Path, header: TraceHeader, steps: Iterable[RecordedStep]) -> None:
    """Write a trace, whole or not at all. Needs the package gguf.

    Raises
    ------
    ValueError
        An array's dtype is none that a trace holds.
    OSError
        The file can't be written.
    """
    import gguf

    def text(key: str, value: str) -> None:
        writer.add_string(f"kqv_trace.{key}", value)

    def numbers(key: str, values: Sequence[int] | Sequence[float]) -> None:
        if values:  # GGUF knows no empty array
            writer.add_array(f"kqv_trace.{key}", values)

    ordered = sorted(steps, key=lambda one: (one.step, one.layer))
    handle, scratch = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(scratch, ARCHITECTURE)
        writer.add_name(f"attention of {header.model}")
        writer.add_uint32("kqv_trace.version", VERSION)
        for key in ("engine", "engine_version", "model", "cache"):
            text(key, getattr(header, key))
        for key, note in header.notes.items():
            text(key, note)
        numbers("tokens", [int(token) for token in header.tokens])
        numbers("step_tokens", header.step_tokens)
        layers = sorted(header.layers)
        infos = [header.layers[layer] for layer in layers]
        numbers("layers", layers)
        numbers("head_count", [info.num_qo_heads for info in infos])
        numbers("head_count_kv", [info.num_kv_heads for info in infos])
        numbers("key_length", [info.head_dim for info in infos])
        numbers("value_length", [info.head_dim_v for info in infos])
        numbers("sm_scale", [float(info.sm_scale) for info in infos])
        numbers("logits_soft_cap", [float(info.logits_soft_cap) for info in infos])
        for layer, info in zip(layers, infos, strict=True):
            if info.sinks is not None:
                numbers(f"sinks.{layer}", [float(sink) for sink in info.sinks])
        for key, positions in (
            ("positions", header.positions),
            ("positions_quant", header.positions_quant),
        ):
            for step, values in sorted(positions.items()):
                numbers(f"{key}.{step}", [int(value) for value in values])

        tensors = [
            (one, role) for one in ordered for role in ROLES if one.tensors.get(role) is not None
        ]
        names = [tensor_name(role, one.layer, one.step) for one, role in tensors]
        if tensors:
            writer.add_array("kqv_trace.tensor.names", names)
            writer.add_array("kqv_trace.tensor.roles", [role for _, role in tensors])
            numbers("tensor.layers", [one.layer for one, _ in tensors])
            numbers("tensor.steps", [one.step for one, _ in tensors])
        for (one, role), name in zip(tensors, names, strict=True):
            array = np.ascontiguousarray(one.tensors[role])
            if array.dtype == np.uint8:
                writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            elif array.dtype in (np.float32, np.float16):
                writer.add_tensor(name, array)
            else:
                raise ValueError(f"{name} is {array.dtype}; a trace holds float32, float16, Q4_0")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


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
        Hot part [Hkv, kv, D or Dv]: float32, float16, or Q4_0 rows (uint8).
    mask
        [n, kv] float32, added to the logits.
    k_quant, v_quant, mask_quant
        Cold part likewise; None where there is none.
    """

    out: NDArray[np.float32]
    q: NDArray[np.float32]
    k: NDArray[Any]
    v: NDArray[Any]
    mask: NDArray[np.float32]
    k_quant: NDArray[Any] | None = None
    v_quant: NDArray[Any] | None = None
    mask_quant: NDArray[np.float32] | None = None


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

    def load(self) -> StepData:
        """Read the arrays. Maps keys and values, copies the rest as float32."""
        raw = {role: tensor.load() for role, tensor in self.tensors.items()}

        def rows(role: str) -> NDArray[Any]:
            array = raw[role]
            return array.reshape(self.info.num_kv_heads, -1, array.shape[-1])

        q = np.asarray(raw["q"], np.float32)
        masks = np.asarray(raw["mask"], np.float32).reshape(-1, raw["mask"].shape[-1])[: self.n]
        out = np.asarray(raw["kqv_out"], np.float32)
        cold = None
        if "mask_quant" in raw:
            cold = np.asarray(raw["mask_quant"], np.float32)
            cold = cold.reshape(-1, cold.shape[-1])[: self.n]
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
        )


@dataclass(frozen=True)
class Trace:
    """A trace that was read and whose parts fit one another.

    Attributes
    ----------
    header
        None for a plain file: one without this format's metadata, read by the order of its tensors.
    steps
        In order of (step, layer).
    """

    path: Path
    header: TraceHeader | None
    steps: list[Step]

    @property
    def engine(self) -> str:
        """What recorded it."""
        return self.header.engine if self.header else "unknown"


def read_trace(path: Path, *, sm_scale: float | None = None) -> Trace:
    """Read a trace's metadata and check that all of its parts fit one another.

    Parameters
    ----------
    sm_scale
        Scale of the logits for a plain file, which does not say; None: 1 / sqrt(head_dim).

    Raises
    ------
    TraceError
        It can't be read, or is not a trace, or its parts don't fit.
    """
    file = read_gguf(path)
    if "kqv_trace.version" in file.metadata:
        if sm_scale is not None:
            raise TraceError(f"{path.name}: says its scale itself; leave the given one out")
        header, groups = _described(_Metadata(path, file.metadata), file.tensors)
    else:
        header, groups = None, _plain(path, file.tensors)
    if not groups:
        raise TraceError(f"{path.name}: holds no step")
    steps = [
        _step(path, layer, step, tensors, header, sm_scale)
        for (step, layer), tensors in sorted(groups.items())
    ]
    return Trace(path, header, steps)


_Groups = dict[tuple[int, int], dict[str, FileTensor]]


class _Metadata:
    """Typed looks into a file's metadata."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(f"kqv_trace.{key}", default)
        if value is None:
            raise TraceError(f"{self.path.name}: lacks the metadata kqv_trace.{key}")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise TraceError(f"{self.path.name}: kqv_trace.{key} must be a string, got {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list):
            raise TraceError(f"{self.path.name}: kqv_trace.{key} must be an array of strings")
        return value

    def integers(self, key: str, default: Any = None, length: int | None = None) -> list[int]:
        return [int(value) for value in self._array(key, "iu", "integers", default, length)]

    def floats(self, key: str, length: int) -> list[float]:
        values = [float(value) for value in self._array(key, "f", "floats", None, length)]
        if not all(map(math.isfinite, values)):
            raise TraceError(f"{self.path.name}: kqv_trace.{key} holds a value that is not finite")
        return values

    def _array(
        self, key: str, kinds: str, what: str, default: Any, length: int | None
    ) -> NDArray[Any]:
        value = self.get(key, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise TraceError(f"{self.path.name}: kqv_trace.{key} must be an array of {what}")
        if length is not None and len(value) != length:
            raise TraceError(
                f"{self.path.name}: kqv_trace.{key} has {len(value)} values for {length}"
            )
        return value


_NO_INTEGERS = np.zeros(0, np.int32)


def _described(data: _Metadata, tensors: list[FileTensor]) -> tuple[TraceHeader, _Groups]:
    """Read a trace that has roles in its metadata."""
    name = data.path.name
    version = data.get("version")
    if version != VERSION:
        raise TraceError(f"{name}: is a trace of version {version!r}; {VERSION} is known")
    cache = data.text("cache")
    if cache not in ("standard", "mixed"):
        raise TraceError(f"{name}: kqv_trace.cache must be standard or mixed, got {cache!r}")
    layers = data.integers("layers")
    if len(set(layers)) != len(layers):
        raise TraceError(f"{name}: kqv_trace.layers names a layer twice")
    count = len(layers)
    columns = [
        data.integers(key, length=count)
        for key in ("head_count", "head_count_kv", "key_length", "value_length")
    ]
    scales = data.floats("sm_scale", count)
    caps = data.floats("logits_soft_cap", count)
    infos = {}
    for index, layer in enumerate(layers):
        heads, kv_heads, head_dim, head_dim_v = (column[index] for column in columns)
        if min(heads, kv_heads, head_dim, head_dim_v) < 1 or heads % kv_heads:
            raise TraceError(
                f"{name}: layer {layer} claims {heads} query and {kv_heads} kv heads of "
                f"{head_dim} and {head_dim_v} values"
            )
        if caps[index] < 0:
            raise TraceError(f"{name}: layer {layer} claims a soft cap of {caps[index]}")
        sinks = None
        if f"kqv_trace.sinks.{layer}" in data.values:
            sinks = tuple(data.floats(f"sinks.{layer}", heads))
        infos[layer] = LayerInfo(
            heads, kv_heads, head_dim, head_dim_v, scales[index], caps[index], sinks
        )

    names, roles = data.texts("tensor.names"), data.texts("tensor.roles")
    of_layer = data.integers("tensor.layers", length=len(names))
    of_step = data.integers("tensor.steps", length=len(names))
    if len(roles) != len(names):
        raise TraceError(f"{name}: {len(roles)} roles for {len(names)} tensors")
    by_name = {tensor.name: tensor for tensor in tensors}
    groups: _Groups = {}
    for tensor, role, layer, step in zip(names, roles, of_layer, of_step, strict=True):
        if tensor not in by_name:
            raise TraceError(f"{name}: the tensor {tensor!r} is named, and is not there")
        if role not in NAMES:
            raise TraceError(f"{name}: {tensor!r} has the unknown role {role!r}")
        if layer not in infos:
            raise TraceError(f"{name}: {tensor!r} is of layer {layer}, which is not described")
        if step < 1:
            raise TraceError(f"{name}: {tensor!r} is of step {step}; steps count from 1")
        group = groups.setdefault((step, layer), {})
        if role in group:
            raise TraceError(f"{name}: step {step} of layer {layer} has two tensors {role}")
        group[role] = by_name[tensor]

    header = TraceHeader(
        engine=data.text("engine"),
        engine_version=data.text("engine_version"),
        model=data.text("model"),
        cache=cache,
        tokens=data.integers("tokens", _NO_INTEGERS),
        step_tokens=data.integers("step_tokens", _NO_INTEGERS),
        layers=infos,
        notes={
            key.removeprefix("kqv_trace."): value
            for key, value in data.values.items()
            if key.startswith("kqv_trace.") and isinstance(value, str)
        },
    )
    for step in {step for step, _ in groups}:
        for key, positions in (
            ("positions", header.positions),
            ("positions_quant", header.positions_quant),
        ):
            if f"kqv_trace.{key}.{step}" in data.values:
                positions[step] = np.array(data.integers(f"{key}.{step}"), np.int64)
    return header, groups


def _plain(path: Path, tensors: list[FileTensor]) -> _Groups:
    """Group the tensors of a file without roles: 5, 7 or 8 a step, in order."""
    name = path.name
    if not tensors:
        raise TraceError(f"{name}: holds no tensor")
    matches = [_PLAIN_NAME.match(tensor.name) for tensor in tensors]
    if all(matches):
        steps: dict[tuple[int, int], list[FileTensor]] = {}
        by_step: dict[int, set[int]] = {}
        keys = []
        for match in matches:
            assert match is not None
            layer = match["layer"]
            step = int(match["step"])
            keys.append((step, None if layer is None else int(layer)))
            by_step.setdefault(step, set())
            if layer is not None:
                by_step[step].add(int(layer))
        for (step, layer_or_none), tensor in zip(keys, tensors, strict=True):
            # A name without a layer (a mask, say) belongs to the only one of its step.
            only = by_step[step]
            if layer_or_none is None and len(only) > 1:
                raise TraceError(
                    f"{name}: {tensor.name!r} names no layer, and its step has {len(only)}"
                )
            layer = layer_or_none if layer_or_none is not None else next(iter(only), 0)
            steps.setdefault((step, layer), []).append(tensor)
    else:
        starts = [i for i, one in enumerate(tensors) if one.name.startswith(NAMES["kqv_out"])]
        if not starts or starts[0] != 0:
            raise TraceError(
                f"{name}: is GGUF, but not a trace: it has no kqv_trace metadata, and its "
                "tensors' names are not those of steps"
            )
        ends = [*starts[1:], len(tensors)]
        steps = {
            (number, 0): tensors[start:end]
            for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        }
    groups: _Groups = {}
    for (step, layer), group in steps.items():
        if len(group) not in ROLES_BY_COUNT:
            raise TraceError(
                f"{name}: step {step} of layer {layer} has {len(group)} tensors; without roles in "
                "the metadata it must be 5, 7 or 8"
            )
        groups[step, layer] = dict(zip(ROLES_BY_COUNT[len(group)], group, strict=True))
    return groups


def _step(
    path: Path,
    layer: int,
    step: int,
    tensors: dict[str, FileTensor],
    header: TraceHeader | None,
    sm_scale: float | None,
) -> Step:
    """Check that a step's tensors fit one another and what the metadata says."""
    where = f"{path.name}: step {step} of layer {layer}"
    missing = [role for role in ROLES[:5] if role not in tensors]
    if ("k_quant" in tensors) != ("v_quant" in tensors):
        missing += [role for role in ("k_quant", "v_quant") if role not in tensors]
    if "mask_quant" in tensors and "k_quant" not in tensors:
        missing.append("k_quant")
    if missing:
        raise TraceError(f"{where} lacks the role {missing[0]}")
    ne: dict[str, tuple[int, ...]] = {}
    for role, tensor in tensors.items():
        if tensor.type not in TYPE_NAMES:
            raise TraceError(
                f"{where}: {tensor.name!r} has {tensor.type_name}; a trace holds "
                f"{', '.join(TYPE_NAMES.values())}"
            )
        if tensor.type == Q4_0 and role not in ("k", "v", "k_quant", "v_quant"):
            raise TraceError(f"{where}: {tensor.name!r} is q4_0, which only keys and values may be")
        if tensor.type not in (F32, F16) and role in ("q", "kqv_out"):
            raise TraceError(f"{where}: {tensor.name!r} has {tensor.type_name}")
        ne[role] = tensor.ne + (1,) * (4 - len(tensor.ne))

    def fits(role: str, want: tuple[int, ...]) -> None:
        if ne[role] != want + (1,) * (4 - len(want)):
            raise TraceError(
                f"{where}: {tensors[role].name!r} has the shape {list(tensors[role].ne)} (ggml "
                f"order), which does not fit: {list(want)} is wanted"
            )

    head_dim, n, heads = ne["q"][:3]
    kv_hot, kv_heads = ne["k"][1:3]
    head_dim_v = ne["v"][0]
    if header is not None:
        info = header.layers[layer]
    else:
        if heads % kv_heads:
            raise TraceError(f"{where}: {heads} query heads and {kv_heads} kv heads don't fit")
        scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        info = LayerInfo(heads, kv_heads, head_dim, head_dim_v, scale)
    fits("q", (info.head_dim, n, info.num_qo_heads))
    fits("k", (info.head_dim, kv_hot, info.num_kv_heads))
    fits("v", (info.head_dim_v, kv_hot, info.num_kv_heads))
    if header is None and math.prod(ne["kqv_out"]) == info.head_dim_v * info.num_qo_heads * n:
        # Written as ggml's flash attention gives it, [Dv, Hq, n]: the same order in memory.
        if ne["kqv_out"][:3] not in (
            (info.head_dim_v * info.num_qo_heads, n, 1),
            (info.head_dim_v, info.num_qo_heads, n),
        ):
            fits("kqv_out", (info.head_dim_v * info.num_qo_heads, n))
    else:
        fits("kqv_out", (info.head_dim_v * info.num_qo_heads, n))
    kv_cold = 0
    if "k_quant" in tensors:
        kv_cold = ne["k_quant"][1]
        fits("k_quant", (info.head_dim, kv_cold, info.num_kv_heads))
        fits("v_quant", (info.head_dim_v, kv_cold, info.num_kv_heads))
    own_mask = "mask_quant" in tensors
    for role, width in (
        ("mask", kv_hot if own_mask else kv_cold + kv_hot),
        ("mask_quant", kv_cold),
    ):
        # ggml pads a mask's rows; the first n count.
        if role in tensors and not (header is None and ne[role][1] >= n):
            fits(role, (width, n))
        elif role in tensors:
            fits(role, (width, ne[role][1]))
    positions = []
    for known, length in (
        (header.positions if header else {}, kv_hot),
        (header.positions_quant if header else {}, kv_cold),
    ):
        values = known.get(step)
        if values is not None and len(values) != length:
            raise TraceError(f"{where}: {len(values)} positions for {length} keys")
        positions.append(values)
    return Step(layer, step, info, tensors, n, kv_hot, kv_cold, *positions)
