"""MIXEDKV_REQUIRE: what must not be missing fails a test, and does not skip it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

TESTS = Path(__file__).parents[1]
LLAMA = "tools/test_llamacpp.py::test_llama_cpp_refuses_what_is_no_model"
MODEL = "tools/test_trained.py::test_trained_model_chain_on_one_layer"


def run(test: str, require: str, broken: str, tmp_path: Path) -> tuple[int, str]:
    """Run a test where a module can't be imported."""
    (tmp_path / f"{broken}.py").write_text("raise ModuleNotFoundError('not here')")
    search = [str(tmp_path), *filter(None, sys.path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "MIXEDKV_REQUIRE": require,
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / test)]
    done = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("test", "name", "broken"), [(LLAMA, "llama", "llama_cpp"), (MODEL, "model", "accelerate")]
)
def test_require_makes_a_failure_of_a_skip(
    test: str, name: str, broken: str, tmp_path: Path
) -> None:
    status, said = run(test, "", broken, tmp_path)
    assert (status, "1 skipped" in said) == (0, True), said
    status, said = run(test, name, broken, tmp_path)
    assert status == 1, said
    assert f"MIXEDKV_REQUIRE={name}" in said


def test_require_wants_every_module(tmp_path: Path) -> None:
    """Modules that tests skip themselves for when they are collected."""
    hide = "import sys; sys.modules['rich'] = None"
    (tmp_path / "sitecustomize.py").write_text(hide)
    status, said = run(MODEL, "model", "unused", tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "there is no rich" in said


def test_require_knows_its_words(tmp_path: Path) -> None:
    status, said = run(MODEL, "llama,modle", "unused", tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "modle" in said
