"""What else this machine was doing: figures for many threads mean little beside a compiler."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OthersLoad:
    """Measures, from its making on, how many CPUs' time went to other processes."""

    def __init__(self) -> None:
        self._start = self._read()

    def _read(self) -> tuple[float, float, float] | None:
        """Return wall time, all CPUs' busy seconds, and this process's own."""
        try:
            fields = _STAT.read_text().split("\n", 1)[0].split()[1:]
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already.
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()

    def cpus(self) -> float | None:
        """Return the CPUs that others kept busy on average; None where the system does not say."""
        end = self._read()
        if self._start is None or end is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0
