"""`mixedkv bench`: what a run compares, refuses to time, survives and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixedkv as mkv
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from bench_cases import TINY, Heard, Stub, small_plan, stub_rows
from bench_cases import peer as peer
from mixedkv.tools import memory
from mixedkv.tools.bench import load as load_module
from mixedkv.tools.bench import plan, problem, report, results
from mixedkv.tools.bench.peers import Contender, Peer, own

# --- a run ---------------------------------------------------------------------------------------


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
    wanted = small_plan("decode", decode_kv=[1100], threads=[1], formats=["q4_0", "f16", "q8_0"])
    found = plan.run(wanted, [own.load()], {})
    (table,) = found.tables
    assert set(table.mixed_over_parts) == {"q4_0", "q8_0"}
    roles = {row.name: row.role for row in table.rows}
    assert roles["mixedkv 1024 hot + 76 q4_0"] == roles["mixedkv 1024 hot + 76 q8_0"] == "mixed"
    assert [name for name, role in roles.items() if role == "part"] == [
        "its 1024 hot alone",
        "its 76 q4_0 alone",
        "its 76 q8_0 alone",
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
