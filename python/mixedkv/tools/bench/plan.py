"""What a run consists of, and running it.

A cell is a task, a shape, a length and a number of threads; it makes one table.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import mixedkv as mkv

from . import memory
from .bandwidth import Reader
from .load import OthersLoad
from .peers import Contender, Conversion, Peer
from .problem import KINDS, Problem, Rows, aligned_empty, relative_error
from .shapes import Shape
from .timing import Clock, Run, Timing, measure, median_ratio

__all__ = ["TASKS", "Plan", "Progress", "Report", "Row", "Table", "run"]

TASKS = ("decode", "prefill", "convert")
#: Queries of a prefill step.
PREFILL_QUERIES = 512
#: Tokens whose rows are converted: a move's batch, which stays in cache, and many.
CONVERT_TOKENS = (256, 16384)
#: What the contenders of a cell hold together, in f16 copies of its keys and values.
_COPIES = 24
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shapes: Sequence[Shape]
    tasks: Sequence[str]
    decode_kv: Sequence[int]
    prefill_kv: Sequence[int]
    threads: Sequence[int]
    seconds: float
    rounds: int | None
    convert_tokens: Sequence[int]
    prefill_queries: int


@dataclass
class Row:
    """One contender in one cell. Times in seconds; None where it was not timed."""

    peer: str
    name: str
    kv_type: str
    #: "race", "mixed", "part", "roof" (reading memory, copying memory) or a conversion's kind.
    role: str
    #: Of attention, the coarsest that queries, weights or sums are rounded to: "f32", "f16",
    #: "bf16" or "int8".
    arithmetic: str | None = None
    #: Relative error against float64; of conversions the share of differing elements.
    error: float | None = None
    median: float | None = None
    best: float | None = None
    #: Median over the rounds of its time by that of the row named in `against`.
    ratio: float | None = None
    against: str | None = None
    #: Bytes of K and V (of the float side in a conversion) a second, from the median.
    bytes_per_second: float | None = None
    #: The same by what reading that many bytes reached in this run.
    share_of_read: float | None = None
    #: Arithmetic of attention a second, in prefill.
    flops: float | None = None
    calls: int | None = None
    #: Why it was not timed.
    problem: str | None = None


@dataclass(frozen=True)
class Faster:
    """A contender of another library that took less time than mixedkv's row of its kind."""

    name: str
    #: That row.
    against: str
    #: Its time by that row's, below 1.
    ratio: float


@dataclass
class Table:
    """One cell."""

    task: str
    shape: Shape
    qo_len: int
    kv_len: int
    threads: int
    rows: list[Row] = field(default_factory=list)
    rounds: int = 0
    #: By how much reading both tiers exceeds reading its parts alone; median over the rounds.
    mixed_over_parts: float | None = None
    #: Who was faster than mixedkv, the fastest first.
    faster: list[Faster] = field(default_factory=list)
    #: CPUs that other processes kept busy while the rounds went on; None where it is not known.
    others_load: float | None = None
    #: Why nothing ran.
    skipped: str | None = None


@dataclass
class Report:
    """Everything that a run found."""

    machine: dict[str, Any]
    peers: dict[str, str]
    notes: list[str]
    absent: dict[str, str]
    tables: list[Table] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """What mixedkv itself got wrong; must be empty."""
        return [
            f"{row.name} in {table.task} {table.shape}, kv {table.kv_len}, "
            f"{table.threads} threads: {row.problem}"
            for table in self.tables
            for row in table.rows
            if row.peer == "mixedkv" and row.problem
        ]

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return dataclasses.asdict(self)


class Progress(Protocol):
    """Told what goes on."""

    def cell(self, title: str) -> None:
        """Note that a cell begins."""

    def doing(self, what: str, share: float) -> None:
        """Note a step within the cell, and how much of it is done."""


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


def run(
    plan: Plan,
    peers: Sequence[Peer],
    absent: dict[str, str],
    progress: Progress,
    clock: Clock | None = None,
) -> Report:
    """Run a plan."""
    report = Report(
        machine=machine(),
        peers={peer.name: peer.version for peer in peers},
        notes=[note for peer in peers for note in peer.notes],
        absent=dict(absent),
    )
    for task in TASKS:
        if task not in plan.tasks:
            continue
        if task == "convert":
            for shape in _one_a_width(plan.shapes):
                for tokens in plan.convert_tokens:
                    report.tables += _convert(plan, shape, tokens, peers, progress, clock)
            continue
        lengths = plan.decode_kv if task == "decode" else plan.prefill_kv
        for shape in plan.shapes:
            for kv_len in lengths:
                report.tables += _attention(plan, task, shape, kv_len, peers, progress, clock)
    return report


def cells(plan: Plan) -> int:
    """Return the number of tables that a run makes."""
    n = len(plan.shapes) * len(plan.threads)
    return (
        ("decode" in plan.tasks) * n * len(plan.decode_kv)
        + ("prefill" in plan.tasks) * n * len(plan.prefill_kv)
        + ("convert" in plan.tasks)
        * len(_one_a_width(plan.shapes))
        * len(plan.threads)
        * len(plan.convert_tokens)
    )


