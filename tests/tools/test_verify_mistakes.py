"""Verifying traces: each known mistake is caught and named, in one head or query too."""

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
from mixedkv.tools.trace import (  # noqa: E402
    RecordedStep,
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.metrics import row_errors  # noqa: E402
from mixedkv.tools.trace.stored import copied  # noqa: E402
from mixedkv.tools.trace.verify import compare_traces, verify  # noqa: E402
from test_trace import call, saved  # noqa: E402
from verify_cases import Tensors, compute, fails, one_element, plant, small_trace  # noqa: E402
from verify_cases import changed as changed  # noqa: E402
from verify_cases import mixed as mixed  # noqa: E402
from verify_cases import standard as standard  # noqa: E402

# --- planted mistakes -----------------------------------------------------------------------------


def output_permuted(tensors: Tensors) -> None:
    out = tensors["kqv_out"].reshape(-1, 4, 32)
    tensors["kqv_out"] = np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(len(out), -1)


def gqa_tiled(tensors: Tensors) -> None:
    tensors["kqv_out"] = compute(tensors, tiled=True)


def k_strides(tensors: Tensors) -> None:
    """K, really [key][head][dim] in memory, viewed as [head][key][dim]."""
    heads, kv, dim = tensors["k"].shape
    tensors["k"] = np.ascontiguousarray(tensors["k"].transpose(1, 0, 2)).reshape(heads, kv, dim)


def k_strides_in_the_op(tensors: Tensors) -> None:
    def turn(k: np.ndarray) -> np.ndarray:
        heads, kv, dim = k.shape
        return np.ascontiguousarray(k).reshape(kv, heads, dim).transpose(1, 0, 2)

    tensors["kqv_out"] = compute(tensors, turn_k=turn)


def mask_ignored(tensors: Tensors) -> None:
    tensors["kqv_out"] = compute(tensors, mask=np.zeros_like(tensors["mask"]))


def hot_k_rotated(tensors: Tensors) -> None:
    tensors["k"] = np.roll(tensors["k"], 3, 1)


def hot_rotated(tensors: Tensors) -> None:
    """A ring buffer's rows, under a mask in order of position."""
    tensors["k"], tensors["v"] = np.roll(tensors["k"], 5, 1), np.roll(tensors["v"], 5, 1)


def hot_v_reversed(tensors: Tensors) -> None:
    tensors["v"] = np.ascontiguousarray(tensors["v"][:, ::-1])


def cold_left_out(tensors: Tensors) -> None:
    cold = tensors["mask"].shape[1] - tensors["k"].shape[1]
    mask = tensors["mask"].astype(np.float32)
    mask[:, :cold] = -np.inf
    tensors["kqv_out"] = compute(tensors, mask=mask)


def nibbles_paired(tensors: Tensors) -> None:
    """Bytes that hold values 2j and 2j + 1."""
    for role in ("k_quant", "v_quant"):
        blocks = tensors[role].data.reshape(-1, 18).copy()
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
        blocks[:, 2:] = values[:, 0::2] | values[:, 1::2] << 4
        rows = blocks.reshape(tensors[role].data.shape)
        tensors[role] = mkv.QuantizedArray(rows, "q4_0")


def scale_left_out(tensors: Tensors) -> None:
    tensors["kqv_out"] = compute({**tensors, "q": tensors["q"] * np.sqrt(np.float32(32))})


def not_a_number(tensors: Tensors) -> None:
    out = tensors["kqv_out"].copy()
    out[0, 5] = np.nan
    tensors["kqv_out"] = out


def keys_shuffled(tensors: Tensors) -> None:
    order = np.random.default_rng(1).permutation(tensors["k"].shape[1])
    tensors["k"], tensors["v"] = tensors["k"][:, order], tensors["v"][:, order]


EVERYWHERE = [
    (output_permuted, r"output is permuted: kqv_out lies as \[head\]\[query\]\[dim\]"),
    (gqa_tiled, "GQA is tiled"),
    (
        k_strides,
        r"wrong strides: (the hot part of )?K fits the output when its memory is read as \[key\]",
    ),
    (mask_ignored, "the mask was ignored"),
    (hot_k_rotated, r"hot part is ordered wrongly: its K stand rotated"),
    (hot_rotated, r"hot part is ordered wrongly: its K and V stand rotated"),
    (hot_v_reversed, "hot part is ordered wrongly: its V stand reversed"),
    (scale_left_out, "scale of the logits is wrong: left out"),
    (one_element, "an element is off by|relative error"),
    (not_a_number, "1 of .* elements are not finite"),
    (keys_shuffled, "queries that see every key are right, others are not"),
]
MIXED_ONLY = [
    (
        k_strides_in_the_op,
        r"wrong strides: K fits the output when its memory is read as \[key\]\[head\]",
    ),
    (cold_left_out, "the cold part was not attended"),
    (nibbles_paired, "nibbles of K and V in the cold part are in the wrong order"),
]


@pytest.mark.parametrize(
    ("cache", "change", "message"),
    [
        *(pytest.param("standard", *one, id=f"standard-{one[0].__name__}") for one in EVERYWHERE),
        *(
            pytest.param("mixed", *one, id=f"mixed-{one[0].__name__}")
            for one in EVERYWHERE + MIXED_ONLY
        ),
        *(
            pytest.param("changed", *one, id=f"changed-{one[0].__name__}")
            for one in EVERYWHERE + MIXED_ONLY
            if one[0] is not nibbles_paired  # its rows are f32
        ),
    ],
)
def test_planted_mistake_is_caught_and_named(
    cache: str,
    change: Callable[[Tensors], None],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    recorded = request.getfixturevalue(cache)
    path = saved(tmp_path / "bad.gguf", plant(recorded, change))
    result = call("verify", "-i", path)
    assert result.exit_code == 1
    assert "FAIL: " in result.stdout
    assert "PASS" not in result.stdout
    assert re.search(message, " ".join(result.stdout.split())), result.stdout
    assert not json.loads(call("verify", "-i", path, "--json").stdout)["passed"]


def test_tiled_heads_of_any_number_are_named(tmp_path: Path) -> None:
    """Three heads a kv head: the order that undoes tiling is not that which makes it."""

    def change(tensors: Tensors) -> None:
        tensors["kqv_out"] = compute(tensors, tiled=True)

    path = small_trace(tmp_path / "t.gguf", change, heads=6, kv_heads=2)
    assert "GQA is tiled" in fails(path, "relative error")["steps"][0]["hints"][0]


def test_moved_rows_that_changed_are_caught(mixed: recording.Recording, tmp_path: Path) -> None:
    """Right arithmetic on wrong rows: the output fits, the rows are not those that were hot."""
    planted = copy.deepcopy(mixed)
    last = [step for step in planted.steps if step.step == 5]
    for step in last:
        rows = copied(step.tensors["k_quant"])
        rows.data[:, 2, 5] ^= 0x11
        step.tensors["k_quant"] = rows
        step.tensors["kqv_out"] = compute(step.tensors)
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert all(step.passed for step in result.steps)
    assert not result.passed
    assert "cold rows of position" in result.failures[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.positions[4].__setitem__(0, 9), "is held more than once"),
        (lambda header: header.positions[4].__setitem__(-1, 99), "is in neither tier"),
    ],
    ids=["twice", "lost"],
)
def test_tokens_out_of_place_are_caught(
    change: Callable[[Any], None], message: str, mixed: recording.Recording, tmp_path: Path
) -> None:
    planted = copy.deepcopy(mixed)
    change(planted.header)
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert not result.passed
    assert message in " ".join(result.failures)


