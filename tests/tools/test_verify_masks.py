"""Masks of traces, held against the positions of the keys: wrong ones fail, and are named."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
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
import reference as ref
from mixedkv.tools.trace import read_trace
from mixedkv.tools.trace import record as recording
from mixedkv.tools.trace.stored import data_of, of_format
from mixedkv.tools.trace.verify import verify
from test_trace import record, saved
from verify_cases import Tensors, compute, fails, plant, small_trace, whole


@pytest.fixture(scope="module")
def mixed() -> recording.Recording:
    return record(mixed=True, steps=4, sink_tokens=1)


@pytest.fixture(scope="module")
def standard() -> recording.Recording:
    return record(steps=4)


def with_mask(
    recorded: recording.Recording, step: int, change: Callable[[np.ndarray], None]
) -> recording.Recording:
    """A copy with another mask in one step, of every layer, and outputs that fit it."""
    planted = copy.deepcopy(recorded)
    for one in planted.steps:
        if one.step == step:
            mask = one.tensors["mask"].copy()
            change(mask)
            one.tensors["mask"] = mask
            one.tensors["kqv_out"] = compute(one.tensors)
    return planted


def put(value: float, *at: Any) -> Callable[[np.ndarray], None]:
    return lambda mask: mask.__setitem__(at, value)


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (
            1,
            put(0.0, 4, slice(9, 12)),
            r"step 1 of layer 0: the mask contradicts the positions: query 4 \(position 4\) sees "
            r"key 9 of K at position 9, which comes later",
        ),
        (1, put(0.0, slice(None)), r"query 0 \(position 0\) sees key 1 of K at position 1, which"),
        (
            1,
            put(-np.inf, 7, 2),
            r"query 7 \(position 7\) does not see key 2 of K at position 2, which it should",
        ),
        (4, put(-np.inf, 0, -1), r"query 0 \(position 23\) does not see key \d+ of K at"),
    ],
    ids=["later", "ignored", "hidden", "itself"],
)
def test_mask_that_contradicts_positions_fails(
    step: int,
    change: Callable[[np.ndarray], None],
    message: str,
    standard: recording.Recording,
    tmp_path: Path,
) -> None:
    """Each step's arithmetic is right for its mask; the mask is not."""
    path = saved(tmp_path / "t.gguf", with_mask(standard, step, change))
    found = fails(path, message)
    assert all(one["passed"] for one in found["steps"])
    assert len(found["failures"]) == 3  # one of each layer


def test_mask_of_cold_keys_is_held_against_positions(
    mixed: recording.Recording, tmp_path: Path
) -> None:
    path = saved(tmp_path / "t.gguf", with_mask(mixed, 3, put(-np.inf, 0, 2)))
    fails(path, r"query 0 \(position 22\) does not see key 2 of K_quant at position \d+, which")


def test_mask_is_held_against_windows(tmp_path: Path) -> None:
    """Layers 0 and 2 of the model see 8 keys before their own, layer 1 sees all."""
    recorded = record("gemma2", steps=1)
    windows = [recorded.header.layers[layer].window_left for layer in range(3)]
    assert windows == [8, -1, 8]
    good = verify(read_trace(saved(tmp_path / "t.gguf", recorded)))
    assert (good.failures, good.remarks) == ([], [])
    for layer, at, value, message in (
        (0, (15, 6), 0.0, r"query 15 \(position 15\) sees key 6 of K at position 6, outside of"),
        (2, (15, 7), -np.inf, r"query 15 \(position 15\) does not see key 7 of K"),
        (1, (15, 0), -np.inf, r"query 15 \(position 15\) does not see key 0 of K"),
    ):
        planted = copy.deepcopy(recorded)
        step = next(one for one in planted.steps if (one.layer, one.step) == (layer, 1))
        assert step.tensors["mask"][at] != value
        step.tensors["mask"][at] = value
        result = verify(read_trace(saved(tmp_path / "t.gguf", planted)), layers=[layer])
        assert re.search(message, result.failures[0])
        # Without the window, a hidden key may be right, and so may one that is seen.
        for one, info in list(planted.header.layers.items()):
            planted.header.layers[one] = dataclasses.replace(info, window_left=None)
        result = verify(read_trace(saved(tmp_path / "t.gguf", planted)), layers=[layer])
        assert not result.failures
        assert result.remarks[0].startswith("the layers' windows are not recorded")


