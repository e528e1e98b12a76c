"""Writing a trace, with the package gguf. The format: docs/trace-format.md."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import mixedkv as mkv

from .format import ARCHITECTURE, ROLES, VERSION, RecordedStep, TraceHeader, tensor_name
from .stored import Rows, data_of, format_of

TEXTS = ("engine", "engine_version", "model", "cache")
"""Metadata that every trace has as text."""
STORED = "stored"
"""Begins the names of what a trace says of rows of keys and values, by role."""


def write_trace(path: Path, header: TraceHeader, steps: Iterable[RecordedStep]) -> None:
    """Write a trace, whole or not at all. Needs the package gguf.

    Raises
    ------
    ValueError
        An array is of no format that a trace holds, or a note's name is one of the trace's keys.
    OSError
        The file can't be written.
    """
    import gguf

    def text(key: str, value: str) -> None:
        writer.add_string(f"kqv_trace.{key}", value)

    def numbers(key: str, values: Sequence[int] | Sequence[float]) -> None:
        if values:  # GGUF knows no empty array
            writer.add_array(f"kqv_trace.{key}", values)

    for name in header.notes:
        if name in TEXTS or name.startswith(f"{STORED}."):
            raise ValueError(f"a note can't be named {name!r}: the format has that key")
    ordered = sorted(steps, key=lambda one: (one.step, one.layer))
    # Not by tempfile, whose files nobody else may read.
    scratch = path.resolve().parent / f".{path.name}-{secrets.token_hex(6)}"
    try:
        writer = gguf.GGUFWriter(scratch, ARCHITECTURE)
        writer.add_name(f"attention of {header.model}")
        writer.add_uint32("kqv_trace.version", VERSION)
        for key in TEXTS:
            text(key, getattr(header, key))
        for role, name in header.stored.items():
            text(f"{STORED}.{role}", name)
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
        windows = [info.window_left for info in infos]
        known = [window for window in windows if window is not None]
        if len(known) == len(windows):
            numbers("window_left", known)
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
        formats = [
            _format(one.tensors[role], name)
            for (one, role), name in zip(tensors, names, strict=True)
        ]
        if tensors:
            writer.add_array("kqv_trace.tensor.names", names)
            writer.add_array("kqv_trace.tensor.roles", [role for _, role in tensors])
            numbers("tensor.layers", [one.layer for one, _ in tensors])
            numbers("tensor.steps", [one.step for one, _ in tensors])
        if any(format.ggml_type is None for format in formats):
            writer.add_array("kqv_trace.tensor.formats", [format.name for format in formats])
        for (one, role), name, format in zip(tensors, names, formats, strict=True):
            array = np.ascontiguousarray(data_of(one.tensors[role]))
            if not format.packed:
                writer.add_tensor(name, array)
            elif format.ggml_type is None:
                writer.add_tensor(name, array.view(np.int8))
            else:
                number = gguf.GGMLQuantizationType(format.ggml_type)
                writer.add_tensor(name, array, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _format(rows: Rows, name: str) -> mkv.formats.Format:
    try:
        return format_of(rows)
    except KeyError as dtype:
        raise ValueError(
            f"{name} is {dtype.args[0]}; a trace holds float32, float16 and rows of "
            f"{', '.join(mkv.formats.packed())}"
        ) from None