def _one_a_width(shapes: Sequence[Shape]) -> list[Shape]:
    """Conversion knows rows only: one shape a head_dim says it all."""
    return list({shape.head_dim: shape for shape in reversed(shapes)}.values())[::-1]


def attention_bytes(shape: Shape, kv_len: int) -> float:
    """Return about what the contenders of a cell of attention take together."""
    return 4.0 * shape.num_kv_heads * shape.head_dim * kv_len * _COPIES


def fits_memory(size: float) -> bool:
    """Return whether that many bytes leave the machine some air."""
    return size <= _SHARE_OF_MEMORY * memory.available()


def _attention(
    plan: Plan,
    task: str,
    shape: Shape,
    kv_len: int,
    peers: Sequence[Peer],
    progress: Progress,
    clock: Clock | None,
) -> list[Table]:
    qo_len = 1 if task == "decode" else plan.prefill_queries
    tables = [Table(task, shape, qo_len, kv_len, threads) for threads in plan.threads]
    needed = attention_bytes(shape, kv_len)
    if not fits_memory(needed):
        for table in tables:
            progress.cell(_title(table))
            table.skipped = f"would take about {memory.in_words(needed)} of memory"
        return tables
    progress.cell(_title(tables[0]))
    progress.doing("preparing", 0.0)
    problem = Problem.random(shape, qo_len, kv_len)
    contenders: list[Contender] = []
    failed: list[Row] = []
    for i, peer in enumerate(peers):
        progress.doing(f"preparing {peer.name}", i / len(peers))
        try:
            contenders += peer.attention("decode" if task == "decode" else "prefill", problem)
        except Exception as error:  # whatever a peer's library throws is its own affair
            failed.append(Row(peer.name, peer.name, "", "race", problem=_reason(error)))
    for i, table in enumerate(tables):
        if i:
            progress.cell(_title(table))
        table.rows += failed
        _time_attention(plan, table, problem, contenders, progress, clock)
    del problem, contenders
    gc.collect()
    return tables


def _title(table: Table) -> str:
    threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
    if table.task == "convert":
        return f"convert {table.kv_len} rows of {table.shape.head_dim}, {threads}"
    return f"{table.task} {table.shape}, kv {table.kv_len}, {threads}"


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def _time_attention(
    plan: Plan,
    table: Table,
    problem: Problem,
    contenders: Sequence[Contender],
    progress: Progress,
    clock: Clock | None,
) -> None:
    """Check every contender, time those that are right, and fill in the table's rows."""
    rows: list[Row] = []
    runs: list[Run] = []
    timed: list[tuple[Contender, Row]] = []
    for i, contender in enumerate(contenders):
        progress.doing(f"checking {contender.name}", i / len(contenders))
        row = Row(contender.peer, contender.name, contender.kv_type, contender.role)
        row.arithmetic = contender.arithmetic
        rows.append(row)
        try:
            call = contender.bind(table.threads)
            call()
            row.error = relative_error(contender.result(), contender.answer())
        except Exception as error:  # as above
            row.problem = _reason(error)
            continue
        if row.error > contender.tolerance:
            row.problem = f"wrong: error above {contender.tolerance:g}"
            continue
        runs.append(Run(contender.name, call))
        timed.append((contender, row))
    readers = {}
    if table.task == "decode":
        for kv_type in ("f16", "q4_0"):
            size = int(problem.kv_len * problem.row_bytes(kv_type))
            readers[kv_type] = Reader(size, table.threads)
            runs.append(Run(f"reading memory, {kv_type} size", readers[kv_type], self_timed=True))
    timings = _measure(plan, table, runs, progress, clock)
    for reader in readers.values():
        reader.close()
    by_name = {timing.name: timing for timing in timings}
    reading = {
        kv_type: reader.size / by_name[f"reading memory, {kv_type} size"].median
        for kv_type, reader in readers.items()
    }
    own = _baselines(timed, by_name)
    for contender, row in timed:
        timing = by_name[contender.name]
        baseline = None
        if row.role != "part":
            baseline = own.get((contender.against, contender.arithmetic))
            baseline = baseline or own.get((contender.against, "f32"))
        _fill_times(row, timing, contender.kv_bytes, baseline)
        assert row.median is not None
        if contender.against in reading and row.bytes_per_second is not None:
            row.share_of_read = row.bytes_per_second / reading[contender.against]
        if table.task == "prefill":
            pairs = problem.pairs * problem.shape.num_qo_heads
            row.flops = 4.0 * problem.shape.head_dim * pairs / row.median
    for kv_type, reader in readers.items():
        name = f"reading memory, {kv_type} size"
        row = Row("memory", name, kv_type, "roof")
        _fill_times(row, by_name[name], reader.size, own.get((kv_type, "f32")))
        rows.append(row)
    parts = [by_name[row.name] for _, row in timed if row.role == "part"]
    mixed = [by_name[row.name] for _, row in timed if row.role == "mixed"]
    if len(parts) == 2 and len(mixed) == 1:
        both = Timing("parts", 1, [a + b for a, b in zip(*(p.rounds for p in parts), strict=True)])
        table.mixed_over_parts = median_ratio(mixed[0], both)
    table.rows += rows
    table.faster = faster_than_own(table.rows)
    table.rounds = len(timings[0].rounds) if timings else 0


