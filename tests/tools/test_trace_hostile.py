"""Traces that nobody vouches for: read, or refused in one line, and never at any cost."""

from __future__ import annotations

import math
import os
import re
import struct
import subprocess
import sys
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

from mixedkv.tools.trace import LayerInfo, TraceError, TraceHeader, read_trace  # noqa: E402
from mixedkv.tools.trace.gguf_file import num_bytes, read_gguf  # noqa: E402
from test_trace import call, hand_made, record, saved  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    return saved(path, record(mixed=True, layers=(0,), steps=1)).read_bytes()


def refused(path: Path) -> str:
    """The one line with which verify ends, status 2."""
    result = call("verify", "-i", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mixedkv: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


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


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


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


# GGUF's numbers of types, by what a value is in Python.
KINDS = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


def encoded(value: Any) -> bytes:
    """A value of a GGUF entry with its type: str, list of str, numpy scalar, numpy array."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    array = np.asarray(value)
    kind = struct.pack("<I", KINDS[array.dtype.name])
    if array.ndim:
        kind = struct.pack("<I", 9) + kind + struct.pack("<Q", array.size)
    return kind + array.tobytes()


def rewritten(path: Path, changes: dict[str, Any], alignment: int = 32) -> Path:
    """A GGUF file with other metadata (None: without the entry), and its tensors as they were."""
    file = read_gguf(path)
    arrays = [
        np.fromfile(path, np.uint8, num_bytes(one.type, math.prod(one.ne)), offset=one.offset)
        for one in file.tensors
    ]
    entries = {**file.metadata, **changes}
    single = {"kqv_trace.version": np.uint32(1)}
    out = bytearray()
    count = 0
    for key, value in entries.items():
        if value is None:
            continue
        value = single[key] if key in single and key not in changes else value
        out += struct.pack("<Q", len(key)) + key.encode() + encoded(value)
        count += 1
    offset = 0
    for tensor, array in zip(file.tensors, arrays, strict=True):
        out += struct.pack("<Q", len(tensor.name)) + tensor.name.encode()
        out += struct.pack("<I", len(tensor.ne)) + struct.pack(f"<{len(tensor.ne)}Q", *tensor.ne)
        out += struct.pack("<IQ", tensor.type, offset)
        offset += -(-array.nbytes // alignment) * alignment
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(arrays), count)) + out
    for array in arrays:
        out += bytes(-len(out) % alignment) + array.tobytes()
    return write(path, bytes(out))


F64_HUGE = np.array([1e300])
U64_HUGE = np.array([2**64 - 1], np.uint64)
MANY = "a trace, " * 100_000

METADATA: dict[str, tuple[str, Any, str]] = {
    "version_array": ("version", np.array([1], np.uint32), "version must be an integer"),
    "version_empty": ("version", np.zeros(0, np.uint32), "version must be an integer"),
    "version_text": ("version", "1", "version must be an integer, got '1'"),
    "version_long": ("version", MANY, "version must be an integer"),
    "version_bool": ("version", np.bool_(True), "version must be an integer"),
    "version_float": ("version", np.float32(1), "version must be an integer"),
    "version_huge": ("version", np.uint64(2**64 - 1), "of version 18446744073709551615"),
    "version_negative": ("version", np.int32(-1), "of version -1"),
    "cache_array": ("cache", ["standard"], "cache must be a string"),
    "cache_long": ("cache", MANY, "cache must be standard or mixed"),
    "engine_number": ("engine", np.int32(3), "engine must be a string"),
    "model_lacks": ("model", None, "lacks the metadata kqv_trace.model"),
    "layers_text": ("layers", "0", "layers must be an array of integers"),
    "layers_texts": ("layers", ["0"], "layers must be an array of integers"),
    "layers_single": ("layers", np.int32(0), "layers must be an array of integers"),
    "layers_float": ("layers", np.zeros(1, np.float32), "layers must be an array of integers"),
    "layers_negative": ("layers", np.array([-1], np.int32), "layers holds -1"),
    "layers_huge": ("layers", U64_HUGE, "layers holds 18446744073709551615"),
    "layers_twice": ("layers", np.zeros(2, np.int32), "names a layer twice"),
    "layers_none": ("layers", np.zeros(0, np.int32), "head_count has 1 values for 0"),
    "heads_huge": ("head_count", U64_HUGE, "head_count holds 18446744073709551615"),
    "heads_negative": ("head_count", np.array([-4], np.int64), "head_count holds -4"),
    "heads_text": ("head_count", ["4"], "head_count must be an array of integers"),
    "heads_none": ("head_count", np.zeros(0, np.int32), "head_count has 0 values for 1"),
    "width_huge": ("key_length", np.array([2**31 - 1], np.int32), "key_length holds 2147483647"),
    "width_zero": ("value_length", np.zeros(1, np.int32), "value_length holds 0"),
    "scale_huge": ("sm_scale", F64_HUGE, "sm_scale holds 1e\\+300, which is out of float32"),
    "scale_tiny": ("sm_scale", np.array([1e-300]), "sm_scale holds 1e-300, which is out of"),
    "scale_inf": ("sm_scale", np.array([np.inf], np.float32), "sm_scale holds .* not finite"),
    "scale_text": ("sm_scale", ["0.2"], "sm_scale must be an array of floats"),
    "scale_integer": ("sm_scale", np.array([1], np.int32), "sm_scale must be an array of floats"),
    "scale_single": ("sm_scale", np.float32(0.2), "sm_scale must be an array of floats"),
    "scales": ("sm_scale", np.ones(2, np.float32), "sm_scale has 2 values for 1"),
    "cap_huge": ("logits_soft_cap", F64_HUGE, "logits_soft_cap holds 1e\\+300, which is out of"),
    "cap_tiny": ("logits_soft_cap", np.array([1e-300]), "logits_soft_cap holds 1e-300, which"),
    "cap_nan": ("logits_soft_cap", np.array([np.nan]), "logits_soft_cap holds .* not finite"),
    "sinks_huge": ("sinks.0", np.full(4, -1e300), "sinks.0 holds -1e\\+300, which is out of"),
    "sinks_inf": ("sinks.0", np.full(4, -np.inf), "sinks.0 holds .* not finite"),
    "sinks_text": ("sinks.0", ["1"] * 4, "sinks.0 must be an array of floats"),
    "window": ("window_left", np.array([-2], np.int32), "window_left holds -2"),
    "window_huge": ("window_left", U64_HUGE, "window_left holds 18446744073709551615"),
    "windows": ("window_left", np.zeros(2, np.int32), "window_left has 2 values for 1"),
    "names_numbers": ("tensor.names", np.zeros(5, np.int32), "names must be an array of strings"),
    "names_twice": ("tensor.names", ["Q-0_step_1"] * 5, "is not there .or named twice."),
    "names_unknown": ("tensor.names", ["\x1b[2J"] * 5, r"the tensor '\\x1b\[2J' is named"),
    "roles_numbers": ("tensor.roles", np.zeros(5, np.int32), "roles must be an array of strings"),
    "roles_unknown": ("tensor.roles", ["k\n"] * 5, r"has the unknown role 'k\\n'"),
    "roles_few": ("tensor.roles", ["k"], "tensor.roles has 1 values for 5"),
    "of_layers": ("tensor.layers", np.full(5, -1, np.int32), "tensor.layers holds -1"),
    "of_steps": ("tensor.steps", np.zeros(5, np.int32), "tensor.steps holds 0"),
    "of_steps_huge": ("tensor.steps", np.repeat(U64_HUGE, 5), "tensor.steps holds 1844674407"),
    "tokens": ("tokens", np.array([-1], np.int32), "tokens holds -1"),
    "tokens_huge": ("tokens", U64_HUGE, "tokens holds 18446744073709551615"),
    "tokens_text": ("tokens", "hello", "tokens must be an array of integers"),
    "step_tokens": ("step_tokens", np.array([0], np.int32), "step_tokens holds 0"),
    "step_tokens_huge": ("step_tokens", U64_HUGE, "step_tokens holds 18446744073709551615"),
    "positions_huge": ("positions.1", np.repeat(U64_HUGE, 5), "positions.1 holds 18446744"),
    "positions_text": ("positions.1", ["1"] * 5, "positions.1 must be an array of integers"),
    "positions_float": ("positions.1", np.zeros(5), "positions.1 must be an array of integers"),
}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_metadata_gives_one_line(name: str, tmp_path: Path) -> None:
    key, value, message = METADATA[name]
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    said = refused(rewritten(path, {f"kqv_trace.{key}": value}))
    assert re.search(message, said), said
    assert len(said) < 300


def test_rewritten_metadata_is_sound(tmp_path: Path) -> None:
    """What the two tests around this one change is all that is wrong."""
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    for alignment in (32, 1):
        changes = {"general.alignment": np.uint32(alignment)}
        assert call("verify", "-i", rewritten(path, changes, alignment)).exit_code == 0


@pytest.mark.parametrize(
    "value",
    [
        np.uint32(2**32 - 1),
        np.int64(-(2**63)),
        np.bool_(True),
        np.float64(1e300),
        np.array([2**64 - 1], np.uint64),
        np.array([-(2**63)], np.int64),
        np.full(5, 1e300),
        np.full(5, np.nan, np.float32),
        np.zeros(0, np.float32),
        np.ones(5, np.bool_),
        "text",
        ["text"] * 5,
        [],
        None,
    ],
    ids=lambda value: re.sub(r"\W+", "_", f"{type(value).__name__} {value}"),
)
def test_hostile_metadata_never_ends_in_a_traceback(value: Any, tmp_path: Path) -> None:
    """Any entry in turn is another thing: it is refused in a line, or verified."""

    def change(header: TraceHeader, tensors: dict[str, Any]) -> None:
        header.tokens, header.step_tokens = [1, 2, 3, 4, 5], [5]
        header.layers[0] = LayerInfo(4, 2, 32, 64, 0.2, 0.0, (0.0,) * 4, -1)
        tensors["q"] = np.resize(tensors["q"], (4, 5, 32))
        tensors["mask"] = np.zeros((5, 5), np.float16)
        tensors["kqv_out"] = np.zeros((5, 256), np.float32)
        header.positions[1] = np.arange(5)

    path = hand_made(tmp_path / "t.gguf", change)
    data = path.read_bytes()
    keys = [key for key in read_gguf(path).metadata if key.startswith("kqv_trace")]
    assert len(keys) > 15
    refusals = 0
    for key in [*keys, "general.alignment"]:
        result = call("verify", "-i", rewritten(write(path, data), {key: value}), "--isa", "scalar")
        assert result.exit_code in (1, 2), (key, result)
        refusals += result.exit_code == 2
    assert refusals >= (10 if value is None else len(keys) - 4)


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    """A file's own alignment of 1 is legal; kernels want addresses that suit the type."""
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    before = {tensor.name: np.array(tensor.load()) for tensor in read_gguf(path).tensors}
    odd = 0
    for pad in range(4):
        changes = {"general.alignment": np.uint32(1), "general.description": "x" * pad}
        for tensor in read_gguf(rewritten(path, changes, alignment=1)).tensors:
            odd += tensor.offset % 4 != 0
            array = tensor.load()
            assert array.flags.aligned
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array, before[tensor.name])
    assert odd


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


