"""Traces of caches that rotate rows and center keys, presets among them."""

from __future__ import annotations

import copy
import dataclasses
import json
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
import mixedkv.integrations.transformers as mkt  # noqa: E402
import reference as ref  # noqa: E402
import transformers  # noqa: E402
from hostile_traces import refused, rewritten  # noqa: E402
from mixedkv.cache import presets  # noqa: E402
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.trace import read_trace, write_trace  # noqa: E402
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.verify import verify  # noqa: E402
from test_trace import CountingTokenizer, call, make_model, record, saved  # noqa: E402

SIZES = {"head_dim": 64, "num_hidden_layers": 1}
SMALL = {"hot_size": 24, "group_size": 8, "hot_keep": 4}
"""In place of a preset's sizes, which a short prompt would not fill."""


def of_preset(name: str, **settings: Any) -> recording.Recording:
    return record(sizes=SIZES, mixed=True, preset=name, steps=6, **SMALL, **settings)


@pytest.fixture(scope="module")
def small() -> recording.Recording:
    return of_preset("small")


@pytest.mark.parametrize("name", presets.NAMES)
def test_trace_of_a_preset_is_recorded_and_verified(name: str, tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path / "t.gguf", of_preset(name)))
    types = presets.options(name)
    assert trace.header is not None
    assert trace.header.stored == {
        "k": "f16",
        "v": "f16",
        "k_quant": types["cold_k_type"],
        "v_quant": types["cold_v_type"],
    }
    assert trace.header.notes["rotate"] == trace.header.notes["center_keys"] == "on"
    result = verify(trace)
    assert result.passed, [step.failures for step in result.steps] + result.failures
    assert set(result.steps[-1].isas) == set(mkv.isa.available())
    cold = [step for step in result.steps if step.kv_cold > 1]
    assert len(cold) == 3
    for step in cold:
        assert step.quantised
        assert step.tolerance[0] == 1e-3
        assert step.plain == "it holds what rotated or centered rows stand for, not the rows"
        assert step.cost is not None
        assert step.cost.relative < (2e-2 if name == "near_lossless" else 0.3)
    assert result.rows_followed > 20
    assert any("what became of rows that moved to cold" in words for words in result.remarks)


@pytest.mark.parametrize("name", ["balanced", "small"])
def test_fitted_rows_that_nothing_changed_are_followed_to_cold(name: str, tmp_path: Path) -> None:
    """Verify holds cold rows to what hot ones become, and puts these into a cache of its own."""
    recorded = of_preset(name, rotate=False, center_keys=False)
    fitted = {} if name == "small" else {"fit_scales": "on"}
    assert {key: note for key, note in recorded.header.notes.items() if key != "isa"} == fitted
    trace = read_trace(saved(tmp_path / "t.gguf", recorded))
    result = verify(trace)
    assert result.passed, [step.failures for step in result.steps] + result.failures
    cold = [step for step in result.steps if step.kv_cold > 1]
    assert cold
    assert all(step.quantised and step.plain is None for step in cold)
    recorded = copy.deepcopy(recorded)
    last = recorded.steps[-1].tensors["k_quant"]
    assert isinstance(last, mkv.QuantizedArray)
    last.data[..., 0, 5] ^= 1  # a code of the first cold token's keys
    result = verify(read_trace(saved(tmp_path / "changed.gguf", recorded)))
    assert not result.passed
    assert any("are not the" in words for words in result.failures), result.failures


def test_rows_are_those_that_the_model_has() -> None:
    """Of the first layer, where nothing came before: those of a cache that changes nothing."""
    plain, changed = (
        record(sizes=SIZES, mixed=True, cold_v_type="f16", steps=6, **options)
        for options in (
            {"cold_k_type": "f16"},
            {"cold_k_type": "q8_0", "rotate": True, "center_keys": True},
        )
    )
    assert plain.header.stored == {}
    for a, b in zip(plain.steps, changed.steps, strict=True):
        for role, most in (("k", 1e-3), ("v", 1e-3), ("k_quant", 1e-2), ("v_quant", 1e-3)):
            rows, same = np.asarray(a.tensors[role]), b.tensors[role]
            assert same.dtype == np.float32
            error = np.linalg.norm(same - rows.astype(np.float32))
            assert error <= most * np.linalg.norm(rows.astype(np.float64))


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_standard_cache_that_rotates(kind: str, tmp_path: Path) -> None:
    recorded = record(sizes=SIZES, steps=3, rotate=True, k_type=kind, v_type=kind)
    result = verify(read_trace(saved(tmp_path / "t.gguf", recorded)))
    assert result.passed, [step.failures for step in result.steps] + result.failures
    assert recorded.header.stored == {"k": kind, "v": kind}
    blocks = kind.startswith("q")
    assert {step.quantised for step in result.steps} == {blocks}
    assert {step.tolerance[0] for step in result.steps} == {1e-3 if blocks else 2e-5}


def test_cold_rows_that_change_are_caught(small: recording.Recording, tmp_path: Path) -> None:
    """The output fits what is there in that step; the row is not what it was before."""
    planted = copy.deepcopy(small)
    last = planted.steps[-1].tensors
    last["v_quant"] = last["v_quant"].copy()
    last["v_quant"][:, 2] += 1
    k, v = (np.concatenate([last[f"{one}_quant"], last[one]], 1) for one in "kv")
    out, _ = ref.attention(last["q"], k, v, mask=last["mask"].astype(np.float32))
    out = out.reshape(last["q"].shape).transpose(1, 0, 2).reshape(len(last["mask"]), -1)
    last["kqv_out"] = np.ascontiguousarray(out, np.float32)
    result = verify(read_trace(saved(tmp_path / "t.gguf", planted)), isas=["scalar"])
    assert all(step.passed for step in result.steps)
    position = planted.header.positions_quant[7][2]
    assert result.failures == [f"step 7 of layer 0: the cold rows of position {position} changed"]


