"""mixedkv's own op over recorded steps: the packed kernels that a mixed cache runs."""

from __future__ import annotations

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
from conftest import relative_error
from mixedkv.tools.trace import LayerInfo, Step, StepData, read_trace
from mixedkv.tools.trace.replay import OwnOp, filled_cache
from mixedkv.tools.trace.stored import data_of
from mixedkv.tools.trace.verify import verify
from test_trace import record, saved

EXACT = 2e-6
"""The same kernels over the same rows in other cells: sums in another order."""


def recorded(path: Path, name: str = "llama", **settings: Any) -> list[Step]:
    return read_trace(saved(path / "t.gguf", record(name, **settings))).steps


SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {"mixed": True},
    "second_mask": {"mixed": True, "second_mask": True},
    "sinks_stay": {"mixed": True, "sink_tokens": 3},
    "hot_f32": {"mixed": True, "k_type": "f32", "v_type": "f32"},
    "hot_q4_0": {"mixed": True, "k_type": "q4_0", "v_type": "q4_0"},
    "hot_both": {"mixed": True, "k_type": "q4_0"},
    "standard_q4_0": {"k_type": "q4_0", "v_type": "q4_0"},
    "standard_both": {"v_type": "q4_0"},
    "soft_cap_and_window": {"name": "gemma2", "mixed": True},
    "learned_sinks": {"name": "gpt_oss", "mixed": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replay_is_what_the_cache_gave(name: str, isa: str, tmp_path: Path) -> None:
    """The recorded output again, not only attention over the same values.

    Packed kernels round the query, so the op over plain rows is farther off by a factor of ten and
    more: what is attended here is packed.
    """
    steps = recorded(tmp_path, steps=3, **SETTINGS[name])
    packed = 0
    for step in steps:
        data = step.load()
        own = OwnOp(data, step.info)
        assert own.plain is None
        assert relative_error(own.attend(), data.out) < EXACT
        packed += isinstance(data.k, mkv.QuantizedArray) or own._order is not None
    assert packed == len(steps) if "q4_0" in SETTINGS[name].values() else packed >= 3


def test_replay_holds_the_recorded_rows(tmp_path: Path) -> None:
    """Bit for bit: a Q4_0 row quantises to itself."""
    held = 0
    for step in recorded(tmp_path, mixed=True, steps=4):
        data = step.load()
        own = OwnOp(data, step.info)
        if own._order is None:
            continue
        hot, cold = filled_cache(data, own._order, own._cold).export_rows(0, 0)
        for stored, rows, at in (
            (hot.k, data.k, own._order.hot),
            (hot.v, data.v, own._order.hot),
            (cold.k, data.k_quant, own._order.cold),
            (cold.v, data.v_quant, own._order.cold),
        ):
            assert rows is not None
            np.testing.assert_array_equal(data_of(stored), data_of(rows[:, at]))
            held += len(at)
    assert held > 500


INFO = LayerInfo(4, 2, 32, 64, 0.2)


def step_of(n: int = 3, hot: int = 7, cold: int = 40, hide: bool = True) -> StepData:
    """Several queries, the newest n of the hot keys their own; some cells are padding."""
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    mask = np.zeros((n, hot), np.float32)
    mask[:, hot - n :][np.triu_indices(n, 1)] = -np.inf
    mask_quant = np.zeros((n, cold), np.float32)
    if hide:
        mask[:, 1] = mask_quant[:, ::5] = -np.inf
    return StepData(
        out=np.zeros((n, 4, 64), np.float32),
        q=normal(4, n, 32),
        k=normal(2, hot, 32).astype(np.float16),
        v=normal(2, hot, 64).astype(np.float16),
        mask=mask,
        k_quant=mkv.quantize_q4_0(normal(2, cold, 32)),
        v_quant=mkv.quantize_q4_0(normal(2, cold, 64)),
        mask_quant=mask_quant,
    )


def expected(data: StepData) -> np.ndarray:
    assert data.k_quant is not None
    assert data.v_quant is not None
    assert data.mask_quant is not None
    k = np.concatenate([ref.dequantize_q4_0(data.k_quant), data.k], 1)
    v = np.concatenate([ref.dequantize_q4_0(data.v_quant), data.v], 1)
    mask = np.concatenate([data.mask_quant, data.mask], 1)
    out, _ = ref.attention(data.q, k, v, sm_scale=0.2, mask=mask)
    return np.asarray(out).reshape(4, -1, 64).transpose(1, 0, 2)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 300), (3, 3, 1), (3, 7, 40), (20, 50, 5)])
def test_replay_takes_several_queries(sizes: tuple[int, int, int], isa: str) -> None:
    n, hot, cold = sizes
    data = step_of(n, hot, cold, hide=cold > 5)
    own = OwnOp(data, INFO)
    assert own._order is not None
    assert own.plain is None
    assert relative_error(own.attend(), expected(data)) < 1e-3


def numbers(data: StepData) -> None:
    data.mask[0, 0] = -1.5


def hole(data: StepData) -> None:
    data.mask[-1, 0] = -np.inf


def cold_later(data: StepData) -> None:
    assert data.mask_quant is not None
    data.mask_quant[0, 3] = -np.inf


def none_of_its_own(data: StepData) -> None:
    data.mask[:, -1] = -np.inf


def other_scale(data: StepData) -> None:
    """No value of a block is 8 times its scale: not how ggml quantises."""
    assert data.k_quant is not None
    data.k_quant[0, 1, 2:18] = 0xA6


def not_finite(data: StepData) -> None:
    assert data.v_quant is not None
    data.v_quant[1, 2, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (numbers, "the mask adds numbers"),
        (hole, "queries do not see all keys up to their own"),
        (cold_later, "a cold key is hidden from some queries"),
        (none_of_its_own, "a query has no hot key of its own"),
        (other_scale, "not as a cache of mixedkv stores them"),
        (not_finite, "not as a cache of mixedkv stores them"),
    ],
)
def test_what_a_cache_can_not_give_again_is_attended_over_plain_rows(change: Any, why: str) -> None:
    data = step_of()
    change(data)
    own = OwnOp(data, INFO)
    assert own.plain is not None
    assert why in own.plain
    if change is not not_finite:
        assert relative_error(own.attend(), expected(data)) < 1e-3


def test_verify_says_where_the_packed_kernels_did_not_run(tmp_path: Path) -> None:
    """And runs them on every instruction set elsewhere."""
    path = saved(tmp_path / "t.gguf", record(mixed=True, steps=2))
    good = verify(read_trace(path))
    assert good.passed
    assert not any("packed" in words for words in good.remarks)
    assert {step.plain for step in good.steps} == {None}
    changed = record(mixed=True, steps=2)
    for step in changed.steps:
        k = step.tensors["k_quant"].data
        k.reshape(-1, 18)[0, 2:] = 0xA6
    found = verify(read_trace(saved(path, changed)), isas=["scalar"])
    said = [words for words in found.remarks if "packed" in words]
    assert len(said) == 1
    assert "not as a cache of mixedkv stores them" in said[0]
    assert sum(step.plain is not None for step in found.steps) > 0
