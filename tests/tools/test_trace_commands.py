"""The commands trace and verify: files that can't be written, names, numbers, verdicts, words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv
from mixedkv.tools import trace as traces
from mixedkv.tools.cli import app
from mixedkv.tools.trace import LayerInfo, RecordedStep, TraceHeader, write_trace
from typer.testing import CliRunner

runner = CliRunner()
DOCS = Path(__file__).parents[2] / "docs" / "trace-format.md"


def call(*arguments: Any) -> Any:
    return runner.invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def one_line(result: Any) -> str:
    """What a command says that ends with status 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mixedkv: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def make_trace(path: Path, *, model: str = "none", error: float = 0.0, mixed: bool = False) -> Path:
    """A small trace, whose output may be off by `error` in one element."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    info = LayerInfo(4, 2, 32, 64, 0.2)
    cold = 7 if mixed else 0
    tensors: dict[str, Any] = {
        "q": normal(4, 3, 32),
        "k": normal(2, 5, 32).astype(np.float16),
        "v": normal(2, 5, 64).astype(np.float16),
        "mask": np.where(rng.random((3, cold + 5)) < 0.3, -np.inf, 0).astype(np.float32),
    }
    state = mkv.AttentionState(num_qo_heads=4, qo_len=3, head_dim=64)
    mask = tensors["mask"]
    if mixed:
        tensors["k_quant"] = mkv.quantize_q4_0(normal(2, cold, 32))
        tensors["v_quant"] = mkv.quantize_q4_0(normal(2, cold, 64))
        state.update(
            tensors["q"],
            tensors["k_quant"],
            tensors["v_quant"],
            sm_scale=0.2,
            mask=np.ascontiguousarray(mask[:, :cold]),
        )
    hot_mask = np.ascontiguousarray(mask[:, cold:])
    state.update(tensors["q"], tensors["k"], tensors["v"], sm_scale=0.2, mask=hot_mask)
    out = np.asarray(state.finalize()).transpose(1, 0, 2).reshape(3, 256).copy()
    out[0, 0] += error
    tensors["kqv_out"] = out
    header = TraceHeader("test", "1", model, "mixed" if mixed else "standard", layers={0: info})
    write_trace(path, header, [RecordedStep(0, 1, tensors)])
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return make_trace(tmp_path / "good.gguf")


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def drawn(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("_matplotlib")
def test_plot_title_is_the_verdict_of_the_command(good: Path, tmp_path: Path) -> None:
    """A trace that passes by itself, and does not beside its reference."""
    picture = tmp_path / "p.svg"
    assert call("verify", "-i", good, "--plot", picture).exit_code == 0
    assert ": PASS" in drawn(picture)
    other = make_trace(tmp_path / "other.gguf", error=0.5)
    options = ["--reference", other, "--plot", picture]
    assert call("verify", "-i", good, *options).exit_code == 1
    assert ": FAIL" in drawn(picture)
    assert ": PASS" not in drawn(picture)


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("name", ["$x_1$", "a $ b", r"$\nonsense{$", "[red]x[/nothing]", "x" * 200])
def test_plot_draws_names_as_they_are(name: str, tmp_path: Path) -> None:
    path = make_trace(tmp_path / "t.gguf", model=name)
    picture = tmp_path / f"{name.replace('/', ' ')[:40]}.svg"
    result = call("verify", "-i", path, "--plot", picture)
    assert result.exit_code == 0
    assert picture.name in result.stdout
    assert name[:40] in drawn(picture)


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/proc/x.png", "/proc/x.png can't be written"),
        ("no/folder/x.png", "is not a directory"),
        ("x.doc", "must end in .png, .svg, .pdf"),
        ("x", "must end in .png, .svg, .pdf"),
        ("", "must end in .png, .svg, .pdf"),
        (f"{'x' * 300}.png", "can't be written"),
    ],
    ids=["proc", "folder", "doc", "bare", "empty", "long"],
)
def test_plot_that_can_not_be_drawn_is_told_first(
    path: str, words: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = one_line(call("verify", "-i", good, "--plot", path))
    assert "--plot" in said
    assert words in said
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.usefixtures("_matplotlib")
def test_plot_that_fails_in_the_end_is_told(good: Path, tmp_path: Path) -> None:
    """The system has its own reasons, after all checks."""
    picture = tmp_path / "full.png"
    picture.symlink_to("/dev/full")
    result = call("verify", "-i", good, "--plot", picture)
    assert result.exit_code == 2
    assert f"mixedkv: {picture}: No space left on device\n" in result.stderr


# --- files of trace -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/proc/t.gguf", "no/folder/t.gguf", "."])
def test_trace_tells_first_what_can_not_be_written(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("trace", "-o", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_trace_blames_the_path_that_failed(tmp_path: Path) -> None:
    """The folder of models, not the file of the trace."""
    said = one_line(call("trace", "-o", tmp_path / "t.gguf", "--cache-dir", "/proc/none"))
    assert said.startswith("mixedkv: /proc/none: ")
    assert "t.gguf" not in said


def test_trace_names_its_file_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedkv.tools import models
    from mixedkv.tools.trace import record

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path.with_name(".scratch")))

    empty = record.Recording(TraceHeader("test", "1", "none", "standard"))
    loaded = models.LoadedModel("tiny", None, lambda text: {"input_ids": [1]})
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(record, "record", lambda *_, **__: empty)
    monkeypatch.setattr(traces, "write_trace", full)
    path = tmp_path / "t.gguf"
    assert one_line(call("trace", "-o", path)) == f"mixedkv: {path}: No space left on device\n"


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (option, value)
        for option in ("--tolerance-abs", "--tolerance-rel", "--sm-scale")
        for value in ("nan", "inf", "-inf", "-1")
        if (option, value) != ("--sm-scale", "-1")
    ],
)
def test_verify_refuses_numbers_that_mean_nothing(option: str, value: str, good: Path) -> None:
    result = call("verify", "-i", good, f"{option}={value}")
    assert result.exit_code == 2
    assert option in result.stderr
    assert result.stdout == ""


def test_verify_json_is_json_where_figures_are_not_finite(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = make_trace(tmp_path / "t.gguf", error=float("nan"))
    result = call("verify", "-i", path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout, parse_constant=refuse)
    assert found["passed"] is False


# --- the documented way ---------------------------------------------------------------------------


def test_documented_check_of_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/trace-format.md, on a trace of both tiers, right and wrong."""
    section = DOCS.read_text(encoding="utf-8").partition("## How to verify a kernel")[2]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None
    make_trace(tmp_path / "t.gguf", mixed=True)
    monkeypatch.chdir(tmp_path)

    def kernel(q: Any, k: Any, v: Any, mask: Any, scale: float) -> np.ndarray:
        """In numpy, by the definition: [n, Hq, Dv]."""
        assert k.dtype == v.dtype == np.float32
        k, v = (np.repeat(x, len(q) // len(x), 0).astype(np.float64) for x in (k, v))
        logits = q @ k.transpose(0, 2, 1) * scale + mask
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)

    def tiled(q: Any, k: Any, v: Any, mask: Any, scale: float) -> np.ndarray:
        """Which mixes up the heads."""
        order = np.arange(len(q)).reshape(len(k), -1).T.ravel()
        return kernel(q[order], k, v, mask, scale)

    for attention, status in ((kernel, 0), (tiled, 1)):
        exec(match[1], {"my_attention": attention})
        assert call("verify", "-i", "mine.gguf").exit_code == status
        assert call("verify", "-i", "mine.gguf", "--reference", "t.gguf").exit_code == status
