"""What a run of attention and conversion consists of, and running it.

A cell is a task, a shape, a length and a number of threads; it makes one table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import mixedkv as mkv

from .. import memory
from ..progress import SILENT, Progress
from . import results
from .bandwidth import Reader
from .load import OthersLoad
from .peers import Contender, Peer, Task
from .problem import Problem, Rows, aligned_empty, relative_error
from .results import faster, machine
from .shapes import Shape
from .timing import Clock, Run, Timing, measure, median_ratio

TASKS = ("decode", "prefill", "convert")
#: Queries of a prefill step.
PREFILL_QUERIES = 512
#: Tokens whose rows are converted: a move's batch, which stays in cache, and many.
CONVERT_TOKENS = (256, 16384)
#: What the contenders of a cell hold together: copies of its keys and values in f16, beside those
#: in each of the formats.
_COPIES, _COPIES_OF_FORMAT = 14, 8
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shapes: Sequence[Shape]
    tasks: Sequence[str]
    formats: Sequence[str]
    decode_kv: Sequence[int]
    prefill_kv: Sequence[int]
    threads: Sequence[int]
    seconds: float
    rounds: int | None
    convert_tokens: Sequence[int]
    prefill_queries: int


@dataclass(kw_only=True)
class Row(results.Row):
    """One contender in one cell."""

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
    #: Bytes of K and V (of the float side in a conversion) a second, from the median.
    bytes_per_second: float | None = None
    #: The same by what reading that many bytes reached in this run.
    share_of_read: float | None = None
    #: Arithmetic of attention a second, in prefill.
    flops: float | None = None
    calls: int | None = None


@dataclass(kw_only=True)
class Table(results.Table[Row]):
    """One cell."""

    task: str
    shape: Shape
    qo_len: int
    kv_len: int
    #: By how much reading both tiers exceeds reading its parts alone, by the cold one's format;
    #: median over the rounds.
    mixed_over_parts: dict[str, float] = field(default_factory=dict)
    #: Why nothing ran.
    skipped: str | None = None

    @property
    def subject(self) -> str:
        """What it is of, in words."""
        if self.task == "convert":
            return f"conversion: {self.kv_len} rows of {self.shape.head_dim}"
        queries = f", {self.qo_len} causal queries" if self.task == "prefill" else ""
        return f"{self.task}: {self.shape}{queries}, kv {self.kv_len}"


@dataclass(kw_only=True)
class Report(results.Report[Table]):
    """Everything that a run found."""

    notes: list[str]


def run(
    plan: Plan,
    peers: Sequence[Peer],
    absent: dict[str, str],
    progress: Progress = SILENT,
    clock: Clock | None = None,
) -> Report:
    """Run a plan."""
    report = Report(
        machine=machine(),
        peers={peer.name: peer.version for peer in peers},
        notes=[*(note for peer in peers for note in peer.notes), *_left_out(plan)],
        absent=dict(absent),
    )
    runner = _Runner(plan, peers, progress, clock)
    for tables in cells(plan):
        report.tables += tables
        if tables[0].task == "convert":
            runner.convert(tables)
        else:
            runner.attend(tables)
    return report


def cells(plan: Plan) -> list[list[Table]]:
    """Return the empty tables of a run; those that share their data, by threads, in one list."""
    # Conversion knows rows only: one shape a head_dim says it all.
    widths = list({shape.head_dim: shape for shape in reversed(plan.shapes)}.values())[::-1]
    wanted = [
        *(("decode", s, 1, n) for s in plan.shapes for n in plan.decode_kv),
        *(("prefill", s, plan.prefill_queries, n) for s in plan.shapes for n in plan.prefill_kv),
        *(("convert", s, 0, n * s.num_kv_heads) for s in widths for n in plan.convert_tokens),
    ]
    return [
        [
            Table(task=task, shape=shape, qo_len=qo_len, kv_len=kv_len, threads=threads)
            for threads in plan.threads
        ]
        for task, shape, qo_len, kv_len in wanted
        if task in plan.tasks
    ]


def formats_of(shape: Shape, formats: Sequence[str]) -> list[str]:
    """Return those formats of whose blocks the shape's rows are made."""
    infos = map(mkv.formats.info, formats)
    return [one.name for one in infos if shape.head_dim % one.block_values == 0]


