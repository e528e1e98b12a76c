"""What tests of verifying traces share: recordings, planted mistakes, small traces by hand."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv  # noqa: E402
import reference as ref  # noqa: E402
from mixedkv.tools.trace import (  # noqa: E402
    LayerInfo,
    RecordedStep,
    TraceHeader,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from test_trace import call, record  # noqa: E402

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def mixed() -> recording.Recording:
    return record(mixed=True, steps=4, sink_tokens=1)


@pytest.fixture(scope="module")
def standard() -> recording.Recording:
    return record(steps=4)


@pytest.fixture(scope="module")
def changed() -> recording.Recording:
    """Of a cache that rotates rows and centers keys: rows as what these stand for."""
    return record(mixed=True, steps=4, sink_tokens=1, rotate=True, center_keys=True)


def plant(recorded: recording.Recording, change: Callable[[Tensors], None]) -> recording.Recording:
    """A copy of a trace whose every step is changed."""
    planted = copy.deepcopy(recorded)
    for step in planted.steps:
        change(step.tensors)
    return planted


def values_of(rows: Any) -> np.ndarray:
    """float32, by no code of the extension."""
    if isinstance(rows, mkv.QuantizedArray):
        return ref.PACKED[rows.format][1](np.asarray(rows.data))
    return np.asarray(rows, np.float32)


def whole(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v, mask of a step as float32, cold before hot."""
    k, v = values_of(tensors["k"]), values_of(tensors["v"])
    if "k_quant" in tensors:
        k = np.concatenate([values_of(tensors["k_quant"]), k], 1)
        v = np.concatenate([values_of(tensors["v_quant"]), v], 1)
    return tensors["q"], k, v, tensors["mask"].astype(np.float32)


def compute(
    tensors: Tensors,
    *,
    mask: np.ndarray | None = None,
    tiled: bool = False,
    turn_k: Callable[[np.ndarray], np.ndarray] = lambda k: k,
    turn_v: Callable[[np.ndarray], np.ndarray] = lambda v: v,
) -> np.ndarray:
    """The output as a wrong program would give it."""
    q, k, v, own = whole(tensors)
    ratio = q.shape[0] // k.shape[0]
    k, v = turn_k(k), turn_v(v)
    spread = (lambda x: np.tile(x, (ratio, 1, 1))) if tiled else (lambda x: np.repeat(x, ratio, 0))
    logits = q @ spread(k).swapaxes(1, 2) / np.sqrt(q.shape[2])
    logits = logits + (own if mask is None else mask)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    out = (p / p.sum(-1, keepdims=True)) @ spread(v)
    return np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(q.shape[1], -1).astype(np.float32)


def one_element(tensors: Tensors) -> None:
    out = tensors["kqv_out"].copy()
    out[-1, 37] += 0.02 * np.abs(out).max()
    tensors["kqv_out"] = out


def small_trace(
    path: Path,
    change: Callable[[Tensors], None] = lambda tensors: None,
    *,
    n: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    kv: int = 9,
    mask: np.ndarray | None = None,
    **header: Any,
) -> Path:
    """Random rows and the right output; `change` comes after both."""
    rng = np.random.default_rng(5)
    tensors: Tensors = {
        "q": rng.standard_normal((heads, n, 32), dtype=np.float32),
        "k": rng.standard_normal((kv_heads, kv, 32), dtype=np.float32),
        "v": rng.standard_normal((kv_heads, kv, 32), dtype=np.float32),
        "mask": np.zeros((n, kv), np.float32) if mask is None else mask,
    }
    info = LayerInfo(heads, kv_heads, 32, 32, 32**-0.5, window_left=header.pop("window", None))
    words = TraceHeader("test", "1", "none", "standard", layers={0: info}, **header)
    for turn in (change, lambda tensors: None):
        out = mkv.attention(
            tensors["q"], tensors["k"], tensors["v"], sm_scale=info.sm_scale, mask=tensors["mask"]
        )
        tensors.setdefault(
            "kqv_out",
            np.ascontiguousarray(np.asarray(out).transpose(1, 0, 2)).reshape(n, -1),
        )
        turn(tensors)
    write_trace(path, words, [RecordedStep(0, 1, tensors)])
    return path


def fails(path: Path, message: str, *options: Any) -> dict[str, Any]:
    """Verify says FAIL and why, in words and in JSON, which comes back."""
    result = call("verify", "-i", path, *options)
    assert result.exit_code == 1, result.stdout + result.stderr
    assert "FAIL: " in result.stdout
    assert re.search(message, " ".join(result.stdout.split())), result.stdout
    found = json.loads(call("verify", "-i", path, "--json", *options).stdout)
    assert not found["passed"]
    words = [*found["failures"], *(one for step in found["steps"] for one in step["failures"])]
    assert re.search(message, " ".join(words))
    assert isinstance(found, dict)
    return found
