"""``mixedkv compare``: whole, segmented and PyTorch, on the same numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")

import mixedkv as mkv
import torch
from mixedkv.tools.cli import app
from mixedkv.tools.trace import arithmetic
from mixedkv.tools.trace import compare as comparing
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


TYPES = mkv.formats.available()


@pytest.mark.parametrize(
    "types",
    sorted({pair for one in TYPES for pair in ((one, one), ("f16", one), (one, "q4_0"))}),
    ids="-".join,
)
def test_compare_types(types: tuple[str, str], isa: str) -> None:
    for segments in (1, 2, 37):
        settings = comparing.Settings(
            num_qo_heads=6,
            qo_len=5,
            kv_len=111,
            k_type=types[0],
            v_type=types[1],
            segments=segments,
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


@pytest.mark.parametrize("block", [1, 40, 300, 1 << 24])
@pytest.mark.parametrize("causal", [True, False])
def test_compare_torch_in_blocks(block: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rows and heads are taken in turns: the definition, keys repeated, in float64."""
    monkeypatch.setattr(arithmetic, "MOST_HELD", block)
    settings = comparing.Settings(
        num_qo_heads=6, num_kv_heads=2, qo_len=5, kv_len=19, head_dim=8, causal=causal
    )
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((h, n, 8), np.float32) for h, n in ((6, 5), (2, 19), (2, 19)))
    logits = np.einsum("hnd,hkd->hnk", q, np.repeat(k, 3, 0), dtype=np.float64) * 8**-0.5
    if causal:
        logits[:, np.arange(19)[None] > 14 + np.arange(5)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 3, 0)
    problem = comparing.problem_of(settings, q, k, v)
    got = arithmetic.attend_torch(problem, torch.float32).transpose(1, 0, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)


MEASURE = """
import json, resource, sys
from mixedkv.tools.trace import compare as comparing

comparing.compare(comparing.Settings())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = comparing.Settings(**json.loads(sys.argv[1]))
assert comparing.compare(settings).passed
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * 1024, settings.bytes_needed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts otherwise")
@pytest.mark.parametrize(
    "shapes",
    [
        {"num_qo_heads": 4096, "num_kv_heads": 1, "qo_len": 1, "kv_len": 60000},
        {"num_qo_heads": 4, "num_kv_heads": 4, "kv_len": 100000, "k_type": "f32", "v_type": "q4_0"},
        {"num_qo_heads": 256, "num_kv_heads": 1, "kv_len": 600, "qo_len": 600, "head_dim": 32},
    ],
    ids=["group", "keys", "queries"],
)
def test_compare_takes_the_memory_that_it_says(shapes: dict[str, Any]) -> None:
    """One kv head for thousands of query heads, too: its keys are not repeated."""
    command = [sys.executable, "-c", MEASURE, json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, bound = map(int, done.stdout.split())
    assert grown <= bound <= comparing.MOST_BYTES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "4096", "--kv-heads", "1", "--kv-len", "60000"], "--heads 4096"),
        (["--kv-len", "999999999"], "--kv-len 999999999"),
        (["--kv-len", "9000000"], "--kv-len 9000000"),
        (["--heads", "99999", "--kv-heads", "1", "--kv-len", "32"], "--heads 99999"),
        (["--head-dim", "99999999"], "--head-dim 99999999"),
        (["--heads", "3", "--kv-heads", "2"], "--heads must be a multiple of --kv-heads"),
        (["--segments", "600"], "--segments 600"),
        (["-ctk", "q8"], "-ctk must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compare_names_the_option_that_does_not_fit(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"mixedkv: [^\n]*\n", result.stderr)
    assert words in result.stderr


@pytest.mark.parametrize("option", ["--tolerance-abs", "--tolerance-rel"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1e-9"])
def test_compare_refuses_tolerances_that_mean_nothing(option: str, value: str) -> None:
    result = call(f"{option}={value}")
    assert result.exit_code == 2
    assert option in result.stderr
    assert result.stdout == ""
    with pytest.raises(ValueError, match=option[2:].replace("-", "_")):
        comparing.Settings(**{option[2:].replace("-", "_"): float(value)})


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
