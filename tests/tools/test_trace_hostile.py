"""Traces that nobody vouches for: read, or refused in one line, and never at any cost."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
gguf = pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

from hostile_traces import refused, write  # noqa: E402
from mixedkv.tools.trace import LayerInfo, TraceError, TraceHeader, read_trace  # noqa: E402
from mixedkv.tools.trace.gguf_file import read_gguf  # noqa: E402
from test_trace import hand_made, record, saved  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    return saved(path, record(mixed=True, layers=(0,), steps=1)).read_bytes()


def patched(data: bytes, at: int, code: str, value: Any) -> bytes:
    raw = struct.pack("<" + code, value)
    return data[:at] + raw + data[at + len(raw) :]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is not a GGUF file"),
    "text": (lambda data: b"hello, world\n" * 9, "is not a GGUF file"),
    "magic": (lambda data: b"GGML" + data[4:], "is not a GGUF file"),
    "version": (lambda data: patched(data, 4, "I", 99), "is GGUF of version 99"),
    "big_endian": (lambda data: patched(data, 4, ">I"[1:], 3 << 24), "big-endian"),
    "tensors": (lambda data: patched(data, 8, "Q", 2**63), "more than its"),
    "entries": (lambda data: patched(data, 16, "Q", 2**62), "more than its"),
    "key_length": (lambda data: patched(data, 24, "Q", 2**60), "for a key"),
    "header_only": (lambda data: data[:24], "more than its"),
    "half_a_header": (lambda data: data[:300], "ends within|more than its"),
    "truncated": (lambda data: data[:-100], "truncated"),
    "half": (lambda data: data[: len(data) // 2], "truncated|ends within"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_gives_one_line(name: str, good: bytes, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(good))
    with pytest.raises(TraceError, match=message):
        read_trace(path)
    refused(path)


def test_hostile_file_is_told_wherever_it_ends(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    for end in range(0, len(good) - 32, 97):
        path.write_bytes(good[:end])
        with pytest.raises(TraceError):
            read_trace(path)


def test_hostile_bytes_never_crash_the_reader(good: bytes, tmp_path: Path) -> None:
    """Every byte of the header in turn is another one: read, or refused, and nothing else."""
    path = tmp_path / "bad.gguf"
    rng = np.random.default_rng(3)
    end = min(tensor.offset for tensor in read_gguf(write(path, good)).tensors)
    refusals = 0
    for at in range(0, end, 3):
        changed = bytearray(good)
        changed[at] ^= int(rng.integers(1, 256))
        try:
            for step in read_trace(write(path, bytes(changed))).steps:
                step.load()
        except TraceError:
            refusals += 1
    assert refusals > end // 10


def test_hostile_lengths_allocate_nothing(tmp_path: Path) -> None:
    """A few bytes that claim arrays and tensors of terabytes."""
    import tracemalloc

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    array = start + string(b"a") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(64)
    strings = start + string(b"a") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(64)
    nested = start + string(b"a") + struct.pack("<IIQ", 9, 9, 2) + bytes(64)
    text = start + string(b"a") + struct.pack("<IQ", 8, 2**40) + bytes(64)
    entry = start + string(b"a") + struct.pack("<II", 4, 1)
    shape = string(b"t") + struct.pack("<IQQ", 2, 2**33, 2**33) + struct.pack("<IQ", 0, 0)
    wide = string(b"t") + struct.pack("<I", 2**31) + bytes(64)
    zero = string(b"t") + struct.pack("<IQ", 1, 0) + struct.pack("<IQ", 0, 0)
    far = string(b"t") + struct.pack("<IQ", 1, 8) + struct.pack("<IQ", 0, 2**62)
    tracemalloc.start()
    for data in (array, strings, nested, text, *(entry + one for one in (shape, wide, zero, far))):
        refused(write(tmp_path / "bad.gguf", data + bytes(64)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


def set_to(role: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Callable[..., None]:
    def change(header: TraceHeader, tensors: dict[str, Any]) -> None:
        tensors[role] = np.zeros(shape, dtype)

    return change


def layer_is(*info: Any) -> Callable[..., None]:
    return lambda header, tensors: header.layers.update({0: LayerInfo(*info)})


MISFITS: dict[str, tuple[Callable[[TraceHeader, dict[str, Any]], Any], str]] = {
    "no_mask": (lambda header, tensors: tensors.pop("mask"), "lacks the role mask"),
    "no_v_quant": (set_to("k_quant", (2, 4, 18), np.uint8), "lacks the role v_quant"),
    "mask": (set_to("mask", (3, 6)), "does not fit"),
    "mask_rows": (set_to("mask", (2, 5)), "does not fit"),
    "k": (set_to("k", (3, 5, 32)), "does not fit"),
    "v": (set_to("v", (2, 6, 64)), "does not fit"),
    "q": (set_to("q", (3, 4, 32)), "does not fit"),
    "out": (set_to("kqv_out", (3, 255)), "does not fit"),
    "out_q4_0": (set_to("kqv_out", (3, 144), np.uint8), "only keys and values"),
    "heads": (layer_is(4, 3, 32, 64, 0.2), "claims 4 query and 3 kv heads"),
    "no_heads": (layer_is(4, 0, 32, 64, 0.2), "head_count_kv holds 0; 1 to 65536"),
    "scale": (layer_is(4, 2, 32, 64, float("nan")), "not finite"),
    "cap": (layer_is(4, 2, 32, 64, 0.2, -1.0), "soft cap"),
    "sinks": (layer_is(4, 2, 32, 64, 0.2, 0.0, (1.0,)), "sinks.0 has 1 values for 4"),
    "layer": (
        lambda header, tensors: header.layers.update({1: header.layers.pop(0)}),
        "layer 0, which is not described",
    ),
    "cache": (lambda header, tensors: setattr(header, "cache", "odd"), "standard or mixed"),
    "positions": (
        lambda header, tensors: header.positions.update({1: np.arange(4)}),
        "4 positions for 5 keys",
    ),
    "positions_negative": (
        lambda header, tensors: header.positions.update({1: np.arange(5) - 2}),
        "positions.1 holds -2; -1 to",
    ),
    "mixed_without_cold": (
        lambda header, tensors: setattr(header, "cache", "mixed"),
        "lacks the role k_quant, in a trace of a mixed cache",
    ),
    "standard_with_cold": (
        lambda header, tensors: with_cold(header, tensors, "standard"),
        "has the role k_quant, in a trace of a standard cache",
    ),
    "positions_of_hot_alone": (
        lambda header, tensors: (
            with_cold(header, tensors),
            header.positions.update({1: np.arange(5)}),
        ),
        "positions of the hot keys are there, of the cold not",
    ),
    "positions_of_cold_alone": (
        lambda header, tensors: (
            with_cold(header, tensors),
            header.positions_quant.update({1: np.arange(4)}),
        ),
        "positions of the cold keys are there, of the hot not",
    ),
    "step_tokens": (
        lambda header, tensors: header.step_tokens.append(2),
        "has 3 queries, kqv_trace.step_tokens says 2 tokens",
    ),
    "tokens": (
        lambda header, tensors: (header.step_tokens.append(3), header.tokens.append(1)),
        "step_tokens counts 3 tokens, kqv_trace.tokens has 1",
    ),
}


def with_cold(header: TraceHeader, tensors: dict[str, Any], cache: str = "mixed") -> None:
    header.cache = cache
    tensors["k_quant"] = np.zeros((2, 4, 18), np.uint8)
    tensors["v_quant"] = np.zeros((2, 4, 36), np.uint8)
    tensors["mask_quant"] = np.full((3, 4), -np.inf, np.float16)


def test_step_tokens_that_end_too_early_are_refused(tmp_path: Path) -> None:
    recorded = record(layers=(1,), steps=2)
    recorded.header.tokens, recorded.header.step_tokens = [], recorded.header.step_tokens[:2]
    path = saved(tmp_path / "t.gguf", recorded)
    assert "step_tokens tells of 2 steps alone" in refused(path)


@pytest.mark.parametrize("name", MISFITS)
def test_trace_whose_parts_do_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    change, message = MISFITS[name]
    path = hand_made(tmp_path / "t.gguf", change)
    with pytest.raises(TraceError, match=message):
        read_trace(path)
    refused(path)


def test_foreign_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "not a trace" in refused(path)
    assert "No such file" in refused(tmp_path / "none.gguf")
    refused(tmp_path)


def test_other_tensor_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "other-tool")
    for role in ("kqv_out", "q", "k", "v", "mask"):
        writer.add_tensor(f"{role}-0_step_1", np.zeros((1, 2, 4), np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "a trace holds f32, f16, q4_0" in refused(path)
