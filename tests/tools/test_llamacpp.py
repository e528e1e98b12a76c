"""Traces of llama.cpp: its own attention, recorded out of its graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

from mixedkv.tools.cli import app
from mixedkv.tools.trace import RecordedStep, llamacpp, read_trace, write_trace
from typer.testing import CliRunner

runner = CliRunner()


def call(*arguments: Any) -> Any:
    return runner.invoke(app, [str(one) for one in arguments], catch_exceptions=False)


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_llama_cpp_chain_on_two_layers(kind: str, trained_model: Path, tmp_path: Path) -> None:
    """llama.cpp's own attention: the layout is right, f16 and 8-bit rounding is what is off."""
    path, steps = tmp_path / "t.gguf", []
    options = ["--layer", "0,15", "--prompt-tokens", "60", "-ctk", kind, "-ctv", kind, "-t", "2"]
    model = ["--engine", "llama.cpp", "-m", trained_model]
    result = call("trace", *model, "-o", path, *options)
    assert result.exit_code == 0
    assert "50 tensors of 5 steps and 2 layers" in result.stdout
    strict = json.loads(call("verify", "-i", path, "--json").stdout)
    assert not strict["passed"]
    assert ("f16 accumulator" in json.dumps(strict["steps"])) == (kind == "f16")
    rounding = llamacpp.ROUNDING[kind]
    assert strict["worst_relative"] < rounding
    assert call("verify", "-i", path, "--tolerance-rel", rounding).exit_code == 0
    # So much tolerance still tells heads that are exchanged.
    trace = read_trace(path)
    for step in trace.steps:
        tensors = {role: np.array(tensor.load()) for role, tensor in step.tensors.items()}
        heads = tensors["kqv_out"].reshape(step.n, step.info.num_qo_heads, -1)
        tensors["kqv_out"] = heads[:, ::-1].reshape(step.n, -1).copy()
        steps.append(RecordedStep(step.layer, step.step, tensors))
    wrong = tmp_path / "wrong.gguf"
    assert trace.header is not None
    write_trace(wrong, trace.header, steps)
    found = json.loads(call("verify", "-i", wrong, "--json", "--tolerance-rel", rounding).stdout)
    assert [step["passed"] for step in found["steps"]] == [False] * 10


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_says_what_its_attention_reads(trained_model: Path, tmp_path: Path) -> None:
    """A cache of f32 is cast before flash attention: the trace holds f16, and says so."""
    path = tmp_path / "t.gguf"
    options = ["--layer", "0", "--prompt-tokens", "5", "-n", "0", "-ctk", "f32", "-ctv", "f32"]
    model = ["--engine", "llama.cpp", "-m", trained_model]
    result = call("trace", *model, "-o", path, *options)
    assert result.exit_code == 0
    trace = read_trace(path)
    assert trace.header is not None
    for role in "kv":
        said = f"{role.upper()} is f32 in the cache, f16 in attention"
        assert trace.header.notes[f"cast_{role}"] == said.removeprefix(f"{role.upper()} is ")
        assert said in result.stdout
        assert trace.steps[0].tensors[role].type_name == "f16"
    assert "cast" not in call("trace", *model, "-o", path, *options[:6]).stdout


def test_llama_cpp_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    path = tmp_path / "t.gguf"
    result = call("trace", "--engine", "llama.cpp", "-m", model, "-o", path)
    assert result.exit_code == 2
    assert "mixedkv[llama]" in result.stderr
    assert not path.exists()


@pytest.mark.parametrize("model", ["none.gguf", "."], ids=["missing", "folder"])
@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_runs_gguf_files_alone(model: str, tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    result = call("trace", "--engine", "llama.cpp", "-m", tmp_path / model, "-o", path)
    assert result.exit_code == 2
    assert "is not a GGUF file" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_refuses_what_is_no_model(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(200))
    result = call("trace", "--engine", "llama.cpp", "-m", model, "-o", tmp_path / "t.gguf")
    assert result.exit_code == 2
    assert "llama.cpp can't load" in result.stderr
