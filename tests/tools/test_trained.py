"""The chain on a trained model: from the model over a trace to the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")

from mixedkv.tools.cli import app
from typer.testing import CliRunner

runner = CliRunner()


def call(*arguments: Any) -> Any:
    return runner.invoke(app, [str(one) for one in arguments], catch_exceptions=False)


@pytest.mark.usefixtures("trained_model")
def test_trained_model_standard_cache_is_exact(tmp_path: Path) -> None:
    """SmolLM2, one layer, nothing quantised: PyTorch's output but for rounding in float32."""
    path = tmp_path / "t.gguf"
    assert call("trace", "-o", path, "--layer", "11", "--prompt-tokens", "100").exit_code == 0
    result = call("verify", "-i", path, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["cache"] == "standard"
    assert len(found["steps"]) == 5
    for step in found["steps"]:
        assert step["tolerance"][0] == 2e-5
        assert step["torch_f32"]["relative"] < 2e-5
        assert step["torch_f64"]["relative"] < 2e-5
        assert all(one["relative"] < 2e-5 for one in step["isas"].values())
    assert found["worst_quantisation_cost"] is None


@pytest.mark.usefixtures("trained_model")
def test_trained_model_loads_in_silence(tmp_path: Path) -> None:
    """Libraries' progress bars would stand among what other programs read."""
    command = ["trace", "-o", str(tmp_path / "t.gguf"), "--layer", "0", "-n", "0", "--json"]
    said = subprocess.run(
        [sys.executable, "-m", "mixedkv", *command, "--prompt-tokens", "4"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(said.stdout)["step_tokens"] == [4]
    assert said.stderr == ""


@pytest.mark.usefixtures("trained_model")
def test_trained_model_chain_on_one_layer(tmp_path: Path) -> None:
    """SmolLM2, one layer."""
    path = tmp_path / "t.gguf"
    options = ["--layer", "11", "--prompt-tokens", "150", "--mixed-kv-cache", "--hot-size", "64"]
    assert call("trace", "-o", path, *options).exit_code == 0
    result = call("verify", "-i", path, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"]
    assert len(found["steps"]) == 5
    assert found["steps"][0]["torch_f32"]["relative"] < 2e-5
    assert found["worst_relative"] < 1e-3
    assert 1e-3 < found["worst_quantisation_cost"] < 0.5
    assert found["rows_followed"] > 600
    assert {step["plain"] for step in found["steps"]} == {None}
