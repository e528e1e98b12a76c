"""Verifying traces: what a verdict does not cover is said."""

from __future__ import annotations

import copy
import json
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

from mixedkv.tools.trace import (  # noqa: E402
    read_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.metrics import difference  # noqa: E402
from mixedkv.tools.trace.verify import verify  # noqa: E402
from test_trace import call, saved  # noqa: E402
from verify_cases import fails, small_trace  # noqa: E402
from verify_cases import mixed as mixed  # noqa: E402
from verify_cases import standard as standard  # noqa: E402

# --- what a verdict does not cover ----------------------------------------------------------------


def remarks(path: Path) -> list[str]:
    """What verify remarks, the same in JSON and in words."""
    found = json.loads(call("verify", "-i", path, "--json").stdout)
    said = " ".join(call("verify", "-i", path).stdout.split())
    for remark in found["remarks"]:
        assert f"note: {remark}" in said
    assert ("what the verdict does not cover" in said) == bool(found["remarks"])
    assert said.count("note: ") == len(found["remarks"])
    return list(found["remarks"])


def test_trace_that_shows_everything_has_no_remark(
    standard: recording.Recording, mixed: recording.Recording, tmp_path: Path
) -> None:
    for recorded in (standard, mixed):
        assert remarks(saved(tmp_path / "t.gguf", recorded)) == []


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n": 1}, ["no step has several queries: mistakes in the layout of Q", "no positions"]),
        ({"kv_heads": 1}, ["one kv head: mistakes in the layout of K and V", "no positions"]),
        ({"kv_heads": 4}, ["each query head has a kv head of its own", "no positions"]),
        (
            {"positions": {1: np.arange(9)}},
            ["how many tokens each step took is not recorded: not checked is whether tokens"],
        ),
        (
            {"positions": {1: np.arange(6)}, "step_tokens": [6], "kv": 6},
            ["the layers' windows are not recorded"],
        ),
        ({"mask": np.full((6, 9), 0.0, np.float32)}, ["no positions are recorded: not checked is"]),
    ],
    ids=["decode", "one_kv_head", "no_sharing", "no_step_tokens", "no_window", "no_positions"],
)
def test_what_a_trace_can_not_show_is_remarked(
    sizes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    if "step_tokens" in sizes:
        later = np.arange(6)[None, :] > np.arange(6)[:, None]
        sizes = {**sizes, "mask": np.where(later, -np.inf, 0).astype(np.float32)}
    found = remarks(small_trace(tmp_path / "t.gguf", **sizes))
    assert len(found) == len(words)
    for remark, word in zip(found, words, strict=True):
        assert remark.startswith(word)


def test_cold_rows_that_no_step_has_while_hot_are_remarked(
    mixed: recording.Recording, tmp_path: Path
) -> None:
    part = copy.deepcopy(mixed)
    part.steps = [step for step in part.steps if step.step == 5]
    found = remarks(saved(tmp_path / "t.gguf", part))
    assert "cold rows are in no step while hot" in found[1]
    assert found[0].startswith("no step has several queries")


def test_queries_that_see_no_key_are_told(tmp_path: Path) -> None:
    """An output of zeros agrees with anything's: that is not what "same bits" means."""
    mask = np.zeros((6, 9), np.float32)
    mask[:2] = -np.inf
    some = small_trace(tmp_path / "some.gguf", mask=mask)
    assert "2 queries of 1 step see no key: nothing but zero was compared" in remarks(some)
    found = fails(
        small_trace(tmp_path / "all.gguf", mask=np.full((6, 9), -np.inf, np.float32)),
        "no query of any step sees a key: there is nothing to verify",
    )
    assert found["steps"][0]["blind"] == 6
    said = call("verify", "-i", tmp_path / "all.gguf").stdout
    assert "same bits" not in said
    assert "all zero" in said
    assert difference(np.zeros(3), np.zeros(3)).grade == "all zero"
    assert difference(np.ones(3), np.ones(3)).grade == "same bits"
    assert difference(np.ones(3), np.zeros(3)).grade == "wrong"


@pytest.mark.parametrize("claimed", [2, 2**31 - 1])
def test_tokens_that_a_step_never_had_are_lost(
    claimed: int, standard: recording.Recording, tmp_path: Path
) -> None:
    """However many are claimed, none is looked for one by one."""
    import tracemalloc

    planted = copy.deepcopy(standard)
    planted.header.tokens = []
    planted.header.step_tokens[1] = claimed
    planted.steps = [step for step in planted.steps if step.step == 5 and step.layer == 0]
    trace = read_trace(saved(tmp_path / "t.gguf", planted))
    tracemalloc.start()
    failures = verify(trace, isas=()).failures
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "step 5: position 25 is in neither tier" in failures
    assert peak < 20_000_000
