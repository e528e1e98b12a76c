"""``mixedkv compare``: whole, segmented and PyTorch, on the same numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")

import mixedkv as mkv
from mixedkv.cli import app
from mixedkv.trace import compare as comparing
from typer.testing import CliRunner

runner = CliRunner()


def call(*arguments: str) -> Any:
    return runner.invoke(app, ["compare", *arguments], catch_exceptions=False)


def test_compare_passes_and_shows_all() -> None:
    result = call()
    assert result.exit_code == 0
    assert "First 128 elements" in result.stdout
    assert "PASS: 3 of 3 pairs in tolerance" in result.stdout
    for words in ("whole, segmented", "whole, torch", "segmented, torch", "M ", "S "):
        assert words in result.stdout


@pytest.mark.parametrize("k_type", comparing.KV_TYPES)
@pytest.mark.parametrize("v_type", comparing.KV_TYPES)
@pytest.mark.parametrize("segments", [1, 2, 37])
def test_compare_types(k_type: str, v_type: str, segments: int, isa: str) -> None:
    settings = comparing.Settings(
        num_qo_heads=6, qo_len=5, kv_len=111, k_type=k_type, v_type=v_type, segments=segments
    )
    result = comparing.compare(settings)
    assert result.passed, result.pairs


def test_compare_json() -> None:
    found = json.loads(call("--json", "--elements", "7").stdout)
    assert found["passed"]
    assert found["settings"]["seed"] == 42
    assert len(found["elements"]) == 7
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == list(comparing.PAIRS)
    assert found["M"][0] <= found["M"][1]
    assert 1 <= found["S"][0] <= found["S"][1]
    assert json.loads(call("--json", "--elements", "7").stdout) == found


def test_compare_fails_where_a_pair_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in turn is a little off; the verdict is FAIL."""
    own = mkv.attention
    monkeypatch.setattr(mkv, "attention", lambda *args, **options: own(*args, **options) + 1e-4)
    result = call("--elements", "0")
    assert result.exit_code == 1
    assert "FAIL: 1 of 3 pairs in tolerance" in result.stdout
    monkeypatch.undo()

    torch_way = comparing.attend_torch
    monkeypatch.setattr(comparing, "attend_torch", lambda *args: torch_way(*args) * 1.0001)
    assert call().exit_code == 1
    monkeypatch.undo()

    finalize = mkv.AttentionState.finalize
    monkeypatch.setattr(mkv.AttentionState, "finalize", lambda state: finalize(state) * 1.0001)
    assert call().exit_code == 1


def test_compare_tolerances() -> None:
    assert call("--tolerance-abs", "0").exit_code == 1
    assert call("--tolerance-rel", "1e-12").exit_code == 1
    assert call("--tolerance-rel", "1", "--tolerance-abs", "1").exit_code == 0


def test_compare_isa_is_forced_for_the_command_alone() -> None:
    before = mkv.isa.active()
    assert json.loads(call("--isa", "scalar", "--json").stdout)["isa"] == "scalar"
    assert mkv.isa.active() == before
    result = call("--isa", "sse9")
    assert result.exit_code == 2
    assert "sse9" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--heads", "3", "--kv-heads", "2"],
        ["--segments", "600"],
        ["--qo-len", "20", "--kv-len", "10"],
        ["-ctk", "q8"],
        ["-ctk", "q4_0", "--head-dim", "40"],
        ["--kv-len", "999999999"],
        ["--kv-len", "0"],
    ],
    ids=" ".join,
)
def test_compare_wrong_use_exits_with_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
