"""What both benches find: rows of contenders in tables, and who was faster than mixedkv."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

import mixedkv as mkv


@dataclass(kw_only=True)
class Row:
    """One contender in one table. Times in seconds; None where it was not timed."""

    peer: str
    name: str
    #: Median over the rounds of its time by that of the row named in `against`.
    ratio: float | None = None
    against: str | None = None
    #: Why it was not timed.
    problem: str | None = None

    def fail(self, error: Exception) -> None:
        """Note what a library threw: its own affair, the others go on."""
        text = str(error).strip().splitlines()
        self.problem = f"{type(error).__name__}: {text[0] if text else ''}"[:300]


@dataclass(frozen=True)
class Faster:
    """A contender of another library that took less time than mixedkv's row of its kind."""

    name: str
    #: That row.
    against: str
    #: Its time by that row's, below 1.
    ratio: float


def faster(rows: Iterable[tuple[Row, float | None]]) -> list[Faster]:
    """Return the libraries' rows whose ratios beat mixedkv's row of their kind, fastest first."""
    found = [
        Faster(row.name, row.against, ratio)
        for row, ratio in rows
        if row.peer not in ("mixedkv", "memory") and row.against and ratio is not None and ratio < 1
    ]
    return sorted(found, key=lambda one: one.ratio)


R = TypeVar("R", bound=Row)


@dataclass(kw_only=True)
class Table(Generic[R]):
    """One cell of a plan."""

    threads: int
    rows: list[R] = field(default_factory=list)
    rounds: int = 0
    #: CPUs that other processes kept busy meanwhile; None where it is not known.
    others_load: float | None = None
    #: Who was faster than mixedkv, the fastest first.
    faster: list[Faster] = field(default_factory=list)

    @property
    def subject(self) -> str:
        """What it is of, in words."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Its subject and its threads."""
        return f"{self.subject}, {count(self.threads, 'thread')}"


T = TypeVar("T", bound=Table[Any])


@dataclass(kw_only=True)
class Report(Generic[T]):
    """Everything that a run found."""

    machine: dict[str, Any]
    peers: dict[str, str]
    absent: dict[str, str]
    tables: list[T] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """What mixedkv itself got wrong; must be empty."""
        return [
            f"{row.name}, {table.title}: {row.problem}"
            for table in self.tables
            for row in table.rows
            if row.peer == "mixedkv" and row.problem
        ]

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return dataclasses.asdict(self)


def count(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def machine() -> dict[str, Any]:
    """Describe this machine and this build."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "threads": mkv.get_num_threads(),
        "mixedkv": mkv.__version__,
        "isa": mkv.isa.active(),
        "isas": mkv.isa.available(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
