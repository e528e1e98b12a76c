"""Traces: what is recorded from a model, and reading files that nobody vouches for."""

from __future__ import annotations

import json
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


@pytest.mark.usefixtures("tiny")
def test_trace_debug_logs_each_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("mixedkv.trace.layout")
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        path = tmp_path / "t.gguf"
        assert call("trace", "-o", path, "-p", "a b c", "-n", "0", "--debug").exit_code == 0
        logger.propagate = True
        logger.handlers = []
        with caplog.at_level(logging.DEBUG, "mixedkv.trace.layout"):
            assert call("verify", "-i", path).exit_code == 0
    finally:
        logger.level, logger.propagate, logger.handlers = before
    for words in ("K as float32", "shape=(2, 3, 32)", "strides=", "mean=", "std="):
        assert words in caplog.text


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
    "no_heads": (layer_is(4, 0, 32, 64, 0.2), "claims 4 query and 0 kv heads"),
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
}


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


def test_write_trace_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trace holds float32"):
        hand_made(tmp_path / "t.gguf", set_to("q", (4, 3, 32), np.int32))
    assert not list(tmp_path.iterdir())


def test_trained_model_chain_on_one_layer(tmp_path: Path) -> None:
    """SmolLM2, one layer, from the model to the verdict."""
    pytest.importorskip("accelerate")
    path = tmp_path / "t.gguf"
    options = ["--layer", "11", "--prompt-tokens", "150", "--mixed-kv-cache", "--hot-size", "64"]
    result = runner.invoke(app, ["trace", "-o", str(path), *options])
    if result.exit_code and "could not fetch" in result.stderr:
        pytest.skip("the model can't be had")
    assert result.exit_code == 0
    found = json.loads(call("verify", "-i", path, "--json").stdout)
    assert found["passed"]
    assert len(found["steps"]) == 5
    assert found["steps"][0]["torch_f32"]["relative"] < 2e-5
    assert found["worst_relative"] < 1e-3
    assert 1e-3 < found["worst_quantisation_cost"] < 0.5
    assert found["rows_followed"] > 600


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", "1e-2"), ("q4_0", "5e-2")])
def test_llama_cpp_chain_on_two_layers(kind: str, tolerance: str, tmp_path: Path) -> None:
    """llama.cpp's own attention: the layout is right, f16 and 8-bit rounding is what is off."""
    pytest.importorskip("llama_cpp")
    path = tmp_path / "t.gguf"
    options = ["--layer", "0,15", "--prompt-tokens", "60", "-ctk", kind, "-ctv", kind, "-t", "2"]
    result = runner.invoke(app, ["trace", "--engine", "llama.cpp", "-o", str(path), *options])
    if result.exit_code and "could not fetch" in result.stderr:
        pytest.skip("the model can't be had")
    assert result.exit_code == 0
    assert "50 tensors of 5 steps and 2 layers" in result.stdout
    strict = json.loads(call("verify", "-i", path, "--json").stdout)
    assert not strict["passed"]
    assert ("f16 accumulator" in json.dumps(strict["steps"])) == (kind == "f16")
    assert call("verify", "-i", path, "--tolerance-rel", tolerance).exit_code == 0


def test_llama_cpp_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    model = write(tmp_path / "model.gguf", b"GGUF")
    path = tmp_path / "t.gguf"
    result = call("trace", "--engine", "llama.cpp", "-m", model, "-o", path)
    assert result.exit_code == 2
    assert "mixedkv[llama]" in result.stderr
