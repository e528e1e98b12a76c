"""Reading a trace that nobody vouches for: every part fits the others, or the file is refused.

What a file without this format's metadata holds is told by the order of its tensors. Nothing is
read but the header; tensors stay in the file until `Step.load`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import mixedkv as mkv

from .format import (
    CACHES,
    NAMES,
    ROLES,
    ROLES_BY_COUNT,
    ROWS,
    VERSION,
    LayerInfo,
    Step,
    Trace,
    TraceHeader,
)
from .gguf_file import BYTES, FileTensor, TraceError, held, read_gguf
from .metadata import Metadata, short
from .writing import STORED, TEXTS

_PLAIN_NAME = re.compile(r"^(?P<tensor>.*?)(?:-(?P<layer>\d{1,6}))?_step_(?P<step>\d{1,9})$")

_MOST_LAYERS = 999_999
_MOST_HEADS = 1 << 16
_MOST_WIDTH = 1 << 16
"""Of a key or a value; the op takes no more."""


def read_trace(path: Path, *, sm_scale: float | None = None) -> Trace:
    """Read a trace's metadata and check that all of its parts fit one another.

    Parameters
    ----------
    sm_scale
        Scale of the logits for a plain file, which does not say; None: 1 / sqrt(head_dim).

    Raises
    ------
    ValueError
        `sm_scale` is not finite.
    TraceError
        It can't be read, or is not a trace, or its parts don't fit.
    """
    if sm_scale is not None and not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale must be finite, got {sm_scale}")
    file = read_gguf(path)
    if "kqv_trace.version" in file.metadata:
        if sm_scale is not None:
            raise TraceError(f"{path.name}: says its scale itself; leave the given one out")
        header, groups = _described(Metadata(path, file.metadata), file.tensors)
    else:
        header, groups = None, _plain(path, file.tensors)
    if not groups:
        raise TraceError(f"{path.name}: holds no step")
    starts = list(itertools.accumulate(header.step_tokens, initial=0)) if header else []
    steps = [
        _step(path, layer, step, tensors, header, starts, sm_scale)
        for (step, layer), tensors in sorted(groups.items())
    ]
    used = {tensor.name for tensors in groups.values() for tensor in tensors.values()}
    unnamed = tuple(short(one.name) for one in file.tensors if one.name not in used)
    return Trace(path, header, steps, unnamed)


_Groups = dict[tuple[int, int], dict[str, FileTensor]]


def _described(data: Metadata, tensors: list[FileTensor]) -> tuple[TraceHeader, _Groups]:
    """Read a trace that has roles in its metadata."""
    version = data.integer("version")
    if version != VERSION:
        raise TraceError(f"{data.path.name}: is a trace of version {version}; {VERSION} is known")
    header = TraceHeader(
        engine=data.text("engine"),
        engine_version=data.text("engine_version"),
        model=data.text("model"),
        cache=data.text("cache"),
        layers=_layers(data),
        stored=_stored(data),
    )
    header.notes = data.notes(besides=(*TEXTS, *(f"{STORED}.{role}" for role in ROWS)))
    if header.cache not in CACHES:
        raise data.refuse("cache", f"must be {' or '.join(CACHES)}, got {short(header.cache)}")
    if "tokens" in data:
        header.tokens = data.integers("tokens", 0)
    if "step_tokens" in data:
        header.step_tokens = data.integers("step_tokens", 1)
        total = sum(header.step_tokens)
        if header.tokens and len(header.tokens) != total:
            raise data.refuse(
                "step_tokens", f"counts {total} tokens, kqv_trace.tokens has {len(header.tokens)}"
            )
    groups = _by_role(data, tensors, header.layers)
    for step in {step for step, _ in groups}:
        for key, positions in (
            ("positions", header.positions),
            ("positions_quant", header.positions_quant),
        ):
            if f"{key}.{step}" in data:
                positions[step] = data.integer_array(f"{key}.{step}", -1)
    return header, groups


def _stored(data: Metadata) -> dict[str, str]:
    """Read which formats a cache held rows in that are recorded as what they stand for."""
    found = {}
    for role in ROWS:
        key = f"{STORED}.{role}"
        if key in data:
            found[role] = data.text(key)
            if found[role] not in mkv.formats.available():
                known = ", ".join(mkv.formats.available())
                raise data.refuse(key, f"must be one of {known}, got {short(found[role])}")
    return found


def _layers(data: Metadata) -> dict[int, LayerInfo]:
    layers = data.integers("layers", 0, _MOST_LAYERS)
    if len(set(layers)) != len(layers):
        raise data.refuse("layers", "names a layer twice")
    count = len(layers)
    most = {"head_count": _MOST_HEADS, "head_count_kv": _MOST_HEADS}
    columns = [
        data.integers(key, 1, most.get(key, _MOST_WIDTH), length=count)
        for key in ("head_count", "head_count_kv", "key_length", "value_length")
    ]
    scales = data.floats("sm_scale", count)
    caps = data.floats("logits_soft_cap", count)
    windows: list[int] | list[None] = [None] * count
    if "window_left" in data:
        windows = data.integers("window_left", -1, length=count)
    infos = {}
    for index, layer in enumerate(layers):
        heads, kv_heads, head_dim, head_dim_v = (column[index] for column in columns)
        if heads % kv_heads:
            raise TraceError(
                f"{data.path.name}: layer {layer} claims {heads} query and {kv_heads} kv heads"
            )
        if caps[index] < 0:
            raise TraceError(
                f"{data.path.name}: layer {layer} claims a soft cap of {caps[index]:g}"
            )
        sinks = None
        if f"sinks.{layer}" in data:
            sinks = tuple(data.floats(f"sinks.{layer}", heads))
        infos[layer] = LayerInfo(
            heads,
            kv_heads,
            head_dim,
            head_dim_v,
            scales[index],
            caps[index],
            sinks,
            windows[index],
        )
    return infos


def _by_role(data: Metadata, tensors: list[FileTensor], layers: dict[int, LayerInfo]) -> _Groups:
    """Group the tensors that the metadata names."""
    name = data.path.name
    names = data.texts("tensor.names")
    roles = data.texts("tensor.roles", len(names))
    of_layer = data.integers("tensor.layers", 0, _MOST_LAYERS, length=len(names))
    of_step = data.integers("tensor.steps", 1, length=len(names))
    formats: list[str] | list[None] = [None] * len(names)
    if "tensor.formats" in data:
        formats = data.texts("tensor.formats", len(names))
    by_name = {tensor.name: tensor for tensor in tensors}
    groups: _Groups = {}
    for tensor, role, layer, step, format in zip(
        names, roles, of_layer, of_step, formats, strict=True
    ):
        if tensor not in by_name:
            raise TraceError(
                f"{name}: the tensor {short(tensor)} is named, and is not there (or named twice)"
            )
        if role not in NAMES:
            raise TraceError(f"{name}: {short(tensor)} has the unknown role {short(role)}")
        if layer not in layers:
            raise TraceError(f"{name}: {short(tensor)} is of layer {layer}, which is not described")
        group = groups.setdefault((step, layer), {})
        if role in group:
            raise TraceError(f"{name}: step {step} of layer {layer} has two tensors {role}")
        group[role] = _of_format(name, by_name.pop(tensor), format)
    return groups


def _of_format(name: str, tensor: FileTensor, told: str | None) -> FileTensor:
    """Give a tensor as rows of the format that the metadata tells of."""
    if told is None or tensor.type_name == told:
        return tensor
    what = f"{name}: kqv_trace.tensor.formats says {short(told)} of {short(tensor.name)}"
    if told not in mkv.formats.available():
        raise TraceError(f"{what}; known are {', '.join(mkv.formats.available())}")
    format = mkv.formats.info(told)
    if tensor.type != BYTES or format.ggml_type is not None:
        raise TraceError(f"{what}, whose type is {tensor.type_name}")
    return tensor.as_rows_of(format)


def _plain(path: Path, tensors: list[FileTensor]) -> _Groups:
    """Group the tensors of a file without roles: 5, 7 or 8 a step, in order."""
    name = path.name
    if not tensors:
        raise TraceError(f"{name}: holds no tensor")
    matches = [_PLAIN_NAME.match(tensor.name) for tensor in tensors]
    steps: dict[tuple[int, int], list[FileTensor]] = {}
    if all(matches):
        keys = [(int(m["step"]), m["layer"]) for m in matches if m is not None]
        of_step: dict[int, set[int]] = {step: set() for step, _ in keys}
        for step, layer in keys:
            of_step[step] |= {int(layer)} if layer else set()
        for (step, layer), tensor in zip(keys, tensors, strict=True):
            # A name without a layer (a mask, say) belongs to the only one of its step.
            if layer is None and len(of_step[step]) > 1:
                raise TraceError(
                    f"{name}: {short(tensor.name)} names no layer, and its step has "
                    f"{len(of_step[step])}"
                )
            number = next(iter(of_step[step]), 0) if layer is None else int(layer)
            steps.setdefault((step, number), []).append(tensor)
    else:
        for tensor in tensors:
            if tensor.name.startswith(NAMES["kqv_out"]):
                steps[len(steps) + 1, 0] = []
            if not steps:
                raise TraceError(
                    f"{name}: is GGUF, but not a trace: it has no kqv_trace metadata, and its "
                    "tensors' names are not those of steps"
                )
            steps[len(steps), 0].append(tensor)
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
    starts: Sequence[int],
    sm_scale: float | None,
) -> Step:
    """Check that a step's tensors fit one another and what the metadata says.

    `starts` are the tokens before each step.
    """
    where = f"{path.name}: step {step} of layer {layer}"
    _check_roles(where, tensors, header)
    ne = {role: tensor.ne + (1,) * (4 - len(tensor.ne)) for role, tensor in tensors.items()}

    def fits(role: str, want: tuple[int, ...]) -> None:
        if ne[role] != want + (1,) * (4 - len(want)):
            raise TraceError(
                f"{where}: {short(tensors[role].name)} has the shape {list(tensors[role].ne)} "
                f"(ggml order), which does not fit: {list(want)} is wanted"
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
    # A plain one may be as ggml's flash attention gives it, [Dv, Hq, n]: the same in memory.
    if header is not None or ne["kqv_out"] != (info.head_dim_v, info.num_qo_heads, n, 1):
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
    found = Step(layer, step, info, tensors, n, kv_hot, kv_cold, None, None)
    return found if header is None else _placed(where, found, header, starts)


def _check_roles(where: str, tensors: dict[str, FileTensor], header: TraceHeader | None) -> None:
    """Check that all roles are there, in types that they may have."""
    missing = [role for role in ROLES[:5] if role not in tensors]
    if ("k_quant" in tensors) != ("v_quant" in tensors):
        missing += [role for role in ("k_quant", "v_quant") if role not in tensors]
    if "mask_quant" in tensors and "k_quant" not in tensors:
        missing.append("k_quant")
    if missing:
        raise TraceError(f"{where} lacks the role {missing[0]}")
    if header is not None and (header.cache == "mixed") != ("k_quant" in tensors):
        found = "has" if "k_quant" in tensors else "lacks"
        raise TraceError(f"{where} {found} the role k_quant, in a trace of a {header.cache} cache")
    for role, tensor in tensors.items():
        if tensor.format is None:
            raise TraceError(
                f"{where}: {short(tensor.name)} has {tensor.type_name}; a trace holds {held()}"
            )
        if tensor.format.packed and role not in ROWS:
            raise TraceError(
                f"{where}: {short(tensor.name)} is {tensor.type_name}, which only keys and values "
                "may be"
            )
        if tensor.format.packed and header is not None and role in header.stored:
            raise TraceError(
                f"{where}: {short(tensor.name)} is {tensor.type_name}, and "
                f"kqv_trace.{STORED}.{role} says that it is float32 or float16"
            )


def _placed(where: str, step: Step, header: TraceHeader, starts: Sequence[int]) -> Step:
    """Add what the metadata says of where the step's tokens stand."""
    first = None
    if header.step_tokens:
        if step.step > len(header.step_tokens):
            raise TraceError(
                f"{where}: kqv_trace.step_tokens tells of {len(header.step_tokens)} steps alone"
            )
        told = header.step_tokens[step.step - 1]
        if told != step.n:
            raise TraceError(
                f"{where} has {step.n} queries, kqv_trace.step_tokens says {told} tokens"
            )
        first = starts[step.step - 1]
    positions = header.positions.get(step.step)
    positions_quant = header.positions_quant.get(step.step)
    for values, length in ((positions, step.kv_hot), (positions_quant, step.kv_cold)):
        if values is not None and len(values) != length:
            raise TraceError(f"{where}: {len(values)} positions for {length} keys")
    if step.kv_cold and (positions is None) != (positions_quant is None):
        given, lacking = ("hot", "cold") if positions_quant is None else ("cold", "hot")
        raise TraceError(f"{where}: positions of the {given} keys are there, of the {lacking} not")
    return dataclasses.replace(
        step,
        positions=positions,
        positions_quant=positions_quant,
        first=first,
        stored=header.stored,
    )