# --- files and settings -------------------------------------------------------------------------


def test_trace_says_what_its_rows_stand_for(small: recording.Recording, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(saved(tmp_path / "t.gguf", small))
    told = {role: reader.fields[f"kqv_trace.stored.{role}"].contents() for role in ("k", "v_quant")}
    assert told == {"k": "f16", "v_quant": "nl4"}
    (rows,) = [one for one in reader.tensors if one.name == "K_quant-0_step_7"]
    assert rows.tensor_type.name == "F32"


def test_stored_formats_are_held_to_the_file(small: recording.Recording, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", small)
    key = "kqv_trace.stored.k_quant"
    assert f"{key} must be one of f32, f16" in refused(rewritten(path, {key: "nl99"}))
    assert f"{key} must be" in refused(rewritten(path, {key: 4.5}))
    # Without it the trace is one of plain float32 rows, held to what these allow.
    gone = {f"kqv_trace.stored.{role}": None for role in ("k", "v", "k_quant", "v_quant")}
    assert not verify(read_trace(rewritten(path, gone)), isas=["scalar"]).passed
    packed = saved(tmp_path / "p.gguf", record(sizes=SIZES, mixed=True, steps=3))
    words = refused(rewritten(packed, {key: "q4_0"}))
    assert f"is q4_0, and {key} says that it is float32 or float16" in words


def test_note_of_that_name_is_refused(small: recording.Recording, tmp_path: Path) -> None:
    header = copy.deepcopy(small.header)
    header.notes["stored.k"] = "q8_0"
    with pytest.raises(ValueError, match=r"a note can't be named 'stored\.k'"):
        write_trace(tmp_path / "t.gguf", header, small.steps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge", "mixed": True}, "preset must be one of near_lossless"),
        ({"preset": "small"}, "preset is of a mixed cache, got 'small' without one"),
        ({"center_keys": True}, "center_keys is of a mixed cache, got True without one"),
        ({"cold_v_type": "q8_0"}, "cold_v_type is of a mixed cache"),
    ],
    ids=str,
)
def test_settings_that_fit_no_cache_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(sizes=SIZES, **settings)


def test_given_options_come_before_the_presets() -> None:
    given = recording.Settings(mixed=True, preset="tiny", rotate=False, cold_v_type="q8_0")
    options = given.options(96)
    want = {**presets.options("tiny"), "rotate": False, "cold_v_type": "q8_0", "cold_size": 96}
    assert options == {**want, "hot_k_type": "f16", "hot_v_type": "f16", "n_pad": 32}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.LoadedModel("wide", make_model(**SIZES), CountingTokenizer())
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)


def test_a_presets_sizes_fit_those_given() -> None:
    options = recording.Settings(mixed=True, preset="small", hot_size=64).options(96)
    want = presets.options("small", hot_size=64, cold_size=96)
    assert options.items() >= want.items()
    assert (options["hot_keep"], options["group_size"]) == (31, 16)


def test_a_sliding_window_stays_hot_as_in_a_mixed_cache() -> None:
    config = transformers.Gemma2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
    )
    settings = recording.Settings(mixed=True, preset="small")
    cache = recording.make_cache(config, 2000, settings)
    same = mkt.MixedCache(config, preset="small", cold_size=2016)
    assert mkt.preset_options(config, "small")["hot_keep"] == 512
    for name in ("hot_size", "hot_keep", "group_size", "threshold", "sink_tokens"):
        assert getattr(cache._row_config, name) == getattr(same._row_config, name), name
    assert cache._row_config.hot_keep == 512
    # What is given still comes before it.
    given = recording.make_cache(config, 2000, dataclasses.replace(settings, hot_keep=40))
    assert given._row_config.hot_keep == 40


@pytest.mark.usefixtures("wide")
def test_command_takes_presets(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    options = ["--prompt-tokens", "20", "-n", "6", "-o", path]
    sizes = ["--hot-size", "24", "--group-size", "8", "--hot-keep", "4"]
    done = call("trace", *options, "--preset", "tiny", *sizes)
    assert done.exit_code == 0, done.stderr
    found = json.loads(call("verify", "-i", path, "--json").stdout)
    assert found["passed"]
    assert found["steps"][-1]["quantised"]
    done = call("trace", *options, "--rotate")
    assert done.exit_code == 0, done.stderr
    header = read_trace(path).header
    assert header is not None
    assert header.stored == {"k": "f16", "v": "f16"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "huge"], "--preset: must be one of near_lossless, balanced"),
        (["--center-keys"], "--center-keys: goes with --mixed-kv-cache"),
        (["--hot-keep", "3"], "--hot-keep: goes with --mixed-kv-cache"),
        (["--engine", "llama.cpp", "--rotate"], "--rotate: llama.cpp is not asked to rotate"),
        (["--engine", "llama.cpp", "--preset", "tiny"], "llama.cpp has no mixed cache"),
    ],
    ids=str,
)
def test_command_refuses_what_fits_no_cache(options: list[str], says: str, tmp_path: Path) -> None:
    done = call("trace", "-o", tmp_path / "t.gguf", *options)
    assert done.exit_code == 2
    words = " ".join(done.stderr.replace("│", " ").replace("'", " ").split())
    assert " ".join(says.replace(":", " :").split()) in words.replace(":", " :").replace("  ", " ")