def test_long_masks_are_held_against_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts: the cell that is named is that of the whole."""
    from mixedkv.tools.trace import follow

    monkeypatch.setattr(follow, "_MOST_CELLS", 64)
    later = np.arange(40)[None, :] > np.arange(40)[:, None]
    mask = np.where(later, -np.inf, 0).astype(np.float32)
    header = {"n": 40, "kv": 40, "positions": {1: np.arange(40)}, "step_tokens": [40]}
    path = small_trace(tmp_path / "t.gguf", mask=mask, window=-1, **header)
    assert verify(read_trace(path)).passed
    mask[33, 35] = 0
    path = small_trace(tmp_path / "t.gguf", mask=mask, **header)
    fails(path, r"query 33 \(position 33\) sees key 35 of K at position 35, which comes later")


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_padding_among_keys_is_legal_unless_seen(
    tier: str, mixed: recording.Recording, tmp_path: Path
) -> None:
    """Cells of position -1 hold anything, also another thing in each step."""
    planted = copy.deepcopy(mixed)
    rng = np.random.default_rng(2)
    places = planted.header.positions if tier == "hot" else planted.header.positions_quant
    roles = ("k", "v") if tier == "hot" else ("k_quant", "v_quant")
    cells = {}
    for one in planted.steps:
        cold = one.tensors["k_quant"].shape[1]
        cells[one.step] = 1 if tier == "cold" else cold + 1
        for role in roles:
            rows = data_of(one.tensors[role])
            odd = rng.standard_normal((2, 2, 32)).astype(np.float16)
            odd = odd if tier == "hot" else ref.quantize_q4_0(odd)
            more = np.concatenate([rows[:, :1], odd, rows[:, 1:]], 1)
            one.tensors[role] = of_format(more, one.tensors[role])
        hidden = np.full((len(one.tensors["mask"]), 2), -np.inf, np.float16)
        at = cells[one.step]
        mask = one.tensors["mask"]
        one.tensors["mask"] = np.concatenate([mask[:, :at], hidden, mask[:, at:]], 1)
    for step, positions in places.items():
        places[step] = np.concatenate([positions[:1], [-1, -1], positions[1:]])
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert result.passed, result.failures
    assert (
        result.rows_followed == verify(read_trace(saved(tmp_path / "a.gguf", mixed))).rows_followed
    )
    assert all(step.cost is not None for step in result.steps if step.step > 1)
    seen = with_mask(planted, 3, lambda mask: mask.__setitem__((0, cells[3]), 0.0))
    name = "K" if tier == "hot" else "K_quant"
    path = saved(tmp_path / "t.gguf", seen)
    fails(path, rf"query 0 sees key 1 of {name}, which is padding \(-1\)")


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_cold_rows_of_other_types_are_followed(
    kind: Any, mixed: recording.Recording, tmp_path: Path
) -> None:
    """A cold tier in f16, say: its rows are those that were hot."""
    planted = copy.deepcopy(mixed)
    hot: dict[tuple[int, int], Tensors] = {}
    for one in planted.steps:
        for index, position in enumerate(planted.header.positions[one.step].tolist()):
            rows = {role: one.tensors[role][:, index] for role in ("k", "v")}
            hot.setdefault((one.layer, position), rows)
        places = planted.header.positions_quant[one.step].tolist()
        for role in ("k", "v"):
            nothing = np.zeros((2, 32), np.float16)
            rows = [
                nothing if position < 0 else hot[one.layer, position][role] for position in places
            ]
            one.tensors[f"{role}_quant"] = np.stack(rows, 1).astype(kind)
        q, k, v, mask = whole(
            {
                role: rows
                for role, rows in {
                    **one.tensors,
                    "k": np.concatenate([one.tensors["k_quant"], one.tensors["k"]], 1),
                    "v": np.concatenate([one.tensors["v_quant"], one.tensors["v"]], 1),
                }.items()
                if not role.endswith("_quant")
            }
        )
        out = np.asarray(mkv.attention(q, k, v, sm_scale=32**-0.5, mask=mask))
        one.tensors["kqv_out"] = np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(len(mask), -1)
    good = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert good.passed, good.failures
    assert not any(step.quantised for step in good.steps)
    last = planted.steps[-1].tensors
    last["v_quant"][1, 3, 7] += 0.001 * np.abs(last["v_quant"]).max()
    bad = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert all(step.passed for step in bad.steps if step.step < 5)
    name = {"float16": "f16", "float32": "f32"}[np.dtype(kind).name]
    assert f"(V) are not the {name} of what they were while hot" in bad.failures[0]


# --- masks that were recorded wrong ---------------------------------------------------------------


def of_prompt(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Tensors], None]:
    """Change the prompt's mask, given how many of its columns are cold keys'."""

    def apply(tensors: Tensors) -> None:
        if len(tensors["mask"]) > 1:
            cold = tensors["k_quant"].shape[1] if "k_quant" in tensors else 0
            tensors["mask"] = np.ascontiguousarray(change(tensors["mask"], cold))

    return apply


WRONG_MASKS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], str]] = {
    "zeroed": (lambda mask, cold: np.zeros_like(mask), "is ignored or zeroed: it hides nothing"),
    "exchanged": (
        lambda mask, cold: np.concatenate([mask[:, cold:], mask[:, :cold]], 1),
        "parts of the recorded mask are exchanged: hot then cold",
    ),
    "backwards": (lambda mask, cold: mask[:, ::-1], "mask is reversed: its keys stand backwards"),
    "reversed": (
        lambda mask, cold: mask[::-1, ::-1],
        r"mask is (reversed: keys and queries stand backwards|transposed: \[key, query\])",
    ),
    "inverted": (
        lambda mask, cold: np.where(mask == 0, -np.inf, 0).astype(mask.dtype),
        "mask is inverted",
    ),
    "late": (
        lambda mask, cold: np.concatenate([np.zeros_like(mask[:, :1]), mask[:, :-1]], 1),
        "mask is one key too late",
    ),
}


@pytest.mark.parametrize(
    ("cache", "way"),
    [
        (cache, way)
        for cache in ("standard", "mixed")
        for way in WRONG_MASKS
        if (cache, way) != ("standard", "exchanged")  # it has one part
    ],
)
def test_wrong_recorded_mask_is_named(
    cache: str, way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The output is right, and so are the positions: of the recorded mask both say what it is."""
    change, message = WRONG_MASKS[way]
    planted = plant(request.getfixturevalue(cache), of_prompt(change))
    found = fails(saved(tmp_path / "t.gguf", planted), message)
    assert re.search(message, found["failures"][0])
    first = found["steps"][0]
    assert not first["passed"]
    if way == "inverted":  # a query that sees no key at all differs from the positions' mask
        return
    assert len(first["hints"]) == 1
    assert re.search(message, first["hints"][0])
    assert "output fits the mask that the positions imply" in first["hints"][0]


