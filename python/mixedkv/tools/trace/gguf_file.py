"""Reading GGUF files that nobody vouches for.

Everything that a file claims is held against its size before anything is allocated or looped over,
and tensors are mapped, not read. What is wrong with a file is told in one line, by `TraceError`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from .stored import Rows

MAX_NAME = 1024
"""Bytes of a key or of a tensor's name; real ones have some dozens."""
MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_MEMORY_ALIGNMENT = 4
"""Bytes that suit every type: 4 for float32, 2 for float16 and a block's scale."""
_MAX_STRING = 1 << 24
_MAX_STRINGS = 1 << 22
_MAX_VALUES = 1 << 22
"""Of an array of numbers. A trace's longest have a number for each token, or for each key of a
step: contexts are of a million or so at most."""
_MAX_ENTRIES = 1 << 19
_MAX_METADATA = 1 << 27
"""Bytes of all keys and values: a file may be sparse, so that its size says nothing of what it took
to make it. 30 million positions, over all steps."""
_MAX_TENSORS = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9

_TABLE = [mkv.formats.info(name) for name in mkv.formats.available()]
FORMATS = {one.ggml_type: one for one in _TABLE if one.ggml_type is not None}
"""ggml's number -> the format of the same bytes."""
BYTES = 24
"""ggml's I8: what rows of a format are stored as that has no number of its own."""


