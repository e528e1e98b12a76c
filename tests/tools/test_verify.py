"""Verifying traces: right ones pass; tolerances, references and pictures; memory stays small."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv  # noqa: E402
import reference as ref  # noqa: E402
from mixedkv.tools.trace import (  # noqa: E402
    read_trace,
    write_trace,
)
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.arithmetic import attend_torch, problem_of  # noqa: E402
from mixedkv.tools.trace.metrics import difference  # noqa: E402
from mixedkv.tools.trace.verify import Tolerance, compare_traces, verify  # noqa: E402
from test_trace import PROMPT, call, record, saved  # noqa: E402
from verify_cases import mixed as mixed  # noqa: E402
from verify_cases import one_element, plant, whole  # noqa: E402
from verify_cases import standard as standard  # noqa: E402

# --- right traces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", ["standard", "mixed", "second_mask"])
def test_right_trace_passes(model: str, cache: str, tmp_path: Path) -> None:
    """Plain attention, windows with a soft cap, windows with learned sinks."""
    options = {"mixed": cache != "standard", "second_mask": cache == "second_mask"}
    result = verify(read_trace(saved(tmp_path / "t.gguf", record(model, **options))))
    assert result.passed, [step.failures for step in result.steps] + result.failures
    assert len(result.steps) == 5 * 3
    for step in result.steps:
        assert set(step.isas) == set(mkv.isa.available())
        assert step.torch_f32.relative < (1e-3 if step.quantised else 2e-5)
        assert (step.cost is not None) == step.quantised
        if step.cost is not None:
            assert 1e-3 < step.cost.relative < 1
    assert any(step.quantised for step in result.steps) == (cache != "standard")
    assert not any(step.quantised for step in result.steps if step.step == 1)


@pytest.mark.parametrize("types", [("f32", "f32"), ("q4_0", "f16"), ("q4_0", "q4_0")])
def test_right_trace_of_other_types_passes(types: tuple[str, str], tmp_path: Path) -> None:
    for of_mixed in (False, True):
        recorded = record(k_type=types[0], v_type=types[1], mixed=of_mixed)
        result = verify(read_trace(saved(tmp_path / "t.gguf", recorded)))
        assert result.passed, [step.failures for step in result.steps] + result.failures


def test_torch_agrees_with_the_reference(mixed: recording.Recording, tmp_path: Path) -> None:
    """The judge itself, against float64 numpy."""
    for step in read_trace(saved(tmp_path / "t.gguf", mixed)).steps[:6]:
        problem = problem_of(step.load(), step.info)
        want = ref.attention(
            problem.q, problem.k, problem.v, sm_scale=step.info.sm_scale, mask=problem.mask
        )
        want = np.asarray(want[0] if isinstance(want, tuple) else want)
        got = attend_torch(problem, torch.float64).transpose(1, 0, 2)
        np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-12)


def test_cost_is_that_of_unquantised_rows(mixed: recording.Recording, tmp_path: Path) -> None:
    """Against attention over the model's own keys and values, rounded to f16 alone."""
    trace = read_trace(saved(tmp_path / "t.gguf", mixed))
    result = verify(trace, layers=[0])
    # Layer 0 sees embeddings alone: its rows are the same whatever cache is used.
    tokens = trace.header.tokens if trace.header else []
    other = recording.record(
        _same_model(), tokens, recording.Settings(layers=(0,), steps=0), title="whole"
    )
    whole = other.steps[0].tensors
    for step in result.steps[1:]:
        assert step.cost is not None
        row = len(PROMPT) + step.step - 2
        data = next(s for s in trace.steps if (s.layer, s.step) == (0, step.step)).load()
        want = whole["kqv_out"][row].reshape(data.out.shape)
        assert step.cost.relative == pytest.approx(difference(data.out, want).relative, rel=1e-3)


def _same_model() -> Any:
    from test_trace import make_model

    return make_model()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kv", "wrong"), [(4096, 1, 60_000, False), (1024, 2, 16_000, True)]
)
def test_many_heads_over_few_kv_heads_take_no_memory(
    heads: int, kv_heads: int, kv: int, wrong: bool, tmp_path: Path
) -> None:
    """Keys are not repeated for the heads that read them: that would be 30 GB, and 2 GB."""
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np, torch
import mixedkv as mkv
from mixedkv.tools.trace import LayerInfo, RecordedStep, TraceHeader, read_trace, write_trace
from mixedkv.tools.trace.verify import verify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

rng = np.random.default_rng(0)
heads, kv_heads, kv = {heads}, {kv_heads}, {kv}
q = rng.standard_normal((heads, 1, 32), dtype=np.float32)
k, v = (rng.standard_normal((kv_heads, kv, 32), dtype=np.float32) for _ in "kv")
out = np.asarray(mkv.attention(q, k, v, sm_scale=0.2)).transpose(1, 0, 2).reshape(1, -1)
if {wrong}:
    out = out[:, ::-1]