@pytest.mark.parametrize("steps_known", [True, False])
def test_wrong_recorded_mask_is_named_without_the_queries_positions(
    steps_known: bool, standard: recording.Recording, tmp_path: Path
) -> None:
    """The last query is taken for the newest key; nothing contradicts the mask as such."""
    planted = plant(standard, of_prompt(lambda mask, cold: np.zeros_like(mask)))
    if not steps_known:
        planted.header.step_tokens = []
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)), isas=())
    assert bool(result.failures) == steps_known
    assert result.steps[0].hints[0].startswith("the recorded mask is ignored or zeroed")


# --- masks of finite numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [-65504.0, -1e9, -1e4])
def test_large_finite_numbers_hide_keys(
    value: float, standard: recording.Recording, tmp_path: Path
) -> None:
    """Where a key should be seen they are wrong; where it is hidden they are another -inf."""
    tensors = [one.tensors for one in standard.steps if one.step == 1]

    def lay(mask: np.ndarray, low: np.ndarray) -> None:
        mask[:] = np.where(low, np.float16(max(value, -65504)), mask)

    hidden = np.isneginf(tensors[0]["mask"])
    fine = with_mask(standard, 1, lambda mask: lay(mask, hidden))
    result = verify(read_trace(saved(tmp_path / "t.gguf", fine)))
    assert result.passed, result.failures
    assert not result.remarks
    past = np.zeros_like(hidden)
    past[9:, 3] = True
    wrong = with_mask(standard, 1, lambda mask: lay(mask, past))
    found = fails(
        saved(tmp_path / "t.gguf", wrong),
        r"query 9 \(position 9\) does not see key 3 of K at position 3, which it should",
    )
    assert all(step["passed"] for step in found["steps"])


@pytest.mark.parametrize("value", [-20.0, 0.5])
def test_biases_are_remarked(value: float, standard: recording.Recording, tmp_path: Path) -> None:
    biased = with_mask(standard, 1, put(value, slice(5, None), 2))
    result = verify(read_trace(saved(tmp_path / "t.gguf", biased)))
    assert result.passed
    assert len(result.remarks) == 1
    assert result.remarks[0].startswith("the masks of layers 0, 1, 2 add other numbers than 0")
    alone = verify(read_trace(tmp_path / "t.gguf"), layers=[1])
    assert alone.remarks[0].startswith("the mask of layer 1 adds other numbers than 0")