def _left_out(plan: Plan) -> list[str]:
    """Say which formats some shapes can't have."""
    return [
        f"{name} takes rows of multiples of {mkv.formats.info(name).block_values} values: left out "
        f"at a head_dim of {width}"
        for width, shape in {shape.head_dim: shape for shape in plan.shapes}.items()
        for name in plan.formats
        if name not in formats_of(shape, plan.formats)
    ]


def attention_bytes(shape: Shape, kv_len: int, formats: Sequence[str]) -> float:
    """Return about what the contenders of a cell of attention take together."""
    bits = sum(mkv.formats.info(name).bits for name in formats)
    copies = _COPIES + _COPIES_OF_FORMAT * bits / 16
    return 4.0 * shape.num_kv_heads * shape.head_dim * kv_len * copies


def fits_memory(size: float) -> bool:
    """Return whether that many bytes leave the machine some air."""
    return size <= _SHARE_OF_MEMORY * memory.available()


def faster_than_own(rows: Iterable[Row]) -> list[results.Faster]:
    """Return the libraries' rows that beat mixedkv's row of their kind, the fastest first."""
    return faster((row, row.ratio) for row in rows)


class _Runner:
    """Runs cells, one after the other."""

    def __init__(
        self, plan: Plan, peers: Sequence[Peer], progress: Progress, clock: Clock | None
    ) -> None:
        self.plan = plan
        self.peers = peers
        self.progress = progress
        self.clock = clock

    def attend(self, tables: Sequence[Table]) -> None:
        """Fill tables of one problem."""
        first, peers = tables[0], self.peers
        formats = formats_of(first.shape, self.plan.formats)
        needed = attention_bytes(first.shape, first.kv_len, formats)
        if not fits_memory(needed):
            for table in tables:
                self.progress.phase(table.title)
                table.skipped = f"would take about {memory.in_words(needed)} of memory"
            return
        self.progress.phase(first.title)
        self.progress.at(0, 1, "preparing")
        problem = Problem.random(first.shape, first.qo_len, first.kv_len)
        contenders: list[Contender] = []
        failed: list[Row] = []
        for i, peer in enumerate(peers):
            self.progress.at(i, len(peers), f"preparing {peer.name}")
            try:
                task: Task = "prefill" if first.task == "prefill" else "decode"
                contenders += peer.attention(task, problem, formats)
            except Exception as error:  # whatever a peer's library throws is its own affair
                failed.append(Row(peer=peer.name, name=peer.name, kv_type="", role="race"))
                failed[-1].fail(error)
        for i, table in enumerate(tables):
            if i:
                self.progress.phase(table.title)
            table.rows += failed
            self._time_attention(table, problem, contenders, formats)
        del problem, contenders
        gc.collect()

    def convert(self, tables: Sequence[Table]) -> None:
        """Fill tables of the same rows."""
        shape = tables[0].shape
        data = Rows(tables[0].kv_len, shape.head_dim, formats_of(shape, self.plan.formats))
        conversions = [one for peer in self.peers for one in peer.conversions(data)]
        # mixedkv first in every kind.
        conversions.sort(key=lambda one: data.kinds.index(one.kind))
        for table in tables:
            self.progress.phase(table.title)
            runs, sizes = [], {}
            for i, one in enumerate(conversions):
                self.progress.at(i, len(conversions), f"checking {one.name} {one.kind}")
                row = Row(peer=one.peer, name=one.name, kv_type="", role=one.kind)
                table.rows.append(row)
                try:
                    call = one.bind(table.threads)
                    call()
                    answer = data.answer(one.kind)
                    row.error = float(np.mean(one.result().reshape(answer.shape) != answer))
                except Exception as error:  # as above
                    row.fail(error)
                    continue
                if row.error > one.tolerance:
                    row.problem = "wrong: other bytes than the format's definition"
                    continue
                runs.append(Run(f"{one.name} {one.kind}", call))
            for kv_type in ("f32", "f16"):
                source = data.rows(kv_type)
                name = f"copying memory, {kv_type}, 1 thread"
                table.rows.append(Row(peer="memory", name=name, kv_type=kv_type, role="roof"))
                runs.append(Run(name, _copy(source)))
                sizes[kv_type] = source.nbytes
            times = self._measure(table, runs)
            for row in table.rows:
                if row.role == "roof":
                    _fill_times(row, times[row.name], sizes[row.kv_type], None)
                elif row.problem is None:
                    own = times.get(f"mixedkv {row.role}")
                    timing = times[f"{row.name} {row.role}"]
                    _fill_times(row, timing, data.float_bytes(row.role), own)
            table.faster = faster_than_own(table.rows)

    def _time_attention(
        self,
        table: Table,
        problem: Problem,
        contenders: Sequence[Contender],
        formats: Sequence[str],
    ) -> None:
        """Check every contender, time those that are right, and fill in the table's rows."""
        runs: list[Run] = []
        timed: list[tuple[Contender, Row]] = []
        for i, one in enumerate(contenders):
            self.progress.at(i, len(contenders), f"checking {one.name}")
            row = Row(peer=one.peer, name=one.name, kv_type=one.kv_type, role=one.role)
            row.arithmetic = one.arithmetic
            table.rows.append(row)
            try:
                call = one.bind(table.threads)
                call()
                row.error = relative_error(one.result(), one.answer())
            except Exception as error:  # as above
                row.fail(error)
                continue
            if row.error > one.tolerance:
                row.problem = f"wrong: error above {one.tolerance:g}"
                continue
            runs.append(Run(one.name, call))
            timed.append((one, row))
        readers = {}
        if table.task == "decode":
            for kv_type in formats:
                size = int(problem.kv_len * problem.row_bytes(kv_type))
                name = f"reading memory, {kv_type} size"
                readers[kv_type] = name, Reader(size, table.threads)
                runs.append(Run(name, readers[kv_type][1], self_timed=True))
        times = self._measure(table, runs)
        # mixedkv's cache by type and arithmetic: its first contender of each.
        own: dict[tuple[str, str], Timing] = {}
        for one, _ in timed:
            if one.peer == "mixedkv" and one.role == "race":
                own.setdefault((one.kv_type, one.arithmetic), times[one.name])
        reading = {}
        for kv_type, (name, reader) in readers.items():
            reader.close()
            row = Row(peer="memory", name=name, kv_type=kv_type, role="roof")
            _fill_times(row, times[name], reader.size, own.get((kv_type, "f32")))
            reading[kv_type] = reader.size / times[name].median
            table.rows.append(row)
        for one, row in timed:
            baseline = own.get((one.against, one.arithmetic)) or own.get((one.against, "f32"))
            baseline = None if row.role == "part" else baseline
            _fill_times(row, times[one.name], one.kv_bytes, baseline)
            if one.against in reading and row.bytes_per_second is not None:
                row.share_of_read = row.bytes_per_second / reading[one.against]
            if table.task == "prefill":
                pairs = problem.pairs * problem.shape.num_qo_heads
                row.flops = 4.0 * problem.shape.head_dim * pairs / times[one.name].median
        parts = {row.kv_type: times[row.name].rounds for _, row in timed if row.role == "part"}
        for row in (row for _, row in timed if row.role == "mixed"):
            if row.kv_type in parts and "f16" in parts:  # hot is f16
                sums = [a + b for a, b in zip(parts["f16"], parts[row.kv_type], strict=True)]
                ratio = median_ratio(times[row.name], Timing("parts", 1, sums))
                table.mixed_over_parts[row.kv_type] = ratio
        table.faster = faster_than_own(table.rows)

    def _measure(self, table: Table, runs: Sequence[Run]) -> dict[str, Timing]:
        """Time contenders in turns; give their timings by name."""
        plan = self.plan

        def on_round(done: int, elapsed: float) -> None:
            at, most = (done, plan.rounds) if plan.rounds else (elapsed, plan.seconds)
            self.progress.at(min(at, most), most or 1, f"timing, round {done}")

        self.progress.at(0, 1, "timing")
        load = OthersLoad()
        timings = measure(
            runs, seconds=plan.seconds, rounds=plan.rounds, clock=self.clock, on_round=on_round
        )
        table.others_load = load.cpus()
        table.rounds = len(timings[0].rounds) if timings else 0
        return {timing.name: timing for timing in timings}


def _fill_times(row: Row, timing: Timing, size: float, baseline: Timing | None) -> None:
    row.median, row.best, row.calls = timing.median, timing.best, timing.calls
    row.bytes_per_second = size / timing.median
    if baseline is not None:
        row.ratio = median_ratio(timing, baseline)
        row.against = baseline.name


def _copy(source: Any) -> Callable[[], object]:
    return partial(np.copyto, aligned_empty(source.shape, source.dtype), source)
