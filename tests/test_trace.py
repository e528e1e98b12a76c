"""Traces: what is recorded from a model, and reading files that nobody vouches for."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
gguf = pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
import reference as ref  # noqa: E402
from mixedkv import models  # noqa: E402
from mixedkv.cli import app  # noqa: E402
from mixedkv.trace import (  # noqa: E402
    LayerInfo,
    RecordedStep,
    TraceError,
    TraceHeader,
    read_trace,
    write_trace,
)
from mixedkv.trace import record as recording  # noqa: E402
from mixedkv.trace.gguf_file import read_gguf  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

mkt.register()
runner = CliRunner()

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "attn_implementation": "mixedkv",
}
PROMPT = [int(token) for token in np.random.default_rng(7).integers(3, 100, 21)]


def make_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    elif name == "gemma2":
        config = transformers.Gemma2Config(
            **SIZES,
            sliding_window=9,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=40,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        model = transformers.Gemma2ForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            **SIZES,
            sliding_window=9,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        model = transformers.GptOssForCausalLM(config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model.eval()


def record(name: str = "llama", **settings: Any) -> recording.Recording:
    options = {"hot_size": 16, "group_size": 4, **settings}
    return recording.record(make_model(name), PROMPT, recording.Settings(**options), title=name)


def saved(path: Path, recorded: recording.Recording) -> Path:
    write_trace(path, recorded.header, recorded.steps)
    return path


class CountingTokenizer:
    """Token i for the i-th word."""

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [3 + i % 90 for i, _ in enumerate(text.split())]}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.LoadedModel("tiny", make_model(), CountingTokenizer())
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)


def call(*arguments: Any) -> Any:
    return runner.invoke(app, [str(one) for one in arguments], catch_exceptions=False)


# --- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ([], 25),
        (["--mixed-kv-cache", "--hot-size", "16"], 35),
        (["--mixed-kv-cache", "--hot-size", "16", "--second-mask"], 40),
    ],
    ids=["standard", "mixed", "second_mask"],
)
@pytest.mark.usefixtures("tiny")
def test_trace_chain_from_model_to_verdict(
    options: list[str], tensors: int, tmp_path: Path
) -> None:
    """One prompt and four decode steps of one layer, through the command line."""
    path = tmp_path / "t.gguf"
    result = call("trace", "--layer", "1", "--prompt-tokens", "30", "-o", path, *options)
    assert result.exit_code == 0
    assert f"{tensors} tensors of 5 steps and 1 layers" in result.stdout
    for words in ("kqv_out-1_step_1", "Q-1_step_5", "mean", "std", "min", "max"):
        assert words in result.stdout
    assert len(gguf.GGUFReader(path).tensors) == tensors
    verdict = call("verify", "-i", path, "--shapes", "--show-data", "3")
    assert verdict.exit_code == 0, verdict.stdout
    assert "PASS: 5 of 5 steps in tolerance" in verdict.stdout
    assert ("cost of quantisation" in verdict.stdout) == bool(options)


def test_trace_has_names_order_and_shapes_of_the_format(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", record(mixed=True, layers=(2,), second_mask=True, steps=1))
    n, new = len(PROMPT), 1
    reader = gguf.GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    kinds = ["kqv_out", "Q", "K", "V", "mask", "K_quant", "V_quant", "mask_quant"]
    assert names == [f"{kind}-2_step_{step}" for step in (1, 2) for kind in kinds]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["kqv_out-2_step_1"] == [32 * 4, n]
    assert shapes["Q-2_step_1"] == [32, n, 4]
    assert shapes["K-2_step_1"] == [32, n, 2]
    assert shapes["mask-2_step_1"] == [n, n]
    assert shapes["K_quant-2_step_1"] == [32, 1, 2]  # no key was cold: one masked cell
    hot = shapes["K-2_step_2"][1]
    cold = shapes["K_quant-2_step_2"][1]
    assert hot + cold == n + new
    assert shapes["mask-2_step_2"] == [hot, new]
    assert shapes["mask_quant-2_step_2"] == [cold, new]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["K-2_step_2"] == types["V-2_step_2"] == "F16"
    assert types["K_quant-2_step_2"] == types["V_quant-2_step_2"] == "Q4_0"
    assert types["Q-2_step_2"] == types["kqv_out-2_step_2"] == "F32"


def test_trace_holds_the_models_own_numbers(tmp_path: Path) -> None:
    """Keys, queries and outputs as transformers' own eager attention has them."""
    path = saved(tmp_path / "t.gguf", record(steps=2, k_type="f32", v_type="f32"))
    trace = read_trace(path)
    model = make_model()
    model.set_attn_implementation("eager")
    assert trace.header is not None
    tokens = torch.tensor([trace.header.tokens])
    assert trace.header.tokens[: len(PROMPT)] == PROMPT
    assert trace.header.step_tokens == [len(PROMPT), 1, 1]
    cache = transformers.DynamicCache()
    outputs: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: outputs.append(inputs[0].detach())
        )
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    for step in trace.steps:
        data = step.load()
        first = sum(trace.header.step_tokens[: step.step - 1])
        k = cache.layers[step.layer].keys[0].numpy()[:, : first + step.n]
        np.testing.assert_allclose(data.k, k, atol=1e-4, rtol=1e-4)
        want = outputs[step.layer][0, first : first + step.n].numpy()
        np.testing.assert_allclose(data.out.reshape(step.n, -1), want, atol=1e-4, rtol=1e-4)


