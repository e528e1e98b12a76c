"""Traces that nobody vouches for: what writes them, and what refuses them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
gguf = pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

from mixedkv.tools.trace.gguf_file import num_bytes, read_gguf  # noqa: E402
from test_trace import call  # noqa: E402


def refused(path: Path) -> str:
    """The one line with which verify ends, status 2."""
    result = call("verify", "-i", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mixedkv: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# GGUF's numbers of types, by what a value is in Python.
KINDS = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


def encoded(value: Any) -> bytes:
    """A value of a GGUF entry with its type: str, list of str, numpy scalar, numpy array."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    array = np.asarray(value)
    kind = struct.pack("<I", KINDS[array.dtype.name])
    if array.ndim:
        kind = struct.pack("<I", 9) + kind + struct.pack("<Q", array.size)
    return kind + array.tobytes()


def rewritten(path: Path, changes: dict[str, Any], alignment: int = 32) -> Path:
    """A GGUF file with other metadata (None: without the entry), and its tensors as they were."""
    file = read_gguf(path)
    arrays = [
        np.fromfile(path, np.uint8, num_bytes(one.type, math.prod(one.ne)), offset=one.offset)
        for one in file.tensors
    ]
    entries = {**file.metadata, **changes}
    single = {"kqv_trace.version": np.uint32(1)}
    out = bytearray()
    count = 0
    for key, value in entries.items():
        if value is None:
            continue
        value = single[key] if key in single and key not in changes else value
        out += struct.pack("<Q", len(key)) + key.encode() + encoded(value)
        count += 1
    offset = 0
    for tensor, array in zip(file.tensors, arrays, strict=True):
        out += struct.pack("<Q", len(tensor.name)) + tensor.name.encode()
        out += struct.pack("<I", len(tensor.ne)) + struct.pack(f"<{len(tensor.ne)}Q", *tensor.ne)
        out += struct.pack("<IQ", tensor.type, offset)
        offset += -(-array.nbytes // alignment) * alignment
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(arrays), count)) + out
    for array in arrays:
        out += bytes(-len(out) % alignment) + array.tobytes()
    return write(path, bytes(out))
