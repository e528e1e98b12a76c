"""Traces of keys and values in every format of the table: recorded, written, read, verified."""

from __future__ import annotations

import json
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

import mixedkv as mkv  # noqa: E402
import reference as ref  # noqa: E402
from hostile_traces import refused, rewritten  # noqa: E402
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.trace import (  # noqa: E402
    LayerInfo,
    RecordedStep,
    TraceError,
    TraceHeader,
    llamacpp,
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.gguf_file import BYTES  # noqa: E402
from mixedkv.tools.trace.stored import copied, data_of, of_format  # noqa: E402
from mixedkv.tools.trace.verify import verify  # noqa: E402
from test_trace import CountingTokenizer, call, make_model, record, saved  # noqa: E402

FORMATS = mkv.formats.available()
#: Whose rows GGUF has no type for.
OPAQUE = [name for name in FORMATS if mkv.formats.info(name).ggml_type is None]
BLOCKS = [name for name in FORMATS if mkv.formats.info(name).block_values > 1]
#: A head of it holds whole blocks of every format.
WIDTH = 64
SIZES = {"head_dim": WIDTH, "num_hidden_layers": 1}

#: Where the format stands -> settings of a recording with it.
TIERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "standard": lambda name: {"k_type": name, "v_type": name},
    "hot": lambda name: {"k_type": name, "v_type": name, "mixed": True},
    "cold": lambda name: {"cold_k_type": name, "cold_v_type": name, "mixed": True},
}


def recorded_in(name: str, tier: str) -> recording.Recording:
    return record(sizes=SIZES, steps=3, **TIERS[tier](name))


def values_of(rows: Any, name: str) -> np.ndarray:
    """float32, by no code of the extension."""
    if name in ref.PACKED:
        return ref.PACKED[name][1](np.asarray(data_of(rows)))
    return np.asarray(rows, np.float32)


# --- from a model to a verdict ------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", FORMATS)
def test_trace_is_recorded_and_verified(name: str, tier: str, tmp_path: Path) -> None:
    recorded = recorded_in(name, tier)
    path = saved(tmp_path / "t.gguf", recorded)
    trace = read_trace(path)
    roles = ("k_quant", "v_quant") if tier == "cold" else ("k", "v")
    for step, one in zip(trace.steps, recorded.steps, strict=True):
        for role in roles:
            tensor, rows = step.tensors[role], one.tensors[role]
            assert tensor.type_name == name
            assert tensor.shape == rows.shape
            np.testing.assert_array_equal(data_of(tensor.load()), data_of(rows))
    result = verify(trace)
    assert result.passed, [step.failures for step in result.steps] + result.failures
    assert set(result.steps[-1].isas) == set(mkv.isa.available())
    # Rows of blocks are attended by the kernels that a cache runs, and held to what these promise.
    assert {step.plain for step in result.steps} == {None}
    assert not any("packed" in words for words in result.remarks)
    cold = "q4_0" if tier == "hot" else name if tier == "cold" else None
    assert result.steps[-1].quantised == (name in BLOCKS or cold in BLOCKS)
    assert result.steps[-1].tolerance[0] == (1e-3 if result.steps[-1].quantised else 2e-5)
    if tier != "standard":
        assert result.rows_followed > 20


@pytest.mark.parametrize("name", FORMATS)
def test_trace_file_is_what_others_read(name: str, tmp_path: Path) -> None:
    """By the gguf package: the format's own type, or bytes whose format the metadata names."""
    recorded = recorded_in(name, "cold")
    reader = gguf.GGUFReader(saved(tmp_path / "t.gguf", recorded))
    rows = recorded.steps[-1].tensors["k_quant"]
    (found,) = [one for one in reader.tensors if one.name == "K_quant-0_step_4"]
    names = reader.fields["kqv_trace.tensor.names"].contents()
    told = reader.fields.get("kqv_trace.tensor.formats")
    if name in OPAQUE:
        assert found.tensor_type.name == "I8"
        data = found.data.view(np.uint8)
        assert told is not None
        assert told.contents()[names.index(found.name)] == name
        assert told.contents()[names.index("Q-0_step_4")] == "f32"
    else:
        assert found.tensor_type.value == mkv.formats.info(name).ggml_type
        data = found.data
        assert told is None
        assert found.shape.tolist() == [WIDTH, rows.shape[1], rows.shape[0]]
        values = gguf.dequantize(found.data, found.tensor_type)
        np.testing.assert_array_equal(values.reshape(rows.shape), values_of(rows, name))
    np.testing.assert_array_equal(data.reshape(data_of(rows).shape), data_of(rows))