tensors = {{"q": q, "k": k, "v": v, "mask": np.zeros((1, kv), np.float16)}}
tensors["kqv_out"] = np.ascontiguousarray(out)
info = LayerInfo(heads, kv_heads, 32, 32, 0.2)
header = TraceHeader("test", "1", "none", "standard", layers={{0: info}})
path = Path(sys.argv[1])
write_trace(path, header, [RecordedStep(0, 1, tensors)])
torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4)] * 3)
before = peak()
result = verify(read_trace(path), isas=[mkv.isa.active()], entropy={wrong})
print(result.passed, peak() - before)
"""
    folder = str(Path(mkv.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t.gguf")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folder},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed, megabytes = done.stdout.split()
    assert passed == str(not wrong)
    assert float(megabytes) < 700


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"])
def test_torch_in_pieces_is_the_same(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces: of kv heads, of query heads, of queries."""
    from mixedkv.tools.trace import arithmetic

    trace = read_trace(saved(tmp_path / "t.gguf", record(model, mixed=True, steps=2)))
    problems = [problem_of(step.load(), step.info) for step in trace.steps]
    wanted = [attend_torch(problem, torch.float64) for problem in problems]
    for most in (1, 40, 700, 1000, 2000):
        monkeypatch.setattr(arithmetic, "MOST_HELD", most)
        for problem, want in zip(problems, wanted, strict=True):
            np.testing.assert_allclose(
                attend_torch(problem, torch.float64), want, rtol=0, atol=1e-13
            )
            parts = list(arithmetic.probabilities(problem))
            rows = sum(part.shape[0] * part.shape[1] for part in parts)
            assert rows == problem.q.shape[0] * problem.q.shape[1]
            assert max(part.size for part in parts) <= max(most, problem.k.shape[1])


# --- tolerances, two traces, pictures -------------------------------------------------------------


