"""The command ``mixedkv eval``: what it prints, draws and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("platformdirs")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

import small  # noqa: E402
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.cli import app  # noqa: E402
from small import one_thread  # noqa: E402, F401
from typer.testing import CliRunner  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A run that takes a second."""
    torch.manual_seed(0)
    found = small.llama()
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: found)
    path = tmp_path / "text.txt"
    path.write_text("the cache holds a key . The value of a token is secret and moves on . " * 40)
    return ["eval", "--model", "small", "--text", str(path), "--context", "192", "--tokens", "300"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})


CONFIGURATIONS = ["-c", "plain: hot_size=32", "-c", "q8: cold_k_type=q8_0 hot_size=32"]


def test_table(arguments: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    result = call(*arguments, *CONFIGURATIONS, "--simulate", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "small on text.txt: 384 tokens scored, in 4 windows of 192" in result.stdout
    assert "…" not in result.stdout
    names = [line.split()[0] for line in lines if line.strip()]
    assert names.index("f16") < names.index("plain") < names.index("q8")
    assert result.stdout.count("simulated") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json(arguments: list[str]) -> None:
    result = call(*arguments, *CONFIGURATIONS, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [cache["name"] for cache in found["caches"]] == ["plain", "q8"]
    assert found["caches"][1]["cold_bits"] == 6.5
    assert found["plot"] is None


def test_retrieval(arguments: list[str]) -> None:
    wanted = [*arguments, *CONFIGURATIONS, "--retrieval", "--facts", "2", "--texts", "2"]
    result = call(*wanted)
    assert result.exit_code == 0, result.output
    assert "facts planted in 2 texts of 192 tokens" in result.stdout
    assert "of 4" in result.stdout
    found = json.loads(call(*wanted, "--json").stdout)
    assert len(found["f16"]["answers"]) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-c", "huge"], "preset must be one of near_lossless, balanced, small, tiny, got 'huge'"),
        (["-c", "a: hot_size=33"], "configuration 'a': hot_size"),
        ([*CONFIGURATIONS, "--context", "2000"], "context must be at most the 1024 positions"),
        ([*CONFIGURATIONS, "--plot", "loss.txt"], "--plot: the file must end in"),
        ([*CONFIGURATIONS, "--retrieval", "--simulate"], "none of --plot, --simulate"),
    ],
)
def test_wrong_use(arguments: list[str], more: list[str], words: str) -> None:
    result = call(*arguments, *more)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
