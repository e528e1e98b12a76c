"""The chain on a trained model: from the model over a trace to the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")

from mixedkv.cli import app
from typer.testing import CliRunner

runner = CliRunner()


@pytest.mark.usefixtures("trained_model")
def test_trained_model_chain_on_one_layer(tmp_path: Path) -> None:
    """SmolLM2, one layer."""
    path = tmp_path / "t.gguf"
    options = ["--layer", "11", "--prompt-tokens", "150", "--mixed-kv-cache", "--hot-size", "64"]
    result = runner.invoke(app, ["trace", "-o", str(path), *options], catch_exceptions=False)
    assert result.exit_code == 0
    result = runner.invoke(app, ["verify", "-i", str(path), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"]
    assert len(found["steps"]) == 5
    assert found["steps"][0]["torch_f32"]["relative"] < 2e-5
    assert found["worst_relative"] < 1e-3
    assert 1e-3 < found["worst_quantisation_cost"] < 0.5
    assert found["rows_followed"] > 600