@pytest.mark.parametrize("name", FORMATS)
def test_cold_rows_that_changed_are_caught(name: str, tmp_path: Path) -> None:
    """One bit of one row: neither the output nor what was hot fits."""
    planted = recorded_in(name, "cold")
    last = planted.steps[-1].tensors
    rows = copied(last["k_quant"])
    # The bytes' highest bit but one: of a code, or of a float's exponent.
    data_of(rows).view(np.uint8).reshape(*rows.shape[:2], -1)[0, 2, -1] ^= 0x40
    last["k_quant"] = rows
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)), isas=["scalar"])
    assert not result.passed
    assert f"(K) are not the {name} of what they were while hot" in result.failures[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_of_another_program_are_verified(name: str, tmp_path: Path) -> None:
    """Random bytes, which no quantising gives: over plain rows where a cache can't hold them."""
    planted = recorded_in(name, "cold")
    rng = np.random.default_rng(1)
    for step in planted.steps:
        tensors = step.tensors
        for role in ("k_quant", "v_quant"):
            data = data_of(copied(tensors[role]))
            blocks = data.reshape(-1, mkv.formats.info(name).block_bytes)
            blocks[:, 2:] = rng.integers(0, 256, blocks[:, 2:].shape, np.uint8)
            tensors[role] = of_format(data, tensors[role])
        k, v = (
            np.concatenate(
                [values_of(tensors[f"{one}_quant"], name), tensors[one].astype(np.float32)], 1
            )
            for one in "kv"
        )
        mask = tensors["mask"].astype(np.float32)
        out, _ = ref.attention(tensors["q"], k, v, mask=mask)
        out = out.reshape(tensors["q"].shape).transpose(1, 0, 2).reshape(len(mask), -1)
        tensors["kqv_out"] = np.ascontiguousarray(out, np.float32)
    planted.header.positions.clear()
    planted.header.positions_quant.clear()
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)))
    assert result.passed, [step.failures for step in result.steps] + result.failures


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.LoadedModel("wide", make_model(**SIZES), CountingTokenizer())
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", FORMATS)
def test_command_takes_the_formats_types(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    options = ["--prompt-tokens", "20", "-n", "2", "-o", path]
    tiers = ["--mixed-kv-cache", "--hot-size", "16", "--cold-k-type", name, "--cold-v-type", name]
    done = call("trace", *options, *tiers)
    assert done.exit_code == 0, done.stderr
    assert f"K_quant-0_step_3         {name} " in done.stdout
    done = call("verify", "-i", path, "--shapes", "--show-data", "2")
    assert done.exit_code == 0, done.stdout
    assert call("trace", *options, "-ctk", name, "-ctv", name).exit_code == 0
    found = json.loads(call("verify", "-i", path, "--json").stdout)
    assert found["passed"]
    assert found["steps"][0]["quantised"] == (name in BLOCKS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-ctk", "q5_0"], "-ctk: must be one of f32, f16"),
        (["--mixed-kv-cache", "--cold-v-type", "q5_0"], "--cold-v-type: must be one of f32"),
        (["--cold-k-type", "q8_0"], "--cold-k-type: goes with --mixed-kv-cache"),
    ],
    ids=["hot", "cold", "standard"],
)
def test_command_refuses_other_types(options: list[str], says: str, tmp_path: Path) -> None:
    done = call("trace", "-o", tmp_path / "t.gguf", *options)
    assert done.exit_code == 2
    words = " ".join(done.stderr.replace("│", " ").replace("'", " ").split())
    assert " ".join(says.replace(":", " :").split()) in words.replace(":", " :").replace("  ", " ")


# --- files --------------------------------------------------------------------------------------