def _baselines(
    timed: Sequence[tuple[Contender, Row]], by_name: dict[str, Timing]
) -> dict[tuple[str, str], Timing]:
    """Return the timing of mixedkv's cache by type and arithmetic: its first contender of each."""
    own: dict[tuple[str, str], Timing] = {}
    for contender, _ in timed:
        if contender.peer == "mixedkv" and contender.role == "race":
            own.setdefault((contender.kv_type, contender.arithmetic), by_name[contender.name])
    return own


def faster_than_own(rows: Sequence[Row]) -> list[Faster]:
    """Return the libraries' rows that beat mixedkv's row of their kind, the fastest first."""
    found = [
        Faster(row.name, row.against, row.ratio)
        for row in rows
        if row.peer != "mixedkv"
        and row.role != "roof"
        and row.against is not None
        and row.ratio is not None
        and row.ratio < 1
    ]
    return sorted(found, key=lambda one: one.ratio)


def _fill_times(row: Row, timing: Timing, size: float, baseline: Timing | None) -> None:
    row.median, row.best, row.calls = timing.median, timing.best, timing.calls
    row.bytes_per_second = size / timing.median
    if baseline is not None:
        row.ratio = median_ratio(timing, baseline)
        row.against = baseline.name


def _measure(
    plan: Plan, table: Table, runs: Sequence[Run], progress: Progress, clock: Clock | None
) -> list[Timing]:
    def on_round(done: int, elapsed: float) -> None:
        most = plan.rounds or plan.seconds
        share = (done if plan.rounds else elapsed) / most if most else 1.0
        progress.doing(f"timing, round {done}", min(1.0, share))

    progress.doing("timing", 0.0)
    load = OthersLoad()
    timings = measure(
        runs, seconds=plan.seconds, rounds=plan.rounds, clock=clock, on_round=on_round
    )
    table.others_load = load.cpus()
    return timings


def _convert(
    plan: Plan,
    shape: Shape,
    tokens: int,
    peers: Sequence[Peer],
    progress: Progress,
    clock: Clock | None,
) -> list[Table]:
    data = Rows(tokens * shape.num_kv_heads, shape.head_dim)
    conversions = [one for peer in peers for one in peer.conversions(data)]
    # mixedkv first in every kind.
    conversions.sort(key=lambda one: KINDS.index(one.kind))
    tables = []
    for threads in plan.threads:
        table = Table("convert", shape, 0, len(data.f32), threads)
        tables.append(table)
        progress.cell(_title(table))
        _time_conversions(plan, table, data, conversions, progress, clock)
    return tables


def _time_conversions(
    plan: Plan,
    table: Table,
    data: Rows,
    conversions: Sequence[Conversion],
    progress: Progress,
    clock: Clock | None,
) -> None:
    runs: list[Run] = []
    timed: list[tuple[Conversion, Row]] = []
    for i, conversion in enumerate(conversions):
        progress.doing(f"checking {conversion.name} {conversion.kind}", i / len(conversions))
        row = Row(conversion.peer, conversion.name, "", conversion.kind)
        table.rows.append(row)
        try:
            call = conversion.bind(table.threads)
            call()
            answer = data.answer(conversion.kind)
            row.error = float(np.mean(conversion.result().reshape(answer.shape) != answer))
        except Exception as error:  # whatever a peer's library throws is its own affair
            row.problem = _reason(error)
            continue
        if row.error > 0:
            row.problem = "wrong: other bytes than the format's definition"
            continue
        runs.append(Run(f"{conversion.name} {conversion.kind}", call))
        timed.append((conversion, row))
    copies = {}
    for name, source in (("f32", data.f32), ("f16", data.f16)):
        copies[name] = Run(f"copying memory, {name}, 1 thread", _copy(source))
    runs += copies.values()
    timings = _measure(plan, table, runs, progress, clock)
    by_name = {timing.name: timing for timing in timings}
    for conversion, row in timed:
        size = data.float_bytes(conversion.kind)
        timing = by_name[f"{conversion.name} {conversion.kind}"]
        _fill_times(row, timing, size, by_name.get(f"mixedkv {conversion.kind}"))
    table.faster = faster_than_own(table.rows)
    for name, copy in copies.items():
        row = Row("memory", copy.name, name, "roof")
        size = (data.f32 if name == "f32" else data.f16).nbytes
        _fill_times(row, by_name[copy.name], size, None)
        table.rows.append(row)
    table.rounds = len(timings[0].rounds)


def _copy(source: Any) -> Callable[[], object]:
    target = aligned_empty(source.shape, source.dtype)
    return lambda: np.copyto(target, source)
