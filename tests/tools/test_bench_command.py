"""`mixedkv bench`: what is printed, plotted and refused on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mixedkv as mkv
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from bench_cases import TINY, small_plan
from mixedkv.tools.bench import command, plan, plot, problem, report, results
from mixedkv.tools.bench.peers import NAMES, own
from typer.testing import CliRunner

# --- what is printed -----------------------------------------------------------------------------

TABLE_KEYS = {
    "task": str,
    "shape": dict,
    "qo_len": int,
    "kv_len": int,
    "threads": int,
    "rows": list,
    "rounds": int,
    "mixed_over_parts": dict,
    "faster": list,
    "others_load": (float, type(None)),
    "skipped": (str, type(None)),
}
KINDS = problem.kinds(mkv.formats.available())
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
            assert row["role"] in {"race", "mixed", "part", "roof", *KINDS}
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


@pytest.mark.parametrize("name", [*mkv.formats.available(), "all"])
def test_command_times_the_formats_that_are_named(bench: Callable[..., Any], name: str) -> None:
    done = bench(*TINY_RUN, "--format", name, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    check_schema(found)
    names = mkv.formats.available() if name == "all" else [name]
    decode, prefill, convert = found["tables"]
    for table in (decode, prefill):
        assert {row["kv_type"] for row in table["rows"]} == set(names)
        for row in table["rows"]:
            assert row["problem"] is None
            assert row["median"] > 0
    kinds = {row["role"] for row in convert["rows"]} - {"roof"}
    assert kinds == set(problem.kinds(names))


def test_command_says_which_formats_a_shape_can_not_have(bench: Callable[..., Any]) -> None:
    wide = [one for one in map(mkv.formats.info, mkv.formats.packed()) if one.block_values > 32]
    if not wide:
        pytest.skip("every format's block divides 32")
    done = bench(*TINY_RUN[2:], "--model", "4,2,32", "--only", "decode", "--format", "all")
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    for one in wide:
        assert f"note: {one.name} takes rows of multiples of {one.block_values}" in words
        assert f"mixedkv {one.name}" not in words


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
        (("--format", "q5_0"), "--format: must be one of f32, f16, q4_0"),
        (("--format", ","), "--format"),
        (("--format", "q8_0", "--end-to-end"), "--format"),
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
    monkeypatch.setattr(own, "PLAIN_TOLERANCE", -1.0)
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