def by_hand(path: Path, k: Any, v: Any) -> Path:
    """A trace of one step over these rows [2, 5, 64]."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((4, 3, 64), dtype=np.float32)
    out = np.asarray(mkv.attention(q, k, v, sm_scale=0.2)).transpose(1, 0, 2).reshape(3, 256)
    tensors = {"q": q, "k": k, "v": v, "mask": np.zeros((3, 5), np.float16)}
    tensors["kqv_out"] = np.ascontiguousarray(out)
    header = TraceHeader("test", "1", "none", "standard", layers={0: LayerInfo(4, 2, 64, 64, 0.2)})
    write_trace(path, header, [RecordedStep(0, 1, tensors)])
    return path


@pytest.mark.parametrize("name", mkv.formats.packed())
def test_quantized_arrays_are_taken_and_given_back(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    k, v = (mkv.quantize(rng.standard_normal((2, 5, 64), np.float32), name) for _ in range(2))
    path = by_hand(tmp_path / "t.gguf", k, v)
    (step,) = read_trace(path).steps
    data = step.load()
    assert data.k == k
    assert data.v == v
    assert call("verify", "-i", path).exit_code == 0
    strided = by_hand(tmp_path / "s.gguf", mkv.QuantizedArray(k.data[:, ::-1], name)[:, ::-1], v)
    assert strided.read_bytes() == path.read_bytes()


def test_bytes_are_q4_0_for_short(tmp_path: Path) -> None:
    rows = mkv.quantize_q4_0(np.random.default_rng(4).standard_normal((2, 5, 64), np.float32))
    (step,) = read_trace(by_hand(tmp_path / "t.gguf", rows, rows)).steps
    assert step.load().k == mkv.QuantizedArray(rows, "q4_0")


def test_rows_of_no_format_are_refused(tmp_path: Path) -> None:
    rows = np.zeros((2, 5, 64), np.float64)
    header = TraceHeader("test", "1", "none", "standard")
    with pytest.raises(ValueError, match=r"K-0_step_1 is float64; a trace holds float32, float16"):
        write_trace(tmp_path / "t.gguf", header, [RecordedStep(0, 1, {"k": rows})])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def opaque(tmp_path: Path) -> tuple[Path, list[str]]:
    """A trace with K and V that GGUF has no type for, and the formats that it names."""
    if not OPAQUE:
        pytest.skip("GGUF has a type for every format")
    rng = np.random.default_rng(4)
    k, v = (mkv.quantize(rng.standard_normal((2, 5, 64), np.float32), OPAQUE[0]) for _ in range(2))
    path = by_hand(tmp_path / "t.gguf", k, v)
    named = {"k": OPAQUE[0], "v": OPAQUE[0], "mask": "f16"}
    (step,) = read_trace(path).steps
    assert {step.tensors[role].type for role in ("k", "v")} == {BYTES}
    return path, [named.get(role, "f32") for role in ("kqv_out", "q", "k", "v", "mask")]


def test_opaque_rows_need_their_name(opaque: tuple[Path, list[str]]) -> None:
    path, formats = opaque
    key = "kqv_trace.tensor.formats"
    assert call("verify", "-i", rewritten(path, {key: formats})).exit_code == 0
    assert "has ggml type 24; a trace holds f32" in refused(rewritten(path, {key: None}))


@pytest.mark.parametrize(
    ("at", "told", "message"),
    [
        (2, "nl99", "formats says 'nl99' of 'K-0_step_1'; known are f32, f16"),
        (2, "q8_0", "formats says 'q8_0' of 'K-0_step_1', whose type is ggml type 24"),
        (2, "I8", "known are"),
        (2, "", "known are"),
        (1, "f16", "formats says 'f16' of 'Q-0_step_1', whose type is f32"),
        (1, None, "of 'Q-0_step_1', whose type is f32"),
        (2, "x" * 100_000, "known are"),
    ],
)
def test_opaque_rows_of_a_wrong_name_are_refused(
    at: int, told: str | None, message: str, opaque: tuple[Path, list[str]]
) -> None:
    path, formats = opaque
    formats[at] = OPAQUE[0] if told is None else told
    path = rewritten(path, {"kqv_trace.tensor.formats": formats})
    assert message in refused(path)
    with pytest.raises(TraceError):
        read_trace(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["f32"], "tensor.formats has 1 values for 5"),
        (np.arange(5, dtype=np.int32), "tensor.formats must be an array of strings"),
        ("nl4", "tensor.formats must be an array of strings"),
    ],
    ids=["few", "numbers", "text"],
)
def test_formats_that_are_no_list_are_refused(
    value: Any, message: str, opaque: tuple[Path, list[str]]
) -> None:
    assert message in refused(rewritten(opaque[0], {"kqv_trace.tensor.formats": value}))


@pytest.mark.parametrize("name", [one for one in OPAQUE if mkv.formats.info(one).block_bytes > 1])
def test_opaque_rows_are_whole_blocks(name: str, tmp_path: Path) -> None:
    """Bytes of another width are refused before anything is made of them."""
    k = mkv.quantize(np.ones((2, 5, 64), np.float32), name)
    path = by_hand(tmp_path / "t.gguf", k, k)
    data = bytearray(path.read_bytes())
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in ("K-0_step_1", "V-0_step_1"):
            field = tensor.field
            width = field.parts[3]  # name's length, name, number of axes, the axes
            at = field.offset + sum(part.nbytes for part in field.parts[:3])
            data[at : at + 8] = np.uint64(width[0] - 1).tobytes()
    path.write_bytes(data)
    assert f"is {name} with rows of {k.data.shape[-1] - 1} bytes, no multiple of" in refused(path)


@pytest.mark.parametrize("name", FORMATS)
def test_llamacpp_is_asked_for_its_own_types(name: str) -> None:
    if name in OPAQUE:
        with pytest.raises(ValueError, match=f"llama.cpp has no {name}"):
            llamacpp.number_of(name)
    else:
        assert llamacpp.number_of(name) == mkv.formats.info(name).ggml_type
