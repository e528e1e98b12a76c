"""How fast this machine reads memory: the roof over every decode step."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .problem import aligned_empty

#: Reads go on for about this long, so that starting the threads weighs nothing.
_SECONDS = 10e-3


class Reader:
    """Reads an array of a given size over and over, on a number of threads.

    numpy's maximum of int32 is the reader: vector loads, hardly any arithmetic, no GIL. Each
    thread reads a part of its own, as the threads of an attention call do.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.size = max(size // 4, threads) * 4
        data = aligned_empty((self.size // 4,), np.int32)
        data.fill(1)
        self._parts = np.array_split(data, threads)
        self._pool = ThreadPoolExecutor(threads)
        self._barrier = threading.Barrier(threads)
        self._passes = 1
        for _ in range(3):
            seconds = self()
            self._passes = max(1, int(self._passes * _SECONDS / max(seconds * self._passes, 1e-9)))

    def __call__(self) -> float:
        """Return the seconds of one pass over all bytes."""
        spans = list(self._pool.map(self._read, range(len(self._parts))))
        start = min(span[0] for span in spans)
        return (max(span[1] for span in spans) - start) / self._passes

    def _read(self, index: int) -> tuple[float, float]:
        part = self._parts[index]
        part.max()  # into the caches, as far as it fits
        self._barrier.wait()
        start = time.perf_counter()
        for _ in range(self._passes):
            part.max()
        return start, time.perf_counter()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
