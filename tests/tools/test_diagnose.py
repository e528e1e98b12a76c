"""Each known mistake has a hint of its own, and looking for them is bounded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
from mixedkv.tools.trace import (
    LayerInfo,
    RecordedStep,
    TraceHeader,
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording
from mixedkv.tools.trace.arithmetic import attend_torch, problem_of
from mixedkv.tools.trace.diagnose import diagnose
from mixedkv.tools.trace.verify import verify
from test_trace import record, saved
from verify_cases import Tensors, plant


@pytest.fixture(scope="module")
def mixed() -> recording.Recording:
    return record(mixed=True, steps=2, sink_tokens=1)


class Part(NamedTuple):
    """Attention over one tier: acc and S relative to M, [heads, queries, Dv or 1]."""

    acc: np.ndarray
    S: np.ndarray
    M: np.ndarray


def by_tier(tensors: Tensors) -> tuple[Part, Part]:
    """Cold and hot."""
    cold = tensors["k_quant"].shape[1]
    mask = tensors["mask"].astype(np.float32)
    return (
        attend(
            tensors["q"],
            ref.dequantize_q4_0(tensors["k_quant"].data),
            ref.dequantize_q4_0(tensors["v_quant"].data),
            mask[:, :cold],
        ),
        attend(tensors["q"], tensors["k"], tensors["v"], mask[:, cold:]),
    )


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> Part:
    ratio = q.shape[0] // k.shape[0]
    k, v = (np.repeat(np.asarray(one, np.float32), ratio, 0) for one in (k, v))
    x = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2]) + mask
    largest = x.max(-1, keepdims=True)
    p = np.exp(x - largest)
    return Part(p @ v, p.sum(-1, keepdims=True), largest)


def averaged(c: Part, h: Part) -> np.ndarray:
    return (c.acc / c.S + h.acc / h.S) / 2


def acc_reset(c: Part, h: Part) -> np.ndarray:
    top = np.maximum(c.M, h.M)
    return h.acc * np.exp(h.M - top) / (c.S * np.exp(c.M - top) + h.S * np.exp(h.M - top))


def acc_unscaled(c: Part, h: Part) -> np.ndarray:
    top = np.maximum(c.M, h.M)
    return (c.acc + h.acc * np.exp(h.M - top)) / (c.S * np.exp(c.M - top) + h.S * np.exp(h.M - top))


def all_unscaled(c: Part, h: Part) -> np.ndarray:
    return (c.acc + h.acc) / (c.S + h.S)


def cold_alone(c: Part, h: Part) -> np.ndarray:
    return c.acc / c.S


def hot_alone(c: Part, h: Part) -> np.ndarray:
    return h.acc / h.S


def hot_twice(c: Part, h: Part) -> np.ndarray:
    top = np.maximum(c.M, h.M)
    a, b = np.exp(c.M - top), 2 * np.exp(h.M - top)
    return (c.acc * a + h.acc * b) / (c.S * a + h.S * b)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (averaged, "the tiers' results were averaged"),
        (acc_reset, "the accumulator was reset after the cold part, while its sum of weights"),
        (acc_unscaled, "tiers were joined without scaling the accumulator to one maximum"),
        (all_unscaled, "tiers were joined without scaling the accumulator and sum to one maximum"),
        (cold_alone, "the hot part was not attended"),
        (hot_alone, "the cold part was not attended"),
        (hot_twice, "the hot part was attended twice"),
    ],
)
def test_tiers_joined_wrongly_are_told_apart(
    wrong: Callable[[Part, Part], np.ndarray],
    hint: str,
    mixed: recording.Recording,
    tmp_path: Path,
) -> None:
    def change(tensors: Tensors) -> None:
        if len(tensors["mask"]) == 1:  # the prompt has no cold key
            out = wrong(*by_tier(tensors)).transpose(1, 0, 2)
            tensors["kqv_out"] = np.ascontiguousarray(out, np.float32).reshape(1, -1)

    result = verify(read_trace(saved(tmp_path / "t.gguf", plant(mixed, change))), isas=())
    named = [step.hints for step in result.steps if step.hints]
    assert len(named) == 3  # as many as are looked at
    for hints in named:
        assert len(hints) == 1
        assert hints[0].startswith(hint)


def trace_of(
    path: Path,
    change: Callable[[Tensors], None],
    *,
    n: int = 7,
    heads: int = 6,
    kv_heads: int = 2,
    kv: int = 11,
    steps: int = 1,
) -> Path:
    """Random rows and the right output, changed."""
    rng = np.random.default_rng(3)
    info = LayerInfo(heads, kv_heads, 32, 32, 32**-0.5)
    recorded = []
    for step in range(1, steps + 1):
        tensors: Tensors = {
            "q": rng.standard_normal((heads, n, 32), dtype=np.float32),
            "k": rng.standard_normal((kv_heads, kv, 32), dtype=np.float32),
            "v": rng.standard_normal((kv_heads, kv, 32), dtype=np.float32),
            "mask": np.zeros((n, kv), np.float32),
        }
        out = np.asarray(mkv.attention(tensors["q"], tensors["k"], tensors["v"], sm_scale=32**-0.5))
        tensors["kqv_out"] = np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(n, -1)
        change(tensors)
        recorded.append(RecordedStep(0, step, tensors))
    write_trace(path, TraceHeader("t", "1", "none", "standard", layers={0: info}), recorded)
    return path


def v_tiled(tensors: Tensors) -> None:
    q, k, v = tensors["q"], np.repeat(tensors["k"], 3, 0), np.tile(tensors["v"], (3, 1, 1))
    part = attend(q, k, v, tensors["mask"])
    out = (part.acc / part.S).transpose(1, 0, 2)
    tensors["kqv_out"] = np.ascontiguousarray(out, np.float32).reshape(len(out), -1)


def heads_interleaved(tensors: Tensors) -> None:
    """[kv head][group] written as [group][kv head]."""
    out = tensors["kqv_out"]
    turned = out.reshape(len(out), 2, 3, 32).swapaxes(1, 2)
    tensors["kqv_out"] = np.ascontiguousarray(turned).reshape(out.shape)


def v_transposed(tensors: Tensors) -> None:
    """Rows that lie as [head][dim][key]."""
    v = tensors["v"]
    tensors["v"] = np.ascontiguousarray(v.swapaxes(1, 2)).reshape(v.shape)


def v_read_transposed(tensors: Tensors) -> None:
    v = tensors["v"]
    tensors["v"] = np.ascontiguousarray(v.reshape(2, 32, -1).swapaxes(1, 2))


def all_zero(tensors: Tensors) -> None:
    tensors["kqv_out"] = np.zeros_like(tensors["kqv_out"])


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (v_tiled, "GQA is tiled for V: "),
        (
            heads_interleaved,
            r"the output's heads are interleaved: they lie as \[group\]\[kv head\]",
        ),
        (v_transposed, r"wrong strides: V was read transposed: .* as \[head\]\[dim\]\[key\]"),
        (v_read_transposed, r"wrong strides: V was laid out as \[head\]\[dim\]\[key\]"),
        (all_zero, "the output is all zero"),
    ],
)
def test_mistake_has_one_hint(change: Callable[[Tensors], None], hint: str, tmp_path: Path) -> None:
    step = verify(read_trace(trace_of(tmp_path / "t.gguf", change)), isas=()).steps[0]
    assert len(step.hints) == 1
    assert re.match(hint, step.hints[0])
    assert len(step.failures) == 1  # not once for each of PyTorch's types


def test_looking_for_mistakes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large step some queries are looked at, and the hint says so."""
    from mixedkv.tools.trace import diagnose as module

    def noise(tensors: Tensors) -> None:
        out = tensors["kqv_out"]
        tensors["kqv_out"] = np.random.default_rng(1).standard_normal(out.shape, np.float32)

    monkeypatch.setattr(module, "_MOST_PRODUCTS", 32 * 70 * 64 * 5)
    sizes = {"n": 90, "heads": 32, "kv_heads": 4, "kv": 70}
    noisy = trace_of(tmp_path / "t.gguf", noise, **sizes)
    hints = verify(read_trace(noisy), isas=()).steps[0].hints
    assert hints[0].startswith("no known mistake explains it; all heads are off; all queries")
    found = re.fullmatch(r"known mistakes were tried on (\d) of 90 queries", hints[-1])
    assert found is not None
    assert int(found[1]) <= 6  # the worst on top
    # What is looked at is enough to see what is the matter.
    for change, words in ((v_transposed, "V was read transposed"), (all_zero, "all zero")):
        path = trace_of(tmp_path / "t.gguf", change, **sizes)
        assert words in verify(read_trace(path), isas=()).steps[0].hints[0]