def test_trace_of_a_mixed_cache_holds_each_token_once(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path / "t.gguf", record(mixed=True, steps=6)))
    hot_then: dict[tuple[int, int], np.ndarray] = {}
    cold_rows = 0
    for step in trace.steps:
        data = step.load()
        assert step.positions is not None
        assert step.positions_quant is not None
        held = [*step.positions, *(p for p in step.positions_quant if p >= 0)]
        assert sorted(held) == list(range(len(PROMPT) + step.step - 1))
        for index, position in enumerate(step.positions.tolist()):
            hot_then[step.layer, position] = np.array(data.k[:, index])
        assert data.k_quant is not None
        for index, position in enumerate(step.positions_quant.tolist()):
            if position >= 0:
                want = ref.quantize_q4_0(hot_then[step.layer, position])
                np.testing.assert_array_equal(data.k_quant[:, index], want)
                cold_rows += 1
    assert cold_rows > 100


def test_trace_seed_decides_sampled_tokens() -> None:
    runs = [record(sample=True, seed=seed, steps=6).header.tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_trace_observer_changes_nothing() -> None:
    model = make_model()
    tokens = torch.tensor([PROMPT])
    logits = []
    for observe in (False, True):
        cache = mkt.MixedCache(model.config, hot_size=32, cold_size=32, n_pad=16)
        seen: list[mkt.Observation] = []
        cache.observer = seen.append if observe else None
        with torch.no_grad():
            logits.append(model(tokens, past_key_values=cache).logits)
        assert [one.layer for one in seen] == ([0, 1, 2] if observe else [])
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (3,)}, "layer 3 is none of the model's, 0 to 2"),
        ({"mixed": True, "hot_size": 4, "sinks": 9}, "sinks"),
    ],
    ids=["layer", "sinks"],
)
def test_trace_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**settings)


