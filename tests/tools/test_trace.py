"""Traces: what is recorded from a model, and files that are written and read."""

from __future__ import annotations

import json
import re
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
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.cli import app  # noqa: E402
from mixedkv.tools.trace import (  # noqa: E402
    LayerInfo,
    RecordedStep,
    TraceHeader,
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.stored import data_of  # noqa: E402
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


def make_model(name: str = "llama", **sizes: Any) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | sizes)))
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


def record(
    name: str = "llama", sizes: dict[str, Any] | None = None, **settings: Any
) -> recording.Recording:
    tiers = {"hot_size": 16, "group_size": 4} if settings.get("mixed") else {}
    options = {**tiers, **settings}
    model = make_model(name, **(sizes or {}))
    return recording.record(model, PROMPT, recording.Settings(**options), title=name)


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
    assert f"{tensors} tensors of 5 steps and 1 layer, " in result.stdout
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
                np.testing.assert_array_equal(data.k_quant.data[:, index], want)
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
        ({"mixed": True, "hot_size": 4, "sink_tokens": 9}, "sink_tokens"),
    ],
    ids=["layer", "sink_tokens"],
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

    caplog.set_level(logging.DEBUG, "mixedkv.tools.trace.layout")
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

    def is_of(found: dict[str, Any], dtype: str, array: Any, strides: Any = None) -> None:
        assert found["dtype"] == dtype
        assert found["shape"] == array.shape
        assert found["strides"] == (data_of(array).strides if strides is None else strides)
        values = ref.dequantize_q4_0(array.data) if dtype == "q4_0" else array
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
        ("K_quant [kv head, key, dim], cold", "q4_0", tensors["k_quant"]),
        ("V_quant [kv head, key, dim], cold", "q4_0", tensors["v_quant"]),
        ("mask [query, key]", "float16", tensors["mask"]),
    ):
        found = logged(while_recording, what)
        is_of(found, dtype, array, found["strides"] if "model's" in what else None)

    joined = {
        letter: np.concatenate(
            [
                ref.dequantize_q4_0(tensors[f"{letter}_quant"].data),
                tensors[letter].astype(np.float32),
            ],
            1,
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

    logger = logging.getLogger("mixedkv.tools.trace.layout")
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
            array = np.ascontiguousarray(data_of(one.tensors[role]))
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


# --- files written and rewritten ------------------------------------------------------------------


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


def test_write_trace_gives_a_file_that_others_may_read(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = hand_made(tmp_path / "t.gguf", lambda header, tensors: None)
    assert path.stat().st_mode == plain.stat().st_mode


def test_write_trace_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trace holds float32"):
        hand_made(
            tmp_path / "t.gguf",
            lambda header, tensors: tensors.update(q=np.zeros((4, 3, 32), np.int32)),
        )
    assert not list(tmp_path.iterdir())