# --- heads and queries ----------------------------------------------------------------------------


def make_v_huge(tensors: Tensors) -> None:
    """Values of kv head 0 are a million times those of kv head 1."""
    tensors["v"][0] *= 1e6
    tensors.pop("kqv_out", None)


def spoil(out: np.ndarray, rows: slice, head: int) -> None:
    out.reshape(len(out), 4, 32)[rows, head] *= -1


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        (slice(None), 3, "head 3 has a relative error of 2, above 0.0001"),
        (slice(None), 2, "head 2 has a relative error of 2, above 0.0001"),
        (slice(4, 5), 3, "head 3 has a relative error of"),
    ],
    ids=["last", "first_of_its_kv_head", "one_query"],
)
def test_small_head_beside_a_huge_one_fails(
    rows: slice, head: int, message: str, tmp_path: Path
) -> None:
    """Over everything, by norms and by the largest element, the mistake is nothing."""
    path = small_trace(tmp_path / "good.gguf", make_v_huge)
    good = json.loads(call("verify", "-i", path, "--json").stdout)
    assert good["passed"]
    assert good["worst_head_relative"] < 1e-6
    trace = read_trace(path)
    tensors = {role: np.array(one.load()) for role, one in trace.steps[0].tensors.items()}
    spoil(tensors["kqv_out"], rows, head)
    assert trace.header is not None
    bad = tmp_path / "bad.gguf"
    write_trace(bad, trace.header, [RecordedStep(0, 1, tensors)])
    found = fails(bad, message)
    step = found["steps"][0]
    assert step["torch_f32"]["relative"] < 2e-5
    assert step["torch_f32"]["max"] < step["tolerance"][1]
    assert step["worst"]["head"] == step["worst"]["row_head"] == head
    assert f"head {head} in step 1 of layer 0" in call("verify", "-i", bad).stdout