def test_tolerances_decide(standard: recording.Recording, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", standard)
    assert call("verify", "-i", path, "--tolerance-rel", "1e-12").exit_code == 1
    assert call("verify", "-i", path, "--tolerance-abs", "0").exit_code == 1
    off = plant(standard, one_element)
    path = saved(tmp_path / "off.gguf", off)
    assert call("verify", "-i", path).exit_code == 1
    loose = ["--tolerance-rel", "0.1", "--tolerance-abs", "1"]
    assert call("verify", "-i", path, *loose).exit_code == 0


def test_a_single_wrong_element_of_a_long_step_fails() -> None:
    """Its share of the norm is within the tolerance; it is not."""
    rng = np.random.default_rng(0)
    want = rng.standard_normal((600, 9, 64))
    got = want.copy()
    got[5, 3, 1] += 5e-3
    found = difference(got, want)
    assert found.relative < 2e-5
    assert Tolerance().judge("", found, quantised=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_difference_with_odd_values_is_infinite(value: float) -> None:
    want = np.ones(4)
    got = np.array([1, value, 1, 1])
    for a, b in ((got, want), (want, got)):
        found = difference(a, b)
        assert found.relative == np.inf
        assert found.not_finite == 1
        assert found.grade == "wrong"
        assert Tolerance(1e30, 1e30).judge("", found, quantised=True)
    assert difference(got, got).relative == 0


def test_difference_figures() -> None:
    found = difference(np.array([3.0, 4.0]), np.array([3.0, 0.0]))
    assert (found.max, found.mean, found.scale) == (4, 2, 3)
    assert found.relative == pytest.approx(4 / 3)
    assert found.nmse == pytest.approx(16 / 9)
    assert found.cosine == pytest.approx(0.6)
    with pytest.raises(ValueError, match="can't be compared"):
        difference(np.ones(3), np.ones(4))


def test_reference_trace(
    standard: recording.Recording, mixed: recording.Recording, tmp_path: Path
) -> None:
    a = saved(tmp_path / "a.gguf", standard)
    b = saved(tmp_path / "b.gguf", mixed)
    same = call("verify", "-i", a, "--reference", a)
    assert same.exit_code == 0
    assert same.stdout.count("PASS") == 3  # by itself, against the reference, and both
    other = call("verify", "-i", a, "--reference", b, "--json")
    assert other.exit_code == 1
    found = json.loads(other.stdout)
    assert not found["passed"]
    assert found["by_itself"]
    assert not found["reference"]["passed"]
    first = [one for one in found["reference"]["steps"] if (one["step"], one["layer"]) == (1, 0)]
    assert [one["role"] for one in first] == ["kqv_out", "q", "k", "v"]
    assert first[0]["relative"] < 2e-5  # nothing was cold yet
    result = compare_traces(read_trace(a), read_trace(b), Tolerance(1e9, 1e9))
    assert result.passed


def test_reference_that_lacks_steps_fails(standard: recording.Recording, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.gguf", tmp_path / "part.gguf"
    write_trace(whole, standard.header, standard.steps)
    layers = {0: standard.header.layers[0]}
    header = dataclasses.replace(standard.header, layers=layers)
    write_trace(part, header, [one for one in standard.steps if one.layer == 0])
    for a, b, words in (
        (whole, part, "the reference lacks it"),
        (part, whole, "only the reference"),
    ):
        result = call("verify", "-i", a, "--reference", b, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["by_itself"]
        assert not found["passed"]
        assert any(words in one for one in found["reference"]["failures"])


def test_reference_is_compared_in_the_layers_asked_for(
    standard: recording.Recording, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole.gguf", tmp_path / "part.gguf"
    write_trace(whole, standard.header, standard.steps)
    other = plant(standard, one_element)
    kept = [one for one in standard.steps if one.layer == 1]
    write_trace(part, standard.header, kept + [one for one in other.steps if one.layer == 2])
    for a, b in ((whole, part), (part, whole)):
        found = json.loads(
            call("verify", "-i", a, "--reference", b, "--layer", "1", "--json").stdout
        )
        assert found["passed"]
        assert {one["layer"] for one in found["reference"]["steps"]} == {1}
        result = call("verify", "-i", a, "--reference", b, "--layer", "1,2", "--json")
        assert result.exit_code == 1
    assert call("verify", "-i", whole, "--reference", part).exit_code == 1
    lacks = call("verify", "-i", whole, "--reference", part, "--layer", "0")
    assert lacks.exit_code == 2
    assert "share no step" in lacks.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_not_finite_fails(
    standard: recording.Recording, tmp_path: Path, value: float
) -> None:
    """Even where recomputing it gives the same."""
    steps = copy.deepcopy(list(standard.steps))
    for one in steps:
        one.tensors["v"] = np.full_like(one.tensors["v"], value)
        one.tensors["kqv_out"] = np.full_like(one.tensors["kqv_out"], value)
    path = tmp_path / "odd.gguf"
    write_trace(path, standard.header, steps)
    result = call("verify", "-i", path)
    assert result.exit_code == 1
    assert "not finite" in result.stdout


def test_reference_without_a_common_step_is_refused(
    standard: recording.Recording, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_trace(a, standard.header, [one for one in standard.steps if one.layer == 0])
    write_trace(b, standard.header, [one for one in standard.steps if one.layer == 1])
    result = call("verify", "-i", a, "--reference", b)
    assert result.exit_code == 2
    assert "share no step" in result.stderr


@pytest.mark.parametrize("cache", ["standard", "mixed"])
def test_plot(cache: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("matplotlib")
    path = saved(tmp_path / "t.gguf", request.getfixturevalue(cache))
    picture = tmp_path / "t.png"
    assert call("verify", "-i", path, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("verify", "-i", path, "--plot", tmp_path / "t.doc").exit_code == 2


def test_entropy_by_tier(mixed: recording.Recording, tmp_path: Path) -> None:
    """Against numpy, in one step."""
    trace = read_trace(saved(tmp_path / "t.gguf", mixed))
    result = verify(trace, entropy=True, isas=())
    index = next(i for i, step in enumerate(trace.steps) if step.step == 5)
    step = trace.steps[index]
    q, k, _, mask = whole(
        next(s for s in mixed.steps if (s.layer, s.step) == (step.layer, 5)).tensors
    )
    logits = (q @ np.repeat(k, 2, 0).swapaxes(1, 2)).astype(np.float64) / np.sqrt(32) + mask
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = result.steps[index].entropy
    assert found is not None
    cold = p[..., : step.kv_cold]
    assert found.cold_share == pytest.approx(cold.sum(-1).mean(), rel=1e-4)
    for part, entropy in ((cold, found.cold), (p[..., step.kv_cold :], found.hot)):
        within = part / part.sum(-1, keepdims=True)
        assert entropy == pytest.approx(-(within * np.log(within)).sum(-1).mean(), rel=1e-3)


def test_verify_layers_and_isas(standard: recording.Recording, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.gguf", standard)
    found = json.loads(
        call("verify", "-i", path, "--layer", "1", "--isa", "scalar", "--json").stdout
    )
    assert {step["layer"] for step in found["steps"]} == {1}
    assert list(found["steps"][0]["isas"]) == ["scalar"]
    before = mkv.isa.active()
    assert call("verify", "-i", path, "--layer", "8").exit_code == 2
    assert call("verify", "-i", path, "--isa", "sse").exit_code == 2
    assert mkv.isa.active() == before
