"""The command line: what it prints, and its exit status."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import mixedkv as mkv
from mixedkv.tools.cli import app
from typer.testing import CliRunner

runner = CliRunner()


def call(*arguments: str) -> Any:
    return runner.invoke(app, list(arguments), catch_exceptions=False)


def test_info() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert mkv.__version__ in result.stdout
    assert mkv.isa.active() in result.stdout


def test_info_json() -> None:
    result = call("info", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["isa"] == mkv.isa.active()
    assert found["isa_available"] == list(mkv.isa.available())
    assert found["threads"] == mkv.get_num_threads()


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"mixedkv {mkv.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["info", "--nonsense"],
        ["demo", "--hot-size", "0"],
        ["demo", "--max-new-tokens", "1"],
        ["demo", "--prompt-file", "/no/such/file"],
        ["demo", "--seed", "x"],
        ["demo", "--seed", str(2**63)],
        ["demo", "--seed", "-1"],
        ["demo", "--sinks", "4"],
        ["trace", "-o", "t.gguf", "--sinks", "4"],
        ["compare", "--seed", str(2**63)],
        ["trace", "-o", "t.gguf", "--seed", str(2**63)],
    ],
)
def test_wrong_use(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "mixedkv", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["version"] == mkv.__version__


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("typer", ["info"], "mixedkv[cli]"),
        ("rich", ["info"], "mixedkv[cli]"),
        ("transformers", ["demo"], "mixedkv[demo]"),
        ("torch", ["demo"], "mixedkv[demo]"),
        ("matplotlib", ["demo"], "mixedkv[demo]"),
        ("platformdirs", ["demo"], "mixedkv[demo]"),
    ],
)
def test_missing_extra(missing: str, arguments: list[str], extra: str) -> None:
    """One line that says what to install, status 2."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments!r}; "
        "from mixedkv.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"needs {missing}" in done.stderr
    assert f"pip install '{extra}'" in done.stderr


