"""`mixedkv bench`: what it compares with, how it takes turns, what it prints. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from mixedkv.tools import memory
from mixedkv.tools.bench import command, plan, plot, problem, report, results, shapes, timing
from mixedkv.tools.bench import load as load_module
from mixedkv.tools.bench.peers import NAMES, Contender, Peer, load, own
from typer.testing import CliRunner

TINY = shapes.Shape("tiny", 4, 2, 64)
ODD = shapes.Shape("odd", 9, 3, 32)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("llama-3.1-8b", (32, 8, 128)),
        ("Qwen3-8B", (32, 8, 128)),
        ("qwen3-0.6b", (16, 8, 128)),
        ("smollm2-135m", (9, 3, 64)),
        ("mha", (32, 32, 128)),
        ("gemma-2b", (8, 1, 256)),
        ("12,4,96", (12, 4, 96)),
        ("(12, 4, 96)", (12, 4, 96)),
    ],
)
def test_shape_by_name_or_numbers(text: str, sizes: tuple[int, int, int]) -> None:
    assert shapes.parse_shape(text).sizes == sizes


@pytest.mark.parametrize("text", ["llama", "1,2", "1,2,3,4", "3,2,64", "4,2,65", "0,0,64", "a,b,c"])
def test_shape_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|got"):
        shapes.parse_shape(text)


# --- data and the right answer -------------------------------------------------------------------


def test_problem_q4_0_is_the_format(rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, 96), np.float32)
    x[0, :32] = 0
    x[1, 3], x[1, 9] = -2.5, 2.5
    rows = problem.quantize_q4_0(x)
    np.testing.assert_array_equal(rows, ref.quantize_q4_0(x))
    np.testing.assert_array_equal(rows, mkv.quantize_q4_0(x))
    np.testing.assert_array_equal(problem.dequantize_q4_0(rows), ref.dequantize_q4_0(rows))


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 1), (1, 37), (5, 5), (5, 37)])
def test_problem_answer_is_attention(qo_len: int, kv_len: int) -> None:
    one = problem.Problem.random(ODD, qo_len, kv_len)
    want, _ = ref.attention(one.q, one.k, one.v, causal=True, q_start=kv_len - qo_len, kv_start=0)
    np.testing.assert_allclose(one.answer_f16(), want.reshape(one.q.shape), rtol=1e-12, atol=1e-12)


def test_problem_answer_hot_and_cold() -> None:
    one = problem.Problem.random(ODD, 1, 40)
    k, v = (problem.dequantize_q4_0(problem.quantize_q4_0(x)) for x in (one.k, one.v))
    k[:, 30:], v[:, 30:] = one.k[:, 30:], one.v[:, 30:]
    want, _ = ref.attention(one.q, k, v)
    np.testing.assert_allclose(
        one.answer_q4_0(hot=10), want.reshape(one.q.shape), rtol=1e-12, atol=1e-12
    )


def test_relative_error_of_nan_is_infinite() -> None:
    assert problem.relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) == np.inf


def test_aligned_empty_begins_on_a_cache_line() -> None:
    for shape in ((1,), (3, 5), (1, 1000)):
        assert problem.aligned_empty(shape, np.float16).ctypes.data % 64 == 0


# --- turns ---------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only the contenders and sleeping move on."""

    def __init__(self) -> None:
        self.now = 0.0
        #: CPU seconds that other threads burn in each second of sleep.
        self.busy_until = 0.0
        self.cpu = 0.0
        self.calls: list[str] = []

    def clock(self) -> timing.Clock:
        return timing.Clock(now=lambda: self.now, cpu=lambda: self.cpu, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        if self.now < self.busy_until:
            self.cpu += seconds
        self.now += seconds

    def run(self, name: str, seconds: Callable[[float], float]) -> timing.Run:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds(self.now)

        return timing.Run(name, call)


def test_measure_interleaves_and_begins_each_round_elsewhere() -> None:
    fake = FakeTime()
    runs = [fake.run(name, lambda now: 1.0) for name in "abc"]
    timings = timing.measure(runs, rounds=4, clock=fake.clock())
    # One call each to see how long it takes; calls this long are not warmed up.
    assert "".join(fake.calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(one.rounds) for one in timings] == [4, 4, 4]
    assert [one.calls for one in timings] == [1, 1, 1]


def test_measure_calls_short_ones_more_often() -> None:
    fake = FakeTime()
    runs = [fake.run("a", lambda now: 1e-3), fake.run("b", lambda now: 1.0)]
    a, b = timing.measure(runs, rounds=2, clock=fake.clock())
    assert (a.calls, b.calls) == (10, 1)
    assert a.median == pytest.approx(1e-3)
    assert b.best == pytest.approx(1.0)


def test_measure_ratio_survives_drift() -> None:
    fake = FakeTime()
    # The machine gets slower and slower: medians drift apart from bests, the ratio does not.
    runs = [
        fake.run("a", lambda now: 1.0 * (1 + int(now / 100))),
        fake.run("b", lambda now: 3.0 * (1 + int(now / 100))),
    ]
    a, b = timing.measure(runs, rounds=99, clock=fake.clock())
    assert a.median > 2 * a.best
    assert timing.median_ratio(b, a) == pytest.approx(3.0)


def test_measure_stops_by_time_but_not_before_the_least() -> None:
    fake = FakeTime()
    (one,) = timing.measure([fake.run("a", lambda now: 1.0)], seconds=5.0, clock=fake.clock())
    assert 5 <= len(one.rounds) <= 6
    (one,) = timing.measure([fake.run("a", lambda now: 9.0)], seconds=5.0, clock=fake.clock())
    assert len(one.rounds) == 3


def test_measure_of_what_times_itself() -> None:
    fake = FakeTime()
    seconds = iter([0.5, 0.25, 0.75])
    run = timing.Run("reader", lambda: next(seconds), self_timed=True)
    (one,) = timing.measure([run], rounds=3, clock=fake.clock())
    assert (one.best, one.median) == (0.25, 0.5)


def test_measure_nothing() -> None:
    assert timing.measure([], rounds=3, clock=FakeTime().clock()) == []


def test_settle_waits_for_spinning_threads_but_not_forever() -> None:
    fake = FakeTime()
    fake.busy_until = 10e-3
    timing.settle(fake.clock())
    assert 10e-3 <= fake.now < 12e-3
    fake = FakeTime()
    fake.busy_until = 1e9
    timing.settle(fake.clock())
    assert fake.now < 2 * timing.SETTLE_SECONDS


# --- contenders ----------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def peer(request: pytest.FixtureRequest) -> Peer:
    peers, absent = load([request.param])
    if not peers:
        pytest.skip(absent[request.param])
    return peers[0]


@pytest.mark.parametrize("task", ["decode", "prefill"])
@pytest.mark.parametrize("shape", [TINY, ODD, shapes.Shape("one", 2, 1, 128)], ids=str)
def test_contenders_are_right(peer: Peer, shape: shapes.Shape, task: Any) -> None:
    """Each on the keys and values that it holds, by float64, on one thread and two."""
    lengths = ((1, 33), (1, 70)) if task == "decode" else ((40, 40), (40, 70))
    for qo_len, kv_len in lengths:
        data = problem.Problem.random(shape, qo_len, kv_len)
        contenders = peer.attention(task, data)
        assert len({one.name for one in contenders}) == len(contenders)
        for contender in contenders:
            for threads in (1, 2):
                call = contender.bind(threads)
                call()
                call()
                result = contender.result()
                assert result.shape == data.q.shape
                error = problem.relative_error(result, contender.answer())
                assert error <= contender.tolerance, contender.name
            assert contender.kv_bytes > 0


def test_contenders_would_notice_a_lost_key(peer: Peer) -> None:
    """The bound is below what one hidden key in a hundred makes."""
    data = problem.Problem.random(TINY, 1, 100)
    without = data.keys(0, 99)
    for contender in peer.attention("decode", data):
        lost = problem.relative_error(without.answer_f16(), data.answer_f16())
        assert contender.tolerance < lost, contender.name


def test_conversions_are_the_format(peer: Peer) -> None:
    rows = problem.Rows(50, 64)
    for conversion in peer.conversions(rows):
        for threads in (1, 2):
            conversion.bind(threads)()
            want = rows.answer(conversion.kind)
            np.testing.assert_array_equal(conversion.result().reshape(want.shape), want)


def test_own_tiers_hold_what_they_are_named_for() -> None:
    data = problem.Problem.random(TINY, 1, 2000)
    stats = own.two_tiers(data, 1).stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (0, 1999)  # the query's own is pending
    stats = own.two_tiers(data, 1024).stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (1023, 976)
    stats = own.one_tier(data, "f16").stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (1999, 0)


def test_load_names_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peers, absent = load(["mixedkv", "ggml"], ggml_dir=tmp_path)
    assert [one.name for one in peers] == ["mixedkv"]
    assert str(tmp_path) in absent["ggml"]
    assert "--build-ggml" in absent["ggml"]
    monkeypatch.setitem(sys.modules, "torch", None)
    peers, absent = load(["torch"])
    assert not peers
    assert "pip install torch" in absent["torch"]


def test_package_is_lazy() -> None:
    code = (
        "import sys, mixedkv.tools.bench, mixedkv.tools.bench.peers, mixedkv.tools.bench.plan\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'matplotlib', 'rich', 'typer', 'gguf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- a run ---------------------------------------------------------------------------------------


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append(title)

    def at(self, done: float, total: float, what: str = "") -> None:
        assert 0.0 <= done <= total


def small_plan(*tasks: str, **changes: Any) -> plan.Plan:
    fields: dict[str, Any] = {
        "shapes": [TINY],
        "tasks": tasks,
        "decode_kv": [40],
        "prefill_kv": [40],
        "threads": [1, 2],
        "seconds": 0.0,
        "rounds": 1,
        "convert_tokens": [4],
        "prefill_queries": 8,
    }
    return plan.Plan(**(fields | changes))


class Stub:
    """A peer that copies mixedkv's contender and changes it."""

    name = "stub"
    version = "1"

    def __init__(self, change: Callable[[Contender], None]) -> None:
        self.notes = ["a note"]
        self._change = change

    def attention(self, task: Any, data: problem.Problem) -> list[Contender]:
        contender = own.load().attention(task, data)[0]
        contender.peer, contender.name = self.name, "stub"
        self._change(contender)
        return [contender]

    def conversions(self, rows: problem.Rows) -> list[Any]:
        return []


def stub_rows(change: Callable[[Contender], None]) -> tuple[plan.Report, list[plan.Row]]:
    found = plan.run(small_plan("decode"), [own.load(), Stub(change)], {})
    return found, [row for table in found.tables for row in table.rows if row.peer == "stub"]


def test_run_everything_once() -> None:
    progress = Heard()
    wanted = small_plan("decode", "prefill", "convert")
    found = plan.run(wanted, [own.load()], {"torch": "not here"}, progress)
    assert len(found.tables) == sum(map(len, plan.cells(wanted))) == len(progress.phases) == 6
    assert [table.task for table in found.tables] == ["decode"] * 2 + ["prefill"] * 2 + [
        "convert"
    ] * 2
    assert found.wrong == []
    assert found.absent == {"torch": "not here"}
    for table in found.tables:
        assert table.rounds == 1
        for row in table.rows:
            assert row.problem is None
            assert row.median is not None
            assert row.median >= row.best > 0  # type: ignore[operator]
    names = [row.name for row in found.tables[0].rows]
    assert names[:2] == ["mixedkv f16 (hot)", "mixedkv q4_0 (cold)"]
    assert found.tables[0].rows[0].ratio == 1.0


def test_run_compares_both_tiers_with_their_parts() -> None:
    found = plan.run(small_plan("decode", decode_kv=[1100], threads=[1]), [own.load()], {})
    (table,) = found.tables
    assert table.mixed_over_parts is not None
    roles = {row.name: row.role for row in table.rows}
    assert roles["mixedkv 1024 hot + 76 cold"] == "mixed"
    assert [name for name, role in roles.items() if role == "part"] == [
        "its 1024 hot alone",
        "its 76 cold alone",
    ]


def test_run_times_no_wrong_result() -> None:
    def spoil(contender: Contender) -> None:
        result = contender.result
        contender.result = lambda: result() + 1.0

    found, rows = stub_rows(spoil)
    for row in rows:
        assert row.median is None
        assert row.problem is not None
        assert row.problem.startswith("wrong")
    assert found.wrong == []  # a peer's error is not ours
    assert found.notes == ["a note"]


def test_run_survives_a_peer_that_fails() -> None:
    def spoil(contender: Contender) -> None:
        def bind(threads: int) -> Callable[[], object]:
            raise RuntimeError("no such kernel\nand more")

        contender.bind = bind

    _, rows = stub_rows(spoil)
    assert [row.problem for row in rows] == ["RuntimeError: no such kernel"] * 2

    def fail(contender: Contender) -> None:
        raise MemoryError("too large")

    _, rows = stub_rows(fail)
    assert [row.problem for row in rows] == ["MemoryError: too large"] * 2


def test_run_reports_own_errors() -> None:
    def spoil(contender: Contender) -> None:
        contender.peer = "mixedkv"
        contender.tolerance = -1.0

    found = plan.run(small_plan("decode"), [Stub(spoil)], {})
    assert len(found.wrong) == 2
    assert "tiny" in found.wrong[0]


def bf16_twin(contender: Contender) -> None:
    contender.arithmetic = "bf16"


def own_rows(rows: list[plan.Row]) -> dict[str, str | None]:
    """What each row of a table is compared with."""
    return {row.name: row.against for row in rows if row.role == "race"}


@pytest.mark.skipif("bf16" not in mkv.isa.compute_types(), reason="needs arithmetic in bf16")
def test_run_compares_within_an_arithmetic() -> None:
    """bf16 with mixedkv's bf16 where it has that, and with its f32 otherwise."""
    found = plan.run(
        small_plan("decode", "prefill", threads=[1]), [own.load(), Stub(bf16_twin)], {}
    )
    decode, prefill = (own_rows(table.rows) for table in found.tables)
    assert prefill["stub"] == "mixedkv f16, bf16 math"
    assert prefill["mixedkv f16, bf16 math"] == "mixedkv f16, bf16 math"
    assert prefill["mixedkv q4_0, bf16 math"] == "mixedkv q4_0, bf16 math"
    assert prefill["mixedkv f16 (hot)"] == "mixedkv f16 (hot)"
    assert prefill["mixedkv.attention(), q4_0 rows"] == "mixedkv q4_0"
    assert decode["stub"] == "mixedkv f16 (hot)"
    ratios = {row.name: row.ratio for row in found.tables[1].rows}
    assert ratios["mixedkv f16, bf16 math"] == ratios["mixedkv q4_0, bf16 math"] == 1.0


def test_run_compares_with_f32_where_there_is_no_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mkv.isa, "compute_types", lambda: ["f32"])
    peers: list[Peer] = [own.load(), Stub(bf16_twin)]
    found = plan.run(small_plan("prefill", threads=[1]), peers, {})
    assert own_rows(found.tables[0].rows)["stub"] == "mixedkv f16 (hot)"


def test_contenders_of_bf16_say_so(peer: Peer) -> None:
    """Who is named for bf16 is compared as such."""
    data = problem.Problem.random(TINY, 40, 40)
    for contender in peer.attention("prefill", data):
        assert (contender.arithmetic == "bf16") == ("bf16" in contender.name), contender.name


def test_faster_than_own() -> None:
    def row(name: str, ratio: float | None, peer: str = "torch", role: str = "race") -> plan.Row:
        against = None if ratio is None else "ours"
        return plan.Row(
            peer=peer, name=name, kv_type="f16", role=role, ratio=ratio, against=against
        )

    rows = [
        row("ours", 1.0, "mixedkv"),
        row("ours too", 0.5, "mixedkv"),
        row("as fast", 1.0),
        row("faster", 0.9),
        row("much faster", 0.25),
        row("slower", 1.5),
        row("wrong", None),
        row("reading memory", 0.1, "memory", "roof"),
    ]
    assert plan.faster_than_own(rows) == [
        results.Faster("much faster", "ours", 0.25),
        results.Faster("faster", "ours", 0.9),
    ]


def test_report_names_who_was_faster() -> None:
    from rich.console import Console

    row = plan.Row(peer="torch", name="torch f32", kv_type="f32", role="race", ratio=0.8)
    row.against = "ours"
    cell: dict[str, Any] = {"task": "decode", "shape": TINY, "qo_len": 1, "kv_len": 32}
    ahead = plan.Table(threads=1, rows=[row], faster=plan.faster_than_own([row]), **cell)
    slow = plan.Row(peer="torch", name="slow", kv_type="f32", role="race")
    behind = plan.Table(threads=1, rows=[slow], **cell)
    behind.rows[0].ratio, behind.rows[0].against = 2.0, "ours"
    machine = {"mixedkv": "1", "isa": "scalar", "cpu": "a CPU", "threads": 64}
    for tables, says in (
        ([ahead, behind], "faster than mixedkv in 1 of 2 tables: torch f32"),
        ([behind], "faster than mixedkv in 0 of 1 tables: nobody"),
    ):
        console = Console(width=80)
        with console.capture() as capture:
            found = plan.Report(machine=machine, peers={}, absent={}, notes=[], tables=tables)
            report.print_report(found, console)
        assert says in capture.get()
        line = "faster than mixedkv: torch f32 (0.80 of ours)"
        assert (line in capture.get()) == (ahead in tables)


def test_run_with_no_seconds_ends() -> None:
    found = plan.run(small_plan("decode", threads=[1], rounds=None), [own.load()], {})
    assert found.tables[0].rounds == 3


def test_others_load_leaves_this_process_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(load_module, "_STAT", stat)
    monkeypatch.setattr(load_module.os, "sysconf", lambda name: 100)
    now = {"wall": 5.0, "own": 1.0}
    monkeypatch.setattr(load_module.time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(load_module.time, "process_time", lambda: now["own"])
    stat.write_text("cpu  1000 0 500 9999 7 0 0 0 0 0\ncpu0 1 2 3\n")
    others = load_module.OthersLoad()
    # Ten seconds later: 25 CPU seconds in all, of which 15 are ours.
    stat.write_text("cpu  2000 500 900 9999 9 50 50 500 0 0\n")
    now.update(wall=15.0, own=16.0)
    assert others.cpus() == pytest.approx(1.0)
    stat.unlink()
    assert others.cpus() is None


def test_run_skips_what_does_not_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000.0)
    found = plan.run(small_plan("decode"), [own.load()], {})
    assert all("memory" in (table.skipped or "") for table in found.tables)
    assert report.render_table(found.tables[0]) is not None


# --- what is printed -----------------------------------------------------------------------------

TABLE_KEYS = {
    "task": str,
    "shape": dict,
    "qo_len": int,
    "kv_len": int,
    "threads": int,
    "rows": list,
    "rounds": int,
    "mixed_over_parts": (float, type(None)),
    "faster": list,
    "others_load": (float, type(None)),
    "skipped": (str, type(None)),
}
ROW_KEYS = {
    "peer": str,
    "name": str,
    "kv_type": str,
    "role": str,
    "arithmetic": (str, type(None)),
    "error": (float, type(None)),
    "median": (float, type(None)),
    "best": (float, type(None)),
    "ratio": (float, type(None)),
    "against": (str, type(None)),
    "bytes_per_second": (float, type(None)),
    "share_of_read": (float, type(None)),
    "flops": (float, type(None)),
    "calls": (int, type(None)),
    "problem": (str, type(None)),
}


def check_schema(found: dict[str, Any]) -> None:
    assert set(found) == {"machine", "peers", "notes", "absent", "tables"}
    assert {"cpu", "threads", "mixedkv", "isa", "isas", "python", "numpy", "when"} == set(
        found["machine"]
    )
    for table in found["tables"]:
        assert set(table) == set(TABLE_KEYS)
        for key, kind in TABLE_KEYS.items():
            assert isinstance(table[key], kind), key  # type: ignore[arg-type]
        assert set(table["shape"]) == {"name", "num_qo_heads", "num_kv_heads", "head_dim"}
        for row in table["rows"]:
            assert set(row) == set(ROW_KEYS)
            for key, kind in ROW_KEYS.items():
                assert isinstance(row[key], kind), key  # type: ignore[arg-type]
            assert row["role"] in {"race", "mixed", "part", "roof", *problem.KINDS}
            attention = row["role"] in {"race", "mixed", "part"}
            assert (row["arithmetic"] in {"f32", "f16", "bf16", "int8"}) == attention
        for one in table["faster"]:
            assert set(one) == {"name", "against", "ratio"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (1.234e-6, "1.23 us"),
        (45.67e-6, "45.7 us"),
        (456.7e-6, "457 us"),
        (1.5e-3, "1.5 ms"),
        (0.234, "234 ms"),
        (2.5, "2.50 s"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Call `mixedkv bench` with arguments, prefill and conversion cut down to size."""
    monkeypatch.setattr(plan, "PREFILL_QUERIES", 8)
    monkeypatch.setattr(plan, "CONVERT_TOKENS", (4,))
    before = mkv.isa.active()
    app = typer.Typer()
    app.command()(command.bench)
    runner = CliRunner()
    yield lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
    mkv.isa.select(before)


TINY_RUN = ("--model", "4,2,64", "--kv", "40", "--threads", "1", "--rounds", "1", "--peers", "none")


def test_command_prints_tables(bench: Callable[..., Any]) -> None:
    done = bench(*TINY_RUN, "--only", "decode")
    assert done.exit_code == 0, done.output
    assert "mixedkv q4_0 (cold)" in done.stdout
    assert "kv 40, 1 thread" in done.stdout


def test_command_json_is_one_object(bench: Callable[..., Any]) -> None:
    done = bench(*TINY_RUN, "--only", "decode", "--only", "prefill", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    check_schema(found)
    assert [table["task"] for table in found["tables"]] == ["decode", "prefill"]
    assert found["peers"] == {"mixedkv": mkv.__version__}


def test_command_all_peers(bench: Callable[..., Any]) -> None:
    """Whoever is installed runs; whoever is not is named with the way to get it."""
    done = bench(*TINY_RUN[:-2], "--only", "decode", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["peers"]) | set(found["absent"]) == set(NAMES)
    assert all("pip install" in why or "--build-ggml" in why for why in found["absent"].values())


def test_command_selects_the_isa(bench: Callable[..., Any]) -> None:
    done = bench(*TINY_RUN, "--only", "decode", "--json", "--isa", "scalar")
    assert json.loads(done.stdout)["machine"]["isa"] == "scalar"


def test_command_plots(bench: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("figure.svg", "figure.png"):
        done = bench(*TINY_RUN, "--only", "decode,prefill", "--plot", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "gpt"), "gpt"),
        (("--kv", "0"), "--kv"),
        (("--kv", "many"), "many"),
        (("--kv", ","), "--kv"),
        (("--threads", "-1"), "--threads"),
        (("--only", "training"), "training"),
        (("--peers", "cublas"), "cublas"),
        (("--rounds", "0"), "--rounds"),
        (("--isa", "mmx"), "mmx"),
        (("--plot", "figure.txt"), ".png"),
        (("--plot", "/no/such/directory/figure.png"), "directory"),
        (("--plot", "/proc/figure.png"), "--plot"),
        (("--seconds", "inf"), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--seconds", "-1"), "--seconds"),
        (("--kv", "99999999999"), "GiB"),
        (("--kv", "64,99999999999", "--only", "prefill"), "GiB"),
        (("--kv", "9" * 30), "--kv"),
        (("--kv", "64", "--only", "decode", "--shape", "64,64,128000000"), "GiB"),
        (("--ggml-dir", "/no/such/directory"), "directory"),
        (("--no-such-option",), "--no-such-option"),
    ],
    ids=" ".join,
)
def test_command_wrong_use(bench: Callable[..., Any], arguments: Any, says: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr.replace("\n", " ")
    assert done.stdout == ""
    if arguments[0] not in ("--rounds", "--no-such-option"):  # the parser's own
        assert done.stderr.startswith("mixedkv: ")
        assert done.stderr.count("\n") == 1


def test_command_refuses_prefill_of_too_little(bench: Callable[..., Any]) -> None:
    done = bench("--kv", "7", "--only", "prefill")
    assert done.exit_code == 2
    assert "8 tokens and more, got 7" in done.stderr


def test_command_names_who_was_faster(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = results.Faster("torch f32", "mixedkv f16 (hot)", 0.5)
    monkeypatch.setattr(plan, "faster_than_own", lambda rows: [one])
    done = bench(*TINY_RUN, "--only", "decode,convert", "--json")
    for table in json.loads(done.stdout)["tables"]:
        assert table["faster"] == [
            {"name": "torch f32", "against": "mixedkv f16 (hot)", "ratio": 0.5}
        ]
    done = bench(*TINY_RUN, "--only", "decode")
    words = " ".join(done.stdout.split())
    assert "faster than mixedkv: torch f32 (0.50 of mixedkv f16 (hot))" in words


def test_command_fails_where_mixedkv_is_wrong(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "F16_TOLERANCE", -1.0)
    done = bench(*TINY_RUN, "--only", "decode", "--json")
    assert done.exit_code == 1
    assert "WRONG" in done.stderr
    check_schema(json.loads(done.stdout))
    done = bench(*TINY_RUN, "--only", "decode")
    assert done.exit_code == 1
    assert "WRONG" in done.stdout


def test_tables_fit_80_columns() -> None:
    from rich.console import Console

    row = plan.Row(
        peer="torch", name="torch bf16 SDPA, group folded in", kv_type="bf16", role="race"
    )
    row.arithmetic, row.error = "bf16", 1.2e-3
    row.median, row.best, row.ratio, row.against = 0.1234, 0.1234, 123.45, "mixedkv f16 (hot)"
    row.bytes_per_second, row.share_of_read, row.flops = 123.4e9, 1.23, 1234e9
    for task in ("decode", "prefill"):
        table = plan.Table(
            task=task, shape=TINY, qo_len=1, kv_len=32768, threads=64, rows=[row], rounds=10
        )
        console = Console(width=80, record=True, quiet=True)
        with console.capture() as capture:
            console.quiet = False
            console.print(report.render_table(table))
        lines = [line for line in capture.get().splitlines() if "torch" in line]
        assert len(lines) == 1
        assert "…" not in lines[0]
        assert "123.45" in lines[0]
        assert "1.2e-03" in lines[0]


def test_plot_of_every_task(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = plan.run(small_plan("decode", "prefill", "convert"), [own.load()], {})
    plot.save_plot(found, tmp_path / "all.svg")
    assert (tmp_path / "all.svg").read_text().count("<svg") == 1


def test_ggml_build_says_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mixedkv.tools.bench.peers import ggml_build

    monkeypatch.setattr(ggml_build, "SDIST", "llama-cpp-python==0.0.0.dev0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ggml_build.BuildError, match=r"pip download"):
        ggml_build.build(tmp_path / "build", lambda text: None)
