"""gguf's numpy conversions: what Python tools around GGUF files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Rows
from . import Conversion, Peer, imported


class Gguf(Peer):
    """gguf as a peer."""

    name = "gguf"

    def __init__(self, quants: Any, q4_0: Any, version: str) -> None:
        super().__init__()
        self._quants = quants
        self._q4_0 = q4_0
        self.version = version

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return its conversions from and to f32; it has no others, and one thread."""
        return [self._conversion(rows, kind) for kind in ("f32->q4_0", "q4_0->f32")]

    def _conversion(self, rows: Rows, kind: str) -> Conversion:
        source, _ = rows.arrays(kind)
        quants = self._quants
        function = quants.quantize if kind.endswith("q4_0") else quants.dequantize
        last: list[NDArray[Any]] = [np.empty(0, np.float32)]

        def bind(threads: int) -> Callable[[], object]:
            def call() -> None:
                last[0] = function(source, self._q4_0)

            return call

        return Conversion(self.name, "gguf (numpy)", kind, bind, lambda: last[0])


def load() -> Gguf:
    """Return gguf, or raise AbsentError."""
    gguf, quants = imported("gguf", "gguf.quants")
    from importlib.metadata import version

    return Gguf(quants, gguf.GGMLQuantizationType.Q4_0, version("gguf"))
