"""Metadata that nobody vouches for: every entry of a trace in turn is another thing."""

from __future__ import annotations

import re
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

from hostile_traces import refused, rewritten, write  # noqa: E402
from mixedkv.tools.trace import LayerInfo, TraceHeader  # noqa: E402
from mixedkv.tools.trace.gguf_file import read_gguf  # noqa: E402
from test_trace import call, hand_made  # noqa: E402

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
