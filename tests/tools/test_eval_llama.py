"""llama.cpp's own caches in an evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("platformdirs")
pytest.importorskip("typer")

from mixedkv.tools.cli import app  # noqa: E402
from mixedkv.tools.eval import configurations, evaluation, llama, session  # noqa: E402
from mixedkv.tools.llama import loaded_model  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

TEXT = "It was a fine day in the village, and nobody had anything to do but to walk about. " * 30


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_stands_in_the_same_table(trained_model: Path, text: Path) -> None:
    settings = session.Settings(
        configurations=configurations.parse_all(["balanced"]),
        model=str(trained_model),
        text=text,
        tokens=64,
        context=160,
        prompt=96,
        llama=("q4_0", "q8_0"),
    )
    found = evaluation.run(settings)
    names = [cache.name for cache in found.caches]
    assert names == ["balanced", "llama.cpp f16", "llama.cpp q4_0", "llama.cpp q8_0"]
    _, f16, q4_0, q8_0 = found.caches
    assert (f16.cold_bits, q4_0.cold_bits, q8_0.cold_bits) == (None, 4.5, 8.5)
    assert (f16.f16_share, q4_0.f16_share) == (1.0, 4.5 / 16)
    # The same model: engines differ in rounding, q4_0 in more than that.
    assert 0 < f16.figures.kl_mean.value < 0.02
    assert 0 < q8_0.figures.kl_mean.value < q4_0.figures.kl_mean.value < 0.5
    ratio = f16.figures.perplexity.value / found.f16.figures.perplexity.value
    assert 0.9 < ratio < 1.1


@pytest.mark.usefixtures("llama_cpp")
def test_chunks_do_not_show(trained_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised cache is read as it is written: by one token or by many, but for rounding."""
    tokens = torch.arange(1000, 1040)
    with loaded_model(trained_model) as model:

        def logits() -> Any:
            parts = list(llama.feed(model, tokens, 8, "q4_0", 2))
            assert parts[-1][0] == 40
            return torch.cat([part for _, part in parts])

        whole = logits()
        assert whole.shape == (32, 49152)
        monkeypatch.setattr(llama, "_BATCH", 1)
        single = logits()
    assert (whole.argmax(-1) == single.argmax(-1)).float().mean() > 0.9
    assert (whole - single).norm() < 0.02 * whole.norm()


@pytest.mark.usefixtures("llama_cpp")
def test_what_llama_cpp_can_not_load(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ValueError, match=r"llama.cpp can't load .*no.gguf"), loaded_model(path):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--llama", "q3_k"], "llama must be one of f16, q4_0, .*, got 'q3_k'"),
        (["--llama", "q4_0", "--model", "a/name"], "GGUF files only, and model is 'a/name'"),
        (["--llama", "q4_0", "--retrieval"], "goes with none of --plot, --simulate and --llama"),
    ],
)
def test_refusals(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["eval", "-c", "balanced", *options])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert re.search(words, done.stderr)


def test_bits() -> None:
    assert [llama.bits_of(kind) for kind in ("f16", "q4_0", "q5_1", "q8_0")] == [16, 4.5, 6, 8.5]