# --- files that are larger than what they hold ----------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def sparse_array(path: Path, count: int) -> Path:
    """One array of so many zeros, which takes a block on disk."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"kqv_trace.tokens")
    write(path, header + struct.pack("<IIQ", 9, 0, count))
    os.truncate(path, path.stat().st_size + count)
    return path


def sparse_trace(path: Path, kv: int, mask_rows: int = 1) -> Path:
    """A step of one query over kv keys of zeros, which takes a block on disk; without roles."""
    width = 64
    shapes: list[tuple[bytes, tuple[int, ...], int]] = [
        (b"kqv_out-0_step_1", (2 * width, 1), 0),
        (b"Q-0_step_1", (width, 1, 2), 0),
        (b"K-0_step_1", (width, kv, 2), 1),
        (b"V-0_step_1", (width, kv, 2), 1),
        (b"mask-0_step_1", (kv, mask_rows), 1),
    ]
    infos, size = b"", 0
    for name, ne, kind in shapes:
        infos += string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, size)
        size += -(-int(np.prod(ne, dtype=np.int64)) * (4 >> kind) // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 0) + infos
    write(path, header + bytes(-len(header) % 32))
    os.truncate(path, path.stat().st_size + size)
    return path


def test_hostile_sparse_metadata_allocates_nothing(tmp_path: Path) -> None:
    import tracemalloc

    tracemalloc.start()
    said = refused(sparse_array(tmp_path / "t.gguf", 1 << 30))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "claims 1073741824 values in 'kqv_trace.tokens'; at most 4194304 are read" in said
    assert peak < 50_000_000


def test_hostile_metadata_is_bounded_in_all(tmp_path: Path) -> None:
    """Arrays that are each legal, and too many of them."""
    import tracemalloc

    path, count, length = tmp_path / "t.gguf", 64, 1 << 22
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, count)
    with path.open("wb") as file:
        file.write(header)
        for index in range(count):
            file.write(string(f"kqv_trace.positions.{index}".encode()))
            file.write(struct.pack("<IIQ", 9, 5, length))
            file.seek(4 * length, os.SEEK_CUR)
        file.truncate()
    tracemalloc.start()
    assert "has more than 134217728 bytes of metadata" in refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000_000


def test_hostile_sparse_step_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of 4 GiB in a file that takes a block on disk, where 8 GiB are free."""
    import tracemalloc

    monkeypatch.setattr("mixedkv.tools.trace.room.available", lambda: 8.0 * 2**30)
    path = sparse_trace(tmp_path / "t.gguf", 1 << 23)
    assert path.stat().st_size > 4 << 30
    small = sparse_trace(tmp_path / "small.gguf", 8)
    tracemalloc.start()
    said = refused(path)
    assert re.search(r"step 1 of layer 0 would take \d+ GiB of memory to verify", said)
    assert "4 GiB that are half of what is free" in said
    result = call("verify", "-i", small, "--reference", path)
    assert result.exit_code == 2
    assert "would take" in result.stderr
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert call("verify", "-i", small).exit_code == 0