def test_one_wrong_query_of_a_head_fails(tmp_path: Path) -> None:
    """A small row among many: neither the whole nor its head shows it."""

    def change(tensors: Tensors) -> None:
        out = tensors["kqv_out"].reshape(-1, 4, 32)
        size = np.linalg.norm(out[100, 1])
        out[100, 1] += 5e-4 * size / np.sqrt(32)

    found = fails(
        small_trace(tmp_path / "t.gguf", change, n=600, kv=3),
        r"query 100 of head 1 has a relative error of 0.000\d+, above 0.0002",
        "--tolerance-abs",
        "1",
    )
    worst = found["steps"][0]["worst"]
    assert (worst["row_query"], worst["row_head"]) == (100, 1)
    assert worst["head_relative"] < 6e-5
    assert found["steps"][0]["torch_f32"]["relative"] < 2e-5


def test_head_whose_values_cancel_passes(tmp_path: Path) -> None:
    """Its output is rounding errors; these are small beside the values that they come from."""

    def change(tensors: Tensors) -> None:
        tensors["k"][:, 1::2] = tensors["k"][:, 0::2]
        tensors["v"][1, 1::2] = -tensors["v"][1, 0::2] * (1 + 1e-6)
        tensors.pop("kqv_out", None)

    path = small_trace(tmp_path / "t.gguf", change, kv=300)
    result = verify(read_trace(path))
    assert result.passed, result.steps[0].failures
    out = read_trace(path).steps[0].load().out
    assert np.linalg.norm(out[:, 2:]) < 1e-4 * np.linalg.norm(out[:, :2])


def test_heads_and_queries_that_are_off_are_listed(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        out = tensors["kqv_out"].reshape(-1, 4, 32)
        out[2:5, 1] = np.random.default_rng(0).standard_normal((3, 32))

    found = fails(small_trace(tmp_path / "t.gguf", change), "worst: head 1 with")
    assert found["steps"][0]["hints"][0] == (
        "no known mistake explains it; head 1 of 0-3 is off; queries 2-4 of 0-5 are off"
    )


def test_row_errors_figures() -> None:
    want = np.zeros((3, 2, 4))
    want[:, 0], want[:, 1] = 100.0, 1.0
    got = want.copy()
    got[1, 1, 0] += 0.5
    found = row_errors(got, want)
    assert (found.head, found.row_query, found.row_head) == (1, 1, 1)
    assert found.row_relative == pytest.approx(0.25)
    assert found.head_relative == pytest.approx(0.5 / np.sqrt(12))
    # A tenth of what the rows would be if nothing cancelled is more than what they are.
    assert row_errors(got, want, 40 * want).row_relative == pytest.approx(0.0625)
    assert row_errors(want, want).head_relative == 0
    blind = np.zeros_like(want)
    assert row_errors(blind, blind).row_relative == 0
    assert row_errors(want, blind).row_relative == np.inf
    odd = want.copy()
    odd[2, 0, 1] = np.nan
    assert row_errors(odd, want).row_relative == np.inf
    assert row_errors(odd, odd).row_relative == 0


def test_reference_trace_is_compared_by_heads(tmp_path: Path) -> None:
    a = small_trace(tmp_path / "a.gguf", make_v_huge)
    trace = read_trace(a)
    assert trace.header is not None
    tensors = {role: np.array(one.load()) for role, one in trace.steps[0].tensors.items()}
    spoil(tensors["kqv_out"], slice(None), 3)
    b = tmp_path / "b.gguf"
    write_trace(b, trace.header, [RecordedStep(0, 1, tensors)])
    assert compare_traces(trace, trace).passed
    result = compare_traces(trace, read_trace(b))
    assert "the outputs of both: head 3 has a relative error of 2" in result.failures[0]