class TraceError(Exception):
    """A file can't be read as a trace; the message is one line that says why."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file.

    Attributes
    ----------
    ne
        Shape in ggml's order: the first is contiguous.
    type
        ggml's number: one of `FORMATS`, or `BYTES`; others are carried, and can't be loaded.
    offset
        Bytes from the file's start.
    opaque
        The format whose rows are stored as `BYTES`; None: of a type of its own.
    """

    path: Path
    name: str
    ne: tuple[int, ...]
    type: int
    offset: int
    opaque: mkv.formats.Format | None = None

    @property
    def format(self) -> mkv.formats.Format | None:
        """What its rows are; None where a trace can't hold them."""
        return self.opaque or FORMATS.get(self.type)

    def as_rows_of(self, format: mkv.formats.Format) -> FileTensor:
        """Give a tensor of `BYTES` as rows of a format.

        Raises
        ------
        TraceError
            Its rows are no whole blocks.
        """
        if self.ne[0] % format.block_bytes:
            raise TraceError(
                f"{self.path.name}: {self.name!r} is {format.name} with rows of {self.ne[0]} "
                f"bytes, no multiple of {format.block_bytes}"
            )
        ne = (format.row_values(self.ne[0]), *self.ne[1:])
        return dataclasses.replace(self, ne=ne, opaque=format)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in C order, in values."""
        return tuple(reversed(self.ne))

    @property
    def type_name(self) -> str:
        """Name of the type, such as f16."""
        return self.format.name if self.format else f"ggml type {self.type}"

    def load(self) -> Rows:
        """Map it: float32 or float16 [shape], or a QuantizedArray of that shape.

        Copied where it lies at an address that is odd for its type.
        """
        format = self.format
        if format is None:
            raise TraceError(
                f"{self.path.name}: {self.name!r} has {self.type_name}; a trace holds {held()}"
            )
        if format.packed:
            bytes_of_row = format.row_bytes(self.shape[-1])
            return mkv.QuantizedArray(self._map("u1", bytes_of_row), format.name)
        return self._map("<f4" if format.name == "f32" else "<f2", self.shape[-1])

    def _map(self, kind: str, width: int) -> NDArray[Any]:
        shape, dtype = (*self.shape[:-1], width), np.dtype(kind)
        if self.offset % _MEMORY_ALIGNMENT == 0:
            return np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=shape)
        # The file's alignment is less than that of its types: a map of it would be, too.
        count = math.prod(shape)
        return np.fromfile(self.path, dtype, count, offset=self.offset).reshape(shape)


def held() -> str:
    """Name the types that a trace may hold."""
    return ", ".join(one.name for one in FORMATS.values())


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a GGUF file says, checked against the file's size."""

    path: Path
    metadata: dict[str, Any]  # arrays of numbers as numpy arrays, of strings as lists
    tensors: list[FileTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read and check a file's header.

    Raises
    ------
    TraceError
        It is not there, no GGUF file, or not a sound one.
    """
    try:
        kind = path.stat().st_mode
        # Opening a pipe that nobody writes to would wait for ever; a folder is refused by open.
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise TraceError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.end = self.size  # how far it may be read
        self.at = 0

    def refuse(self, why: str) -> TraceError:
        return TraceError(f"{self.path.name}: {why}")

    def read(self) -> GGUFFile:
        if self.size < 4 or self.take(4, "the magic") != b"GGUF":
            raise self.refuse("is not a GGUF file (it does not begin with GGUF)")
        version = self.number("I", "the version")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise self.refuse("is a big-endian GGUF file, which is not supported")
            raise self.refuse(f"is GGUF of version {version}; 2 and 3 are known")
        # The least that an entry takes says how many there can be.
        num_tensors = self.count("Q", "tensors", least_bytes=8 + 4 + 4 + 8, most=_MAX_TENSORS)
        num_entries = self.count("Q", "metadata entries", least_bytes=8 + 4 + 1, most=_MAX_ENTRIES)
        self.end = min(self.size, self.at + _MAX_METADATA)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string("a key", MAX_NAME)
            if key in metadata:
                raise self.refuse(f"has the key {key!r} twice")
            metadata[key] = self.value(self.number("I", f"the type of {key!r}"), key)
        self.end = self.size
        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 0 < alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self.refuse(
                f"has an alignment of {reprlib.repr(alignment)}, which is no power of two"
            )
        infos = [self.tensor_info() for _ in range(num_tensors)]
        data = -(-self.at // alignment) * alignment
        names: set[str] = set()
        tensors = []
        for name, ne, kind, offset in infos:
            if name in names:
                raise self.refuse(f"has the tensor {name!r} twice")
            names.add(name)
            tensors.append(self.tensor(name, ne, kind, offset, data, alignment))
        self.check_overlap(tensors)
        return GGUFFile(self.path, metadata, tensors)

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.refuse(
                f"ends within {what}: {n} bytes are wanted at byte {self.at} of {self.size}"
            )
        if n > self.end - self.at:
            raise self.refuse(f"has more than {_MAX_METADATA} bytes of metadata, up to {what}")
        found = self.file.read(n)
        if len(found) != n:
            raise self.refuse(f"ends within {what}")
        self.at += n
        return found

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, code: str, what: str, *, least_bytes: int, most: int | None = None) -> int:
        n = int(self.number(code, f"the number of {what}"))
        if n > (self.size - self.at) // least_bytes:
            raise self.refuse(f"claims {n} {what}, more than its {self.size} bytes can hold")
        if most is not None and n > most:
            raise self.refuse(f"claims {n} {what}; at most {most} are read")
        return n

    def string(self, what: str, most: int) -> str:
        n = int(self.number("Q", what))
        if n > most:
            raise self.refuse(f"claims {n} bytes for {what}")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.refuse(f"has {what} that is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], repr(key))
        if kind == _STRING:
            return self.string(repr(key), _MAX_STRING)
        if kind != _ARRAY:
            raise self.refuse(f"{key!r} has the unknown type {kind}")
        item = self.number("I", repr(key))
        if item == _STRING:
            n = self.count("Q", f"strings in {key!r}", least_bytes=8, most=_MAX_STRINGS)
            return [self.string(repr(key), _MAX_STRING) for _ in range(n)]
        if item not in _SCALARS:
            raise self.refuse(f"{key!r} is an array of the unknown type {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        n = self.count("Q", f"values in {key!r}", least_bytes=width, most=_MAX_VALUES)
        return np.frombuffer(self.take(n * width, repr(key)), "<" + _SCALARS[item])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("the name of a tensor", MAX_NAME)
        dims = int(self.number("I", f"the shape of {name!r}"))
        if not 1 <= dims <= MAX_DIMS:
            raise self.refuse(f"{name!r} claims {dims} dimensions; 1 to {MAX_DIMS} are possible")
        ne = tuple(int(self.number("Q", f"the shape of {name!r}")) for _ in range(dims))
        kind = int(self.number("I", f"the type of {name!r}"))
        return name, ne, kind, int(self.number("Q", f"the offset of {name!r}"))

    def tensor(
        self, name: str, ne: tuple[int, ...], kind: int, offset: int, data: int, alignment: int
    ) -> FileTensor:
        values = math.prod(ne)
        if values == 0 or any(n > self.size * 2 for n in ne):
            raise self.refuse(f"{name!r} has the impossible shape {list(ne)}")
        block = FORMATS[kind].block_values if kind in FORMATS else 1
        if ne[0] % block:
            raise self.refuse(
                f"{name!r} is {FORMATS[kind].name} with rows of {ne[0]} values, no multiple of "
                f"{block}"
            )
        if offset % alignment:
            raise self.refuse(f"{name!r} lies at offset {offset}, no multiple of {alignment}")
        start = data + offset
        end = start + num_bytes(kind, values)
        if end > self.size:
            raise self.refuse(
                f"{name!r} claims bytes {start} to {end}, the file has {self.size}: it is "
                "truncated, or its header is wrong"
            )
        return FileTensor(self.path, name, ne, kind, start)

    def check_overlap(self, tensors: list[FileTensor]) -> None:
        end, last = 0, ""
        for tensor in sorted(tensors, key=lambda one: one.offset):
            if tensor.offset < end:
                raise self.refuse(f"{tensor.name!r} and {last!r} claim the same bytes")
            end = tensor.offset + num_bytes(tensor.type, math.prod(tensor.ne))
            last = tensor.name


def num_bytes(kind: int, values: int) -> int:
    """Bytes of a tensor; of a type that is not known here, the least it could be."""
    if kind in FORMATS:
        return FORMATS[kind].row_bytes(values)
    return values if kind == BYTES else 0
