"""Verifying traces: right ones pass, each known mistake is caught and named."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
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
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.arithmetic import attend_torch, problem_of  # noqa: E402
from mixedkv.tools.trace.metrics import difference, row_errors  # noqa: E402
from mixedkv.tools.trace.verify import Tolerance, compare_traces, verify  # noqa: E402
from test_trace import PROMPT, call, record, saved  # noqa: E402

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def mixed() -> recording.Recording:
    return record(mixed=True, steps=4, sinks=1)


@pytest.fixture(scope="module")
def standard() -> recording.Recording:
    return record(steps=4)


# --- right traces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", ["standard", "mixed", "second_mask"])
def test_right_trace_passes(model: str, cache: str, tmp_path: Path) -> None:
    """Plain attention, windows with a soft cap, windows with learned sinks."""
    options = {"mixed": cache != "standard", "second_mask": cache == "second_mask"}
    result = verify(read_trace(saved(tmp_path / "t.gguf", record(model, **options))))
    assert result.passed, [step.failures for step in result.steps] + result.failures
    assert len(result.steps) == 5 * 3
    for step in result.steps:
        assert set(step.isas) == set(mkv.isa.available())
        assert step.torch_f32.relative < (1e-3 if step.quantised else 2e-5)
        assert (step.cost is not None) == step.quantised
        if step.cost is not None:
            assert 1e-3 < step.cost.relative < 1
    assert any(step.quantised for step in result.steps) == (cache != "standard")
    assert not any(step.quantised for step in result.steps if step.step == 1)


@pytest.mark.parametrize("types", [("f32", "f32"), ("q4_0", "f16"), ("q4_0", "q4_0")])
def test_right_trace_of_other_types_passes(types: tuple[str, str], tmp_path: Path) -> None:
    for mixed in (False, True):
        recorded = record(k_type=types[0], v_type=types[1], mixed=mixed)
        result = verify(read_trace(saved(tmp_path / "t.gguf", recorded)))
        assert result.passed, [step.failures for step in result.steps] + result.failures


def test_torch_agrees_with_the_reference(mixed: recording.Recording, tmp_path: Path) -> None:
    """The judge itself, against float64 numpy."""
    for step in read_trace(saved(tmp_path / "t.gguf", mixed)).steps[:6]:
        problem = problem_of(step.load(), step.info)
        want = ref.attention(
            problem.q, problem.k, problem.v, sm_scale=step.info.sm_scale, mask=problem.mask
        )
        want = np.asarray(want[0] if isinstance(want, tuple) else want)
        got = attend_torch(problem, torch.float64).transpose(1, 0, 2)
        np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-12)


def test_cost_is_that_of_unquantised_rows(mixed: recording.Recording, tmp_path: Path) -> None:
    """Against attention over the model's own keys and values, rounded to f16 alone."""
    trace = read_trace(saved(tmp_path / "t.gguf", mixed))
    result = verify(trace, layers=[0])
    # Layer 0 sees embeddings alone: its rows are the same whatever cache is used.
    tokens = trace.header.tokens if trace.header else []
    other = recording.record(
        _same_model(), tokens, recording.Settings(layers=(0,), steps=0), title="whole"
    )
    whole = other.steps[0].tensors
    for step in result.steps[1:]:
        assert step.cost is not None
        row = len(PROMPT) + step.step - 2
        data = next(s for s in trace.steps if (s.layer, s.step) == (0, step.step)).load()
        want = whole["kqv_out"][row].reshape(data.out.shape)
        assert step.cost.relative == pytest.approx(difference(data.out, want).relative, rel=1e-3)


def _same_model() -> Any:
    from test_trace import make_model

    return make_model()


# --- planted mistakes -----------------------------------------------------------------------------


def plant(recorded: recording.Recording, change: Callable[[Tensors], None]) -> recording.Recording:
    """A copy of a trace whose every step is changed."""
    planted = copy.deepcopy(recorded)
    for step in planted.steps:
        change(step.tensors)
    return planted


