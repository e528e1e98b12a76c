"""Traces that lack steps, layers or the use of a tensor fail, and say what lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
gguf = pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

from mixedkv.tools.trace import RecordedStep, read_trace  # noqa: E402
from mixedkv.tools.trace import record as recording  # noqa: E402
from mixedkv.tools.trace.complete import incomplete  # noqa: E402
from mixedkv.tools.trace.verify import verify  # noqa: E402
from test_trace import record, saved  # noqa: E402
from verify_cases import fails  # noqa: E402


@pytest.fixture(scope="module")
def standard() -> recording.Recording:
    return record(steps=4)


def part(
    recorded: recording.Recording, kept: Callable[[RecordedStep], bool], *, told: bool = True
) -> recording.Recording:
    """A copy with some steps; `told`: its metadata tells how many there were."""
    header = copy.deepcopy(recorded.header)
    if not told:
        header.step_tokens = []
    return recording.Recording(header, [step for step in recorded.steps if kept(step)])


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (lambda one: one.step != 3, "layer 2 lacks step 3: kqv_trace.step_tokens tells of 5 steps"),
        (lambda one: one.step < 3, "layer 0 lacks steps 3, 4, 5: kqv_trace.step_tokens tells of 5"),
        (lambda one: one.step == 1 or one.layer != 1, "layer 1 lacks steps 2, 3, 4, 5: kqv_trace"),
        (lambda one: one.layer != 1, "layer 1 is in kqv_trace.layers, and no step of it is there"),
    ],
    ids=["a_step", "the_last", "a_layers_steps", "a_layer"],
)
def test_lacking_steps_fail(
    kept: Callable[[RecordedStep], bool],
    words: str,
    standard: recording.Recording,
    tmp_path: Path,
) -> None:
    found = fails(saved(tmp_path / "t.gguf", part(standard, kept)), words)
    assert all(step["passed"] for step in found["steps"])


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (lambda one: one.step != 3, ["lacks step 3: the last step is 5"] * 3),
        (lambda one: one.step == 1 or one.layer != 1, ["lacks steps 2, 3, 4, 5: other layers"]),
        (lambda one: one.step < 4, []),
    ],
    ids=["a_step", "a_layers_steps", "the_last"],
)
def test_lacking_steps_fail_without_step_tokens(
    kept: Callable[[RecordedStep], bool],
    words: list[str],
    standard: recording.Recording,
    tmp_path: Path,
) -> None:
    """Steps count from 1, and each layer has the same; how many there were, nothing tells."""
    trace = read_trace(saved(tmp_path / "t.gguf", part(standard, kept, told=False)))
    found = incomplete(trace)
    assert len(found) == len(words)
    assert all(word in one for word, one in zip(words, found, strict=True))


def test_layers_that_are_not_asked_for_may_lack(
    standard: recording.Recording, tmp_path: Path
) -> None:
    trace = read_trace(saved(tmp_path / "t.gguf", part(standard, lambda one: one.layer != 1)))
    assert verify(trace, layers=iter([0, 2]), isas=()).passed
    assert not verify(trace, isas=()).passed


def test_tensors_left_over_fail(standard: recording.Recording, tmp_path: Path) -> None:
    """Here a sixth step that the lists of names and roles don't tell of."""
    source = gguf.GGUFReader(saved(tmp_path / "t.gguf", standard))
    path = tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(path, "kqv_trace")
    for field in source.fields.values():
        if field.name.startswith("kqv_trace."):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name in ("K-0_step_6", "V-0_step_6"):
        writer.add_tensor(name, np.zeros((2, 4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not incomplete(read_trace(tmp_path / "t.gguf"))
    fails(path, "2 tensors are not in kqv_trace.tensor.names, and not looked at: .K-0_step_6")
