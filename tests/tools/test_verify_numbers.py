"""What float32 can't hold, and what is no number: neither makes a right trace fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv  # noqa: E402
from mixedkv.tools.trace import read_trace  # noqa: E402
from mixedkv.tools.trace.arithmetic import Problem, attend_torch, problem_of  # noqa: E402
from mixedkv.tools.trace.format import LayerInfo  # noqa: E402
from mixedkv.tools.trace.metrics import difference, row_errors  # noqa: E402
from mixedkv.tools.trace.results import Tolerance  # noqa: E402
from mixedkv.tools.trace.verify import verify  # noqa: E402
from test_trace import call  # noqa: E402
from verify_cases import Tensors, fails, small_trace  # noqa: E402

# --- large logits ---------------------------------------------------------------------------------


def large_logits(tensors: Tensors) -> None:
    """Keys with a common part, as some models' are; what PyTorch's float32 makes of them."""
    sign = np.where(np.arange(32) % 2, 1, -1).astype(np.float32)
    tensors["k"] = tensors["k"] + 32 * sign
    tensors["q"] = tensors["q"] + 32 * sign
    put_torch(tensors, torch.float32)


def put_torch(tensors: Tensors, dtype: Any) -> None:
    info = LayerInfo(4, 2, 32, 32, 32**-0.5)
    problem = Problem(*(tensors[name] for name in ("q", "k", "v", "mask")), 0, info)
    out = attend_torch(problem, dtype)
    tensors["kqv_out"] = out.reshape(len(out), -1).astype(np.float32)


def test_what_float32_is_off_from_float64_is_not_held_against_a_trace(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.gguf", large_logits, n=20, kv=60)
    result = verify(read_trace(path))
    (step,) = result.steps
    assert step.torch_own.relative > 2e-5
    assert step.torch_f64.relative > 2e-5
    assert step.torch_f32.relative < 2e-5
    assert result.passed, step.failures
    assert not step.hints
    found = json.loads(call("verify", "-i", path, "--json").stdout)
    assert found["steps"][0]["torch_own"]["relative"] == step.torch_own.relative
    assert "PyTorch f32 against f64" in call("verify", "-i", path).stdout


def test_large_logits_hide_no_mistake(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        large_logits(tensors)
        tensors["kqv_out"] = tensors["kqv_out"] * np.float32(1 + 1e-4)

    fails(small_trace(tmp_path / "t.gguf", change, n=20, kv=60), "against PyTorch f32: relative")


def test_output_that_is_as_near_to_float64_as_float32_is_told(tmp_path: Path) -> None:
    """Other rounding than PyTorch's, of the same size: out of tolerance, and not "elements"."""

    def change(tensors: Tensors) -> None:
        large_logits(tensors)
        put_torch(tensors, torch.float64)

    result = verify(read_trace(small_trace(tmp_path / "t.gguf", change, n=20, kv=60)), isas=())
    (step,) = result.steps
    assert step.torch_f64.relative < 1e-6
    assert not result.passed
    assert len(step.failures) == 1
    assert len(step.hints) == 1
    assert step.hints[0].startswith("PyTorch's own float32 is off from its float64 by ")


def test_own_error_of_the_judge_comes_on_top() -> None:
    want = np.ones((3, 2, 4))
    near, got = want.copy(), want.copy()
    near[1, 0] += 2e-3
    got[2, 0] -= 2e-3
    tolerance = Tolerance(1e-2, 1e-4)
    found, rows = difference(got, want), row_errors(got, want)
    own = difference(near, want), row_errors(near, want)
    assert tolerance.judge("", found, False, rows)
    assert not tolerance.judge("", found, False, rows, own=own)
    tolerance = Tolerance(1e-5, 1.0)
    assert "relative error" in tolerance.judge("", found, False, rows)[0]
    assert not tolerance.judge("", found, False, rows, own=own)
    got[2, 0] -= 4e-3
    assert tolerance.judge("", difference(got, want), False, row_errors(got, want), own=own)


# --- values that are no number --------------------------------------------------------------------


CAUSAL = np.where(np.arange(9) > np.arange(9)[:, None], -np.inf, 0).astype(np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", ["k", "v"])
def test_hidden_cells_that_are_not_finite_touch_nothing(
    role: str, value: float, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[role][:, 4] = value

    mask = np.zeros((6, 9), np.float32)
    mask[:, 4] = -np.inf
    result = verify(read_trace(small_trace(tmp_path / "t.gguf", change, mask=mask)))
    assert result.passed, result.steps[0].failures
    assert len(result.steps[0].isas) == len(mkv.isa.available())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("most", [64, 1])
def test_values_that_are_not_finite_reach_those_who_see_them(
    value: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two keys' values: of 9 queries one sees one of them, one both."""
    from mixedkv.tools.trace import arithmetic

    monkeypatch.setattr(arithmetic, "_MOST_PATTERNS", most)

    def change(tensors: Tensors) -> None:
        tensors["v"][:, 7, 3] = value
        tensors["v"][:, 8, 5] = value
        tensors.pop("kqv_out", None)

    path = small_trace(tmp_path / "t.gguf", change, n=9, mask=CAUSAL)
    trace = read_trace(path)
    problem = problem_of(trace.steps[0].load(), trace.steps[0].info)
    out = attend_torch(problem, torch.float64)
    assert np.isfinite(out[:7]).all()
    assert (~np.isfinite(out[8])).sum() == 2 * 4
    if most > 1:
        assert (~np.isfinite(out[7])).sum() == 4
        # Not right for all that; but nothing else is the matter, with the recorded or the own op.
        found = fails(
            path, r"output holds 12 values that are not finite, of 2 queries \(PyTorch's: 12\)"
        )
        assert len(found["steps"][0]["failures"]) == 1
    clean = np.nan_to_num(problem.v, nan=0, posinf=0, neginf=0)
    want = attend_torch(
        Problem(problem.q, problem.k, clean, CAUSAL, 0, problem.info), torch.float64
    )
    np.testing.assert_allclose(out[:7], want[:7], rtol=0, atol=1e-12)


def test_finite_output_where_a_key_is_not_is_told(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["v"][:, 8] = np.inf

    found = fails(
        small_trace(tmp_path / "t.gguf", change, n=9, mask=CAUSAL), "128 of 1152 elements are not"
    )
    assert found["steps"][0]["hints"] == [
        "the output of query 8 should hold NaN or infinite values: recorded queries, keys or "
        "values that take part in it do"
    ]