def whole(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v, mask of a step as float32, cold before hot."""
    k, v = tensors["k"].astype(np.float32), tensors["v"].astype(np.float32)
    if "k_quant" in tensors:
        k = np.concatenate([ref.dequantize_q4_0(tensors["k_quant"]), k], 1)
        v = np.concatenate([ref.dequantize_q4_0(tensors["v_quant"]), v], 1)
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
        blocks = tensors[role].reshape(-1, 18).copy()
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
        blocks[:, 2:] = values[:, 0::2] | values[:, 1::2] << 4
        tensors[role] = blocks.reshape(tensors[role].shape)


def scale_left_out(tensors: Tensors) -> None:
    tensors["kqv_out"] = compute({**tensors, "q": tensors["q"] * np.sqrt(np.float32(32))})


def one_element(tensors: Tensors) -> None:
    out = tensors["kqv_out"].copy()
    out[-1, 37] += 0.02 * np.abs(out).max()
    tensors["kqv_out"] = out


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
        rows = step.tensors["k_quant"].copy()
        rows[:, 2, 5] ^= 0x11
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


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kv", "wrong"), [(4096, 1, 60_000, False), (1024, 2, 16_000, True)]
)
def test_many_heads_over_few_kv_heads_take_no_memory(
    heads: int, kv_heads: int, kv: int, wrong: bool, tmp_path: Path
) -> None:
    """Keys are not repeated for the heads that read them: that would be 30 GB, and 2 GB."""
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np, torch
import mixedkv as mkv
from mixedkv.tools.trace import LayerInfo, RecordedStep, TraceHeader, read_trace, write_trace
from mixedkv.tools.trace.verify import verify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

rng = np.random.default_rng(0)
heads, kv_heads, kv = {heads}, {kv_heads}, {kv}
q = rng.standard_normal((heads, 1, 32), dtype=np.float32)
k, v = (rng.standard_normal((kv_heads, kv, 32), dtype=np.float32) for _ in "kv")
out = np.asarray(mkv.attention(q, k, v, sm_scale=0.2)).transpose(1, 0, 2).reshape(1, -1)
if {wrong}:
    out = out[:, ::-1]
tensors = {{"q": q, "k": k, "v": v, "mask": np.zeros((1, kv), np.float16)}}
tensors["kqv_out"] = np.ascontiguousarray(out)
info = LayerInfo(heads, kv_heads, 32, 32, 0.2)
header = TraceHeader("test", "1", "none", "standard", layers={{0: info}})
path = Path(sys.argv[1])
write_trace(path, header, [RecordedStep(0, 1, tensors)])
torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4)] * 3)
before = peak()
result = verify(read_trace(path), isas=[mkv.isa.active()], entropy={wrong})
print(result.passed, peak() - before)
"""
    folder = str(Path(mkv.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t.gguf")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folder},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed, megabytes = done.stdout.split()
    assert passed == str(not wrong)
    assert float(megabytes) < 700


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"])
def test_torch_in_pieces_is_the_same(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces: of kv heads, of query heads, of queries."""
    from mixedkv.tools.trace import arithmetic

    trace = read_trace(saved(tmp_path / "t.gguf", record(model, mixed=True, steps=2)))
    problems = [problem_of(step.load(), step.info) for step in trace.steps]
    wanted = [attend_torch(problem, torch.float64) for problem in problems]
    for most in (1, 40, 700, 1000, 2000):
        monkeypatch.setattr(arithmetic, "MOST_HELD", most)
        for problem, want in zip(problems, wanted, strict=True):
            np.testing.assert_allclose(
                attend_torch(problem, torch.float64), want, rtol=0, atol=1e-13
            )
            parts = list(arithmetic.probabilities(problem))
            rows = sum(part.shape[0] * part.shape[1] for part in parts)
            assert rows == problem.q.shape[0] * problem.q.shape[1]
            assert max(part.size for part in parts) <= max(most, problem.k.shape[1])


# --- tolerances, two traces, pictures -------------------------------------------------------------


def test_tolerances_decide(standard: recording.Recording, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", standard)
    assert call("verify", "-i", path, "--tolerance-rel", "1e-12").exit_code == 1
    assert call("verify", "-i", path, "--tolerance-abs", "0").exit_code == 1
    off = plant(standard, one_element)
    path = saved(tmp_path / "off.gguf", off)
    assert call("verify", "-i", path).exit_code == 1
    loose = ["--tolerance-rel", "0.1", "--tolerance-abs", "1"]
    assert call("verify", "-i", path, *loose).exit_code == 0


def test_a_single_wrong_element_of_a_long_step_fails() -> None:
    """Its share of the norm is within the tolerance; it is not."""
    rng = np.random.default_rng(0)
    want = rng.standard_normal((600, 9, 64))
    got = want.copy()
    got[5, 3, 1] += 5e-3
    found = difference(got, want)
    assert found.relative < 2e-5
    assert Tolerance().judge("", found, quantised=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_difference_with_odd_values_is_infinite(value: float) -> None:
    want = np.ones(4)
    got = np.array([1, value, 1, 1])
    for a, b in ((got, want), (want, got)):
        found = difference(a, b)
        assert found.relative == np.inf
        assert found.not_finite == 1
        assert found.grade == "wrong"
        assert Tolerance(1e30, 1e30).judge("", found, quantised=True)
    assert difference(got, got).relative == 0


def test_difference_figures() -> None:
    found = difference(np.array([3.0, 4.0]), np.array([3.0, 0.0]))
    assert (found.max, found.mean, found.scale) == (4, 2, 3)
    assert found.relative == pytest.approx(4 / 3)
    assert found.nmse == pytest.approx(16 / 9)
    assert found.cosine == pytest.approx(0.6)
    with pytest.raises(ValueError, match="can't be compared"):
        difference(np.ones(3), np.ones(4))


def test_reference_trace(
    standard: recording.Recording, mixed: recording.Recording, tmp_path: Path
) -> None:
    a = saved(tmp_path / "a.gguf", standard)
    b = saved(tmp_path / "b.gguf", mixed)
    same = call("verify", "-i", a, "--reference", a)
    assert same.exit_code == 0
    assert same.stdout.count("PASS") == 3  # by itself, against the reference, and both
    other = call("verify", "-i", a, "--reference", b, "--json")
    assert other.exit_code == 1
    found = json.loads(other.stdout)
    assert not found["passed"]
    assert found["by_itself"]
    assert not found["reference"]["passed"]
    first = [one for one in found["reference"]["steps"] if (one["step"], one["layer"]) == (1, 0)]
    assert [one["role"] for one in first] == ["kqv_out", "q", "k", "v"]
    assert first[0]["relative"] < 2e-5  # nothing was cold yet
    result = compare_traces(read_trace(a), read_trace(b), Tolerance(1e9, 1e9))
    assert result.passed


def test_reference_that_lacks_steps_fails(standard: recording.Recording, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.gguf", tmp_path / "part.gguf"
    write_trace(whole, standard.header, standard.steps)
    layers = {0: standard.header.layers[0]}
    header = dataclasses.replace(standard.header, layers=layers)
    write_trace(part, header, [one for one in standard.steps if one.layer == 0])
    for a, b, words in (
        (whole, part, "the reference lacks it"),
        (part, whole, "only the reference"),
    ):
        result = call("verify", "-i", a, "--reference", b, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["by_itself"]
        assert not found["passed"]
        assert any(words in one for one in found["reference"]["failures"])


def test_reference_is_compared_in_the_layers_asked_for(
    standard: recording.Recording, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole.gguf", tmp_path / "part.gguf"
    write_trace(whole, standard.header, standard.steps)
    other = plant(standard, one_element)
    kept = [one for one in standard.steps if one.layer == 1]
    write_trace(part, standard.header, kept + [one for one in other.steps if one.layer == 2])
    for a, b in ((whole, part), (part, whole)):
        found = json.loads(
            call("verify", "-i", a, "--reference", b, "--layer", "1", "--json").stdout
        )
        assert found["passed"]
        assert {one["layer"] for one in found["reference"]["steps"]} == {1}
        result = call("verify", "-i", a, "--reference", b, "--layer", "1,2", "--json")
        assert result.exit_code == 1
    assert call("verify", "-i", whole, "--reference", part).exit_code == 1
    lacks = call("verify", "-i", whole, "--reference", part, "--layer", "0")
    assert lacks.exit_code == 2
    assert "share no step" in lacks.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_not_finite_fails(
    standard: recording.Recording, tmp_path: Path, value: float
) -> None:
    """Even where recomputing it gives the same."""
    steps = copy.deepcopy(list(standard.steps))
    for one in steps:
        one.tensors["v"] = np.full_like(one.tensors["v"], value)
        one.tensors["kqv_out"] = np.full_like(one.tensors["kqv_out"], value)
    path = tmp_path / "odd.gguf"
    write_trace(path, standard.header, steps)
    result = call("verify", "-i", path)
    assert result.exit_code == 1
    assert "not finite" in result.stdout


def test_reference_without_a_common_step_is_refused(
    standard: recording.Recording, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_trace(a, standard.header, [one for one in standard.steps if one.layer == 0])
    write_trace(b, standard.header, [one for one in standard.steps if one.layer == 1])
    result = call("verify", "-i", a, "--reference", b)
    assert result.exit_code == 2
    assert "share no step" in result.stderr


@pytest.mark.parametrize("cache", ["standard", "mixed"])
def test_plot(cache: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("matplotlib")
    path = saved(tmp_path / "t.gguf", request.getfixturevalue(cache))
    picture = tmp_path / "t.png"
    assert call("verify", "-i", path, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("verify", "-i", path, "--plot", tmp_path / "t.doc").exit_code == 2


def test_entropy_by_tier(mixed: recording.Recording, tmp_path: Path) -> None:
    """Against numpy, in one step."""
    trace = read_trace(saved(tmp_path / "t.gguf", mixed))
    result = verify(trace, entropy=True, isas=())
    index = next(i for i, step in enumerate(trace.steps) if step.step == 5)
    step = trace.steps[index]
    q, k, _, mask = whole(
        next(s for s in mixed.steps if (s.layer, s.step) == (step.layer, 5)).tensors
    )
    logits = (q @ np.repeat(k, 2, 0).swapaxes(1, 2)).astype(np.float64) / np.sqrt(32) + mask
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = result.steps[index].entropy
    assert found is not None
    cold = p[..., : step.kv_cold]
    assert found.cold_share == pytest.approx(cold.sum(-1).mean(), rel=1e-4)
    for part, entropy in ((cold, found.cold), (p[..., step.kv_cold :], found.hot)):
        within = part / part.sum(-1, keepdims=True)
        assert entropy == pytest.approx(-(within * np.log(within)).sum(-1).mean(), rel=1e-3)


def test_verify_layers_and_isas(standard: recording.Recording, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", standard)
    found = json.loads(
        call("verify", "-i", path, "--layer", "1", "--isa", "scalar", "--json").stdout
    )
    assert {step["layer"] for step in found["steps"]} == {1}
    assert list(found["steps"][0]["isas"]) == ["scalar"]
    before = mkv.isa.active()
    assert call("verify", "-i", path, "--layer", "8").exit_code == 2
    assert call("verify", "-i", path, "--isa", "sse").exit_code == 2
    assert mkv.isa.active() == before