# --- demo, with what it computes replaced ----------------------------------------------------


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `mixedkv demo` finds; change it in place to taste."""
    pytest.importorskip("transformers", minversion="5.20")
    pytest.importorskip("matplotlib")
    pytest.importorskip("platformdirs")
    import mixedkv.integrations.transformers as mkt
    from mixedkv.tools import demo, evaluate

    stats = mkv.CacheStats(
        hot_tokens=20,
        cold_tokens=80,
        hot_size=32,
        cold_size=96,
        tokens_seen=100,
        moved=80,
        events=9,
        move_seconds=0.25,
        hot_bytes=3200,
        cold_bytes=2700,
        journal_bytes=3200,
        books_bytes=100,
        scratch_bytes=0,
        bytes_saved=5750,
    )
    history = [mkt.Occupancy(81, 20, 61, 61), mkt.Occupancy(100, 20, 80, 80)]
    run = demo.Run("some text", 500.0, 20.0, stats, history)
    found = demo.Result(
        title="tiny",
        settings=demo.Settings(hot_size=32),
        prompt_tokens=81,
        new_tokens=20,
        f16_token_bytes=100,
        f16=run,
        mixed=run,
        fidelity=evaluate.Fidelity(20, 0.01, 0.1, 0.95),
        seconds=3.0,
    )
    holder = {"result": found, "settings": None}

    def pretend(settings: Any, progress: Any) -> Any:
        holder["settings"] = settings
        progress.phase("fetching", None)
        progress.at(5_000_000, 90_000_000)
        progress.phase("running", 2)
        progress.at(1, 2)
        return holder["result"]

    monkeypatch.setattr(demo, "run", pretend)
    return holder


def test_demo(result: Any, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    options = ("--hot-size", "32", "--seed", "7", "--sample", "--sink-tokens", "3")
    done = call("demo", "--plot", str(plot), *options)
    assert done.exit_code == 0
    settings = result["settings"]
    assert (settings.seed, settings.sample, settings.sink_tokens) == (7, True, 3)
    assert plot.stat().st_size > 10_000
    for words in ("some text", "20 + 80", "500.0", "92.0%", "0.0100", "95.0%", "PASS", "journal"):
        assert words in done.stdout, words
    assert "FAIL" not in done.stdout


def test_demo_json(result: Any, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = call("demo", "--json", "--plot", str(plot))
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["mixed"]["memory_share"] == pytest.approx(0.92)
    assert found["fidelity"]["kl_mean"] == 0.01
    assert found["plot"] == str(plot)


def test_demo_fails(result: Any, tmp_path: Path) -> None:
    result["result"] = dataclasses.replace(result["result"], prompt_tokens=90)
    done = call("demo", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1
    assert "FAIL  every token is held: 100 of 109" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("this is wrong"), "this is wrong"),
        (OverflowError("this is wrong"), "this is wrong"),
        (RuntimeError("this\n  is \x1b[31mwrong"), "this is [31mwrong"),
        (NotImplementedError(), "NotImplementedError"),
        (mkv.CacheFull("there is no room"), "there is no room"),
        (MemoryError(), "there is not enough memory"),
        (OSError(13, "Permission denied", "/some/where"), "/some/where: Permission denied"),
        (OSError(18, "Cross-device link", "/a", None, "/b"), "/a -> /b: Cross-device link"),
        (OSError("no errno"), "no errno"),
        (ValueError("x" * 5000), "x" * 396 + " ..."),
        (UnicodeError("\udcff"), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_demo_ends_with_one_line(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    from mixedkv.tools import demo

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    done = call("demo", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].rstrip() == f"mixedkv: {words}".rstrip()
    assert done.stdout == ""


def test_demo_does_not_hide_its_own_faults(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedkv.tools import demo

    monkeypatch.setattr(demo, "run", lambda *_: None.nothing)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        call("demo", "--plot", str(tmp_path / "plot.png"))


def test_demo_traceback_is_in_the_log(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mixedkv.tools import demo

    def fail(*_: Any) -> None:
        raise ValueError("this is wrong")

    monkeypatch.setattr(demo, "run", fail)
    with caplog.at_level("DEBUG", logger="mixedkv"):
        assert call("demo", "--plot", str(tmp_path / "plot.png")).exit_code == 2
    assert "Traceback" in caplog.text


def test_demo_json_has_no_word_for_nan(result: Any, tmp_path: Path) -> None:
    from mixedkv.tools import evaluate

    fidelity = evaluate.Fidelity(20, float("nan"), float("inf"), 0.95)
    result["result"] = dataclasses.replace(result["result"], fidelity=fidelity)
    done = call("demo", "--json", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(done.stdout, parse_constant=refuse)["fidelity"]["kl_mean"] == "nan"


@pytest.mark.parametrize("name", ["$x_$.png", "a[b]c[red].svg", "plot.PDF"])
def test_demo_names_are_drawn_and_printed_as_they_are(
    result: Any, tmp_path: Path, name: str
) -> None:
    result["result"] = dataclasses.replace(result["result"], title="$\\odd{$ [x] [/y]")
    done = call("demo", "--plot", str(tmp_path / name))
    assert done.exit_code == 0
    assert "$\\odd{$ [x] [/y], 3 seconds" in done.stdout
    assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/plot.png", "no is not a directory"),
        ("plot.jpg", "must end in .png, .svg, .pdf"),
        ("/proc/plot.png", "/proc/plot.png can't be written"),
    ],
)
def test_demo_plot_that_can_not_be_written(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    """Told before anything runs."""
    monkeypatch.chdir(tmp_path)
    done = call("demo", "--plot", path)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert result["settings"] is None


# --- all commands ----------------------------------------------------------------------------


def commands() -> list[str]:
    found = [one.name or one.callback.__name__ for one in app.registered_commands if one.callback]
    assert {"info", "demo", "bench", "trace", "verify", "compare"} <= set(found)
    return found


@pytest.mark.parametrize("name", commands())
def test_command_has_help_and_json(name: str) -> None:
    done = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize("name", commands())
def test_command_refuses_an_option_that_it_does_not_know(name: str) -> None:
    done = call(name, "--nonsense")
    assert done.exit_code == 2
    assert done.stdout == ""


def test_commands_load_nothing_before_they_run() -> None:
    heavy = {"torch", "transformers", "matplotlib", "gguf", "platformdirs", "onnxruntime"}
    code = f"import sys, mixedkv.tools.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the environment -------------------------------------------------------------------------

WRONG = [
    ("MIXEDKV_ISA", "mmx"),
    ("MIXEDKV_NUM_THREADS", "abc"),
    ("MIXEDKV_NUM_THREADS", "0"),
    ("MIXEDKV_NUM_THREADS", "-3"),
    ("MIXEDKV_NUM_THREADS", "2048"),
]


def call_with(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The core settles what the environment says at its first use: a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mixedkv", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


NEEDED = {"trace": ["-o", "t.gguf"], "verify": ["-i", "t.gguf"]}


@pytest.mark.parametrize("name", commands())
@pytest.mark.parametrize(("variable", "value"), [WRONG[0], WRONG[2]], ids="=".join)
def test_command_names_the_variable_that_is_wrong(
    name: str, variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is fetched, read or written."""
    monkeypatch.chdir(tmp_path)
    done = call_with({variable: value}, name, *NEEDED.get(name, []))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mixedkv: ")
    assert variable in done.stderr
    assert repr(value) in done.stderr
    if name != "info":
        assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("variable", "value"), WRONG, ids="=".join)
def test_info_tells_what_is_wrong_and_all_else(variable: str, value: str) -> None:
    done = call_with({variable: value}, "info", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    (problem,) = found["problems"]
    assert done.stderr == f"mixedkv: {problem}\n"
    assert variable in problem
    assert repr(value) in problem
    assert (found["isa"] is None) == (variable == "MIXEDKV_ISA")
    assert (found["threads"] is None) == (variable == "MIXEDKV_NUM_THREADS")
    assert found["isa_available"] == list(mkv.isa.available())


def test_info_tells_of_two_wrong_variables_in_one_line() -> None:
    done = call_with(dict([WRONG[0], WRONG[1]]), "info")
    assert done.returncode == 2
    assert "none (of " in done.stdout
    assert mkv.__version__ in done.stdout
    assert done.stderr.count("\n") == 1
    assert "'mmx'" in done.stderr
    assert "'abc'" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["bench", "--help"]], ids=" ".join
)
def test_help_comes_whatever_the_environment(arguments: list[str]) -> None:
    assert call_with(dict(WRONG[:2]), *arguments).returncode == 0


@pytest.mark.parametrize("value", ["", "1"])
def test_info_takes_what_may_be(value: str) -> None:
    done = call_with({"MIXEDKV_ISA": "", "MIXEDKV_NUM_THREADS": value}, "info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["problems"] == []