@pytest.mark.usefixtures("tiny")
def test_trace_json_is_one_object(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    result = call("trace", "-o", path, "-p", "a b c d", "-n", "2", "--json")
    found = json.loads(result.stdout)
    assert found["step_tokens"] == [4, 1, 1]
    assert found["tensors"] == 5 * 3 * 3
    assert found["layers"] == [0, 1, 2]


LOGGED = re.compile(
    r"\[LAYOUT_DEBUG\] (?P<what>.+): (?P<dtype>\w+) shape=\((?P<shape>[\d, ]*)\) "
    r"strides=\((?P<strides>[\d, ]*)\) mean=(?P<mean>\S+) std=(?P<std>\S+)"
)


@pytest.mark.parametrize("at", [0, -1], ids=["prompt", "decode"])
def test_trace_debug_logs_each_layout(
    at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After each permute or conversion: what the array really is then."""
    import logging

    caplog.set_level(logging.DEBUG, "mixedkv.trace.layout")
    recorded = record(mixed=True, layers=(1,), steps=2)
    while_recording = list(caplog.records)
    caplog.clear()
    path = saved(tmp_path / "t.gguf", recorded)
    call("verify", "-i", path, "--isa", "scalar")
    while_verifying = list(caplog.records)
    tensors = recorded.steps[at].tensors
    n, hot = tensors["q"].shape[1], tensors["k"].shape[1]
    cold = tensors["k_quant"].shape[1]
    kv = cold + hot

    def logged(records: list[Any], what: str) -> dict[str, Any]:
        lines = [LOGGED.fullmatch(one.getMessage()) for one in records]
        assert all(lines)
        found = [line for line in lines if line is not None and line["what"] == what][at]
        numbers = {
            key: tuple(int(part) for part in found[key].split(",") if part.strip())
            for key in ("shape", "strides")
        }
        return {"dtype": found["dtype"], "mean": found["mean"], "std": found["std"], **numbers}

    def is_of(found: dict[str, Any], dtype: str, array: np.ndarray, strides: Any = None) -> None:
        assert found["dtype"] == dtype
        assert found["shape"] == array.shape
        assert found["strides"] == (array.strides if strides is None else strides)
        values = ref.dequantize_q4_0(array) if array.dtype == np.uint8 else array
        values = values[np.isfinite(values)].astype(np.float64)
        assert float(found["mean"]) == pytest.approx(values.mean(), rel=1e-5, abs=1e-7)
        assert float(found["std"]) == pytest.approx(values.std(), rel=1e-5, abs=1e-7)

    out = tensors["kqv_out"]
    for what, dtype, array in (
        ("Q, the model's [1, head, query, dim]", "float32", tensors["q"][None]),
        ("Q [head, query, dim]", "float32", tensors["q"]),
        ("kqv_out, the op's [1, query, head, dim]", "float32", out.reshape(1, n, 4, 32)),
        ("kqv_out [query, head * dim]", "float32", out),
        ("K [kv head, key, dim], hot", "float16", tensors["k"]),
        ("V [kv head, key, dim], hot", "float16", tensors["v"]),
        ("K_quant [kv head, key, dim], cold", "uint8", tensors["k_quant"]),
        ("V_quant [kv head, key, dim], cold", "uint8", tensors["v_quant"]),
        ("mask [query, key]", "float16", tensors["mask"]),
    ):
        found = logged(while_recording, what)
        is_of(found, dtype, array, found["strides"] if "model's" in what else None)

    joined = {
        letter: np.concatenate(
            [ref.dequantize_q4_0(tensors[f"{letter}_quant"]), tensors[letter].astype(np.float32)], 1
        )
        for letter in "kv"
    }
    wanted = out.reshape(n, 4, 32)
    for what, dtype, array in (
        ("K as float32", "float32", joined["k"][:, cold:].copy()),
        ("V as float32", "float32", joined["v"][:, cold:].copy()),
        ("K_quant dequantised", "float32", joined["k"][:, :cold].copy()),
        ("V_quant dequantised", "float32", joined["v"][:, :cold].copy()),
        ("Q [head, query, dim]", "float32", tensors["q"]),
        ("K, cold then hot", "float32", joined["k"]),
        ("V, cold then hot", "float32", joined["v"]),
        ("mask, cold then hot", "float32", tensors["mask"].astype(np.float32)),
    ):
        is_of(logged(while_verifying, what), dtype, array)
    assert logged(while_verifying, "K, cold then hot")["shape"] == (2, kv, 32)
    # A permutation keeps mean and std, and turns shape and strides.
    for who, dtype, size in (("PyTorch's", "float64", 8), ("mixedkv's", "float32", 4)):
        before = logged(while_verifying, f"{who} [head, query, dim]")
        after = logged(while_verifying, f"{who} [query, head, dim]")
        assert before["shape"] == (4, n, 32)
        assert before["strides"] == (n * 32 * size, 32 * size, size)
        assert after["shape"] == (n, 4, 32)
        assert after["strides"] == (32 * size, n * 32 * size, size)
        assert before["dtype"] == after["dtype"] == dtype
        assert (before["mean"], before["std"]) == (after["mean"], after["std"])
    after = logged(while_verifying, "mixedkv's [query, head, dim]")
    assert float(after["mean"]) == pytest.approx(wanted.mean(), rel=1e-3)
    assert float(after["std"]) == pytest.approx(wanted.std(), rel=1e-3)


@pytest.mark.usefixtures("tiny")
def test_trace_debug_option_speaks_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    logger = logging.getLogger("mixedkv.trace.layout")
    before = logger.level, logger.propagate
    monkeypatch.setattr(logger, "handlers", [])
    path = tmp_path / "t.gguf"
    try:
        quiet = call("trace", "-o", path, "-p", "a b c", "-n", "0")
        said = call("trace", "-o", path, "-p", "a b c", "-n", "0", "--debug")
    finally:
        logger.level, logger.propagate = before
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert "LAYOUT_DEBUG" not in quiet.stderr + quiet.stdout
    assert "[LAYOUT_DEBUG] Q [head, query, dim]: float32 shape=(4, 3, 32)" in said.stderr
    assert "LAYOUT_DEBUG" not in said.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "vllm"],
        ["-ctk", "q9"],
        ["--layer", "x"],
        ["--layer", "5-3"],
        ["--second-mask"],
        ["--engine", "llama.cpp", "--mixed-kv-cache"],
        ["-n", "-1"],
        ["-p", ""],
        ["--layer", "7"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("tiny")
def test_trace_wrong_use_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    result = call("trace", "-o", path, *arguments)
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
    assert call("trace", "-o", tmp_path / "no" / "folder.gguf").exit_code == 2


# --- files of other tools -------------------------------------------------------------------------


def plain_file(path: Path, count: int, names: Callable[[int, int, str], str]) -> Path:
    """A file without metadata: two steps of `count` tensors in the order of the format."""
    recorded = record(mixed=count > 5, second_mask=count == 8, layers=(1,), steps=1)
    writer = gguf.GGUFWriter(path, "other-tool")
    order = ["kqv_out", "q", "k", "v", "mask", "k_quant", "v_quant", "mask_quant"][:count]
    for one in recorded.steps:
        for role in order:
            array = np.ascontiguousarray(one.tensors[role])
            kind = gguf.GGMLQuantizationType.Q4_0 if array.dtype == np.uint8 else None
            writer.add_tensor(names(one.step, one.layer, role), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("count", [5, 7, 8])
@pytest.mark.parametrize(
    "names",
    [
        lambda step, layer, role: f"{role}-{layer}_step_{step}",
        lambda step, layer, role: f"{role}{'' if 'mask' in role else f'-{layer}'}_step_{step}",
        lambda step, layer, role: f"{role} {step}",
    ],
    ids=["named", "mask_without_layer", "by_order"],
)
def test_plain_traces_are_read_by_order(
    count: int, names: Callable[[int, int, str], str], tmp_path: Path
) -> None:
    path = plain_file(tmp_path / "p.gguf", count, names)
    trace = read_trace(path)
    assert trace.header is None
    assert [(step.step, len(step.tensors)) for step in trace.steps] == [(1, count), (2, count)]
    assert call("verify", "-i", path).exit_code == 0
    assert call("verify", "-i", path, "--sm-scale", "0.5").exit_code == 1


# --- hostile files --------------------------------------------------------------------------------


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


def hand_made(path: Path, change: Callable[[TraceHeader, dict[str, Any]], None]) -> Path:
    """A small sound trace, then changed."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    header = TraceHeader("test", "1", "none", "standard", layers={0: LayerInfo(4, 2, 32, 64, 0.2)})
    tensors: dict[str, Any] = {
        "q": normal(4, 3, 32),
        "k": normal(2, 5, 32).astype(np.float16),
        "v": normal(2, 5, 64).astype(np.float16),
        "mask": np.zeros((3, 5), np.float16),
    }
    tensors["kqv_out"] = np.ascontiguousarray(
        np.asarray(mkv.attention(tensors["q"], tensors["k"], tensors["v"], sm_scale=0.2)).transpose(
            1, 0, 2
        )
    ).reshape(3, 256)
    change(header, tensors)
    write_trace(path, header, [RecordedStep(0, 1, tensors)])
    return path


def test_hand_made_trace_passes(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    assert call("verify", "-i", path).exit_code == 0


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
    arrays = [np.array(tensor.load()) for tensor in file.tensors]
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


def test_rewriting_a_trace_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = record(layers=(1,), steps=1)
    recorded.header.notes["purpose"] = "a test"
    first = read_trace(saved(tmp_path / "a.gguf", recorded))
    assert first.header is not None
    steps = [
        RecordedStep(
            one.layer,
            one.step,
            {role: np.array(tensor.load()) for role, tensor in one.tensors.items()},
        )
        for one in first.steps
    ]
    write_trace(tmp_path / "b.gguf", first.header, steps)
    assert not caplog.records
    second = read_trace(tmp_path / "b.gguf")
    assert second.header is not None
    assert second.header.notes == first.header.notes
    assert second.header.notes["purpose"] == "a test"
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    first.header.notes["engine"] = "another"
    with pytest.raises(ValueError, match="a note can't be named 'engine'"):
        write_trace(tmp_path / "c.gguf", first.header, steps)


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


def test_write_trace_gives_a_file_that_others_may_read(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", b"")
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    assert path.stat().st_mode == plain.stat().st_mode


def test_write_trace_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trace holds float32"):
        hand_made(tmp_path / "t.gguf", set_to("q", (4, 3, 32), np.int32))
    assert not list(tmp_path.iterdir())