MEASURED = """
import re, sys
from pathlib import Path
from mixedkv.tools.trace import read_trace
from mixedkv.tools.trace.room import step_bytes
from mixedkv.tools.trace.verify import verify

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

small, large = (read_trace(Path(name)) for name in sys.argv[1:])
verify(small)
before = peak()
verify(large)
print(peak() - before, step_bytes(large.steps[0]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of the peak")
def test_verifying_takes_no_more_than_is_reckoned(tmp_path: Path) -> None:
    """The bound that decides whether a step may be read holds for what is taken then."""
    paths = sparse_trace(tmp_path / "s.gguf", 8), sparse_trace(tmp_path / "l.gguf", 1 << 17)
    said = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)],
        capture_output=True,
        check=True,
        text=True,
    )
    taken, reckoned = map(int, said.stdout.split())
    assert reckoned / 8 < taken < reckoned


def test_rows_that_are_kept_are_reckoned_once_for_each_token(tmp_path: Path) -> None:
    from mixedkv.tools.trace.room import kept_bytes

    recorded = record(mixed=True, layers=(0, 2), steps=3)
    steps = read_trace(saved(tmp_path / "t.gguf", recorded)).steps
    tokens = sum(recorded.header.step_tokens)
    assert kept_bytes(steps) == 2 * tokens * 2 * (32 + 32) * 2  # layers, tokens, heads, values, f16
    assert kept_bytes([step for step in steps if step.layer == 2]) * 2 == kept_bytes(steps)
    assert kept_bytes(read_trace(sparse_trace(tmp_path / "s.gguf", 8)).steps) == 0


def test_rows_of_padding_in_a_mask_are_not_read(tmp_path: Path) -> None:
    """A plain file's mask may have more rows than there are queries."""
    import tracemalloc

    step = read_trace(sparse_trace(tmp_path / "t.gguf", 64, mask_rows=1 << 20)).steps[0]
    tracemalloc.start()
    assert step.load().mask.shape == (1, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    os.mkfifo(path)
    assert "is not a regular file" in refused(path)
