"""gguf's numpy conversions: what Python tools around GGUF files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from ..problem import Rows
from . import Conversion, Peer, imported


class Gguf(Peer):
    """gguf as a peer."""

    name = "gguf"

    def __init__(self, gguf: Any, quants: Any, version: str) -> None:
        super().__init__()
        self._gguf = gguf
        self._quants = quants
        self.version = version

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return its conversions from and to f32; it has no others, and one thread."""
        found = (self._conversion(rows, kind) for kind in rows.kinds if "f32" in kind.split("->"))
        return [one for one in found if one is not None]

    def _conversion(self, rows: Rows, kind: str) -> Conversion | None:
        source, _ = rows.arrays(kind)
        from_, to = kind.split("->")
        number = mkv.formats.info(to if from_ == "f32" else from_).ggml_type
        if number is None:
            return None
        function = self._quants.quantize if from_ == "f32" else self._quants.dequantize
        ggml_type = self._gguf.GGMLQuantizationType(number)
        try:
            function(source[:1], ggml_type)
        except NotImplementedError:  # it reads more types than it writes
            return None
        last: list[NDArray[Any]] = [np.empty(0, np.float32)]

        def bind(threads: int) -> Callable[[], object]:
            def call() -> None:
                last[0] = function(source, ggml_type)

            return call

        return Conversion(self.name, "gguf (numpy)", kind, bind, lambda: last[0])


def load() -> Gguf:
    """Return gguf, or raise AbsentError."""
    gguf, quants = imported("gguf", "gguf.quants")
    from importlib.metadata import version

    return Gguf(gguf, quants, version("gguf"))
