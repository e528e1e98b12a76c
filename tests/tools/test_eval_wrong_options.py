"""Every option of `mixedkv eval`, given what it can't be: one line that names it and its value,
before a model is fetched. The options come from the command's own signature."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("platformdirs")
pytest.importorskip("typer")

import typer  # noqa: E402
from mixedkv.integrations.transformers.options import TAKEN  # noqa: E402
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.cli import app  # noqa: E402
from mixedkv.tools.eval import configurations, session  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from wrong_values import NO_INT, OF_KIND, check_refused, label  # noqa: E402

NO_NUMBER = ["x", "", "1.5", "nan", "inf", "1e3", "0x10", "True"]
HUGE = [str(2**31), str(2**63), str(10**30)]
SIZE = [*NO_NUMBER, "-1", "0", *HUGE]

# What each option of the command must refuse; what opens files or fetches models has tests of its
# own, and flags take no value.
OF_OPTION: dict[str, list[str]] = {
    "--context": [*SIZE, "1"],
    "--prompt": [*SIZE, "64"],
    "--tokens": SIZE,
    "--facts": [*SIZE, "17"],
    "--texts": SIZE,
    "--threads": [*SIZE, "1025"],
    "--seed": [*NO_NUMBER, "-1", str(2**63), str(10**30)],
    "--llama": ["", "f32", "Q4_0", "q3_k", "nan", "1"],
    "--text": ["", "/nowhere/text.txt", "/"],
    "--plot": ["", "x", "x.txt", "/", "/nowhere/x.png"],
    "--config": ["", "huge", "small tiny", "a:", "a: nosuch=1", "x=", "hot_size", "sinks=3"],
}
UNTRIED = {"--model", "--cache-dir", "--simulate", "--retrieval", "--json"}


def options() -> set[str]:
    command = typer.main.get_command(app).commands["eval"]  # type: ignore[attr-defined]
    return {option.opts[-1] for option in command.params}


def test_every_option_is_tried() -> None:
    assert options() == set(OF_OPTION) | UNTRIED


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(models, "fetch", fail)
    monkeypatch.setattr(models, "load", fail)


def refusal(*arguments: str) -> str:
    """What a command says that ends with status 2, on one line without frames."""
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param(option, value, id=f"{option} {value!r}")
        for option, values in OF_OPTION.items()
        for value in values
    ],
)
def test_option(option: str, value: str) -> None:
    said = refusal("--context", "64", option, value)
    name = {"--config": "config|preset|option|hot_size"}.get(option, option.strip("-"))
    assert re.search(rf"(?<![a-z])({name})(?![a-z])", said), said
    if "Invalid value for" in said:
        return  # typer's words: they name the option, and not all of them the value
    shown = [repr(value), f"got {value}", f"{option}: {Path(value).parent} "]
    shown += [f"got {' and '.join(value.split())}", repr(value.split("=")[0].split()[-1:])[1:-1]]
    assert any(text in said for text in shown), said


WORDS: dict[type, list[str]] = {
    bool: ["", "2", "maybe", "None", "nan"],
    int: [*NO_NUMBER, "-1", str(2**70), str(-(2**70))],
    float: ["x", "", "nan", "inf", "-inf", "-1", "2", "1e+300", "True"],
    str: ["", "q5_0", "Q4_0", "F16", "4", "nan", "None"],
}


@pytest.mark.parametrize("preset", ["", "small "])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param(name, value, id=f"{name}={value}")
        for name in TAKEN
        for value in WORDS[type(configurations._DEFAULTS[name])]
    ],
)
def test_option_of_a_configuration(preset: str, option: str, value: str) -> None:
    def read() -> None:
        parsed = configurations.parse_all([f"a: {preset}{option}={value}"])
        session.check_settings(session.Settings(configurations=parsed))

    check_refused(read, option, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}: {label(value)}")
        for name in ("context", "tokens", "prompt", "facts", "texts", "seed")
        for value in [*NO_INT, -1, 2**63, 2**70, -(2**70)]
    ],
)
def test_setting(name: str, value: Any) -> None:
    right = session.Settings(configurations=configurations.parse_all(["small"]))
    session.check_settings(right)
    check_refused(
        lambda: session.check_settings(dataclasses.replace(right, **{name: value})), name, value
    )


@pytest.mark.parametrize("value", OF_KIND["preset"], ids=label)
def test_preset_of_a_configuration(value: Any) -> None:
    configuration = configurations.Configuration("a", {}, value)
    settings = session.Settings(configurations=[configuration])
    check_refused(lambda: session.check_settings(settings), "preset", value)


def test_the_text_is_read_after_sizes_are_known_to_fit(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    assert f"there is no text in {path}" in refusal("--text", str(path), "--context", "64")
    assert "prompt must be from 1 to 63, got 64" in refusal("--context", "64", "--prompt", "64")


def test_signature_has_what_settings_have() -> None:
    """A setting that no option brings would have no test here."""
    command = inspect.signature(typer.main.get_command(app).commands["eval"].callback)  # type: ignore[attr-defined]
    fields = {field.name for field in dataclasses.fields(session.Settings)}
    own = {"config": "configurations"}
    taken = {own.get(name, name) for name in command.parameters}
    assert fields <= taken