def test_long_steps_are_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations, and at last everything that needs attention, are not tried; that is said."""
    from mixedkv.tools.trace import diagnose as module

    def rotated(tensors: Tensors) -> None:
        tensors["k"] = np.roll(tensors["k"], 3, 1)

    path = trace_of(tmp_path / "t.gguf", rotated)

    def hints() -> list[str]:
        return verify(read_trace(path), isas=()).steps[0].hints

    assert hints()[0].startswith("the hot part is ordered wrongly: its K stand rotated by 8 keys")
    monkeypatch.setattr(module, "_MOST_ROLLED", 10)
    assert hints()[-1] == "rotations of the hot part were not tried: it has 11 keys"
    monkeypatch.setattr(module, "_MOST_VALUES", 10 * 6 * 32)
    assert (
        hints()[-1]
        == "known mistakes were not tried: the step has 11 keys, 10 at most are looked at"
    )


@pytest.mark.parametrize("by", range(11))
@pytest.mark.parametrize("letters", ["k", "v", "kv"])
def test_every_rotation_is_found(by: int, letters: str, tmp_path: Path) -> None:
    """0 stands for the reverse. Some keys are hidden: the mask has an order, too."""

    def hide(tensors: Tensors) -> None:
        tensors["mask"] = np.where(np.isin(np.arange(11), (2, 3, 10)), -np.inf, 0).astype(
            np.float32
        )
        tensors["mask"] = np.repeat(tensors["mask"][None], 7, 0)
        part = attend(tensors["q"], tensors["k"], tensors["v"], tensors["mask"])
        out = (part.acc / part.S).transpose(1, 0, 2)
        tensors["kqv_out"] = np.ascontiguousarray(out, np.float32).reshape(7, -1)
        for letter in letters:
            rows = tensors[letter]
            tensors[letter] = np.ascontiguousarray(
                rows[:, ::-1] if by == 0 else np.roll(rows, -by, 1)
            )

    trace = read_trace(trace_of(tmp_path / "t.gguf", hide))
    data = trace.steps[0].load()
    problem = problem_of(data, trace.steps[0].info)
    import torch

    found = diagnose(data, problem, attend_torch(problem, torch.float32), 2e-5)
    how = "reversed" if by == 0 else f"rotated by {by} keys"
    name = {"k": "K", "v": "V", "kv": "K and V"}[letters]
    assert len(found) == 1
    if (letters, by) != ("kv", 0):
        assert found[0].startswith(f"the hot part is ordered wrongly: its {name} stand {how}")
