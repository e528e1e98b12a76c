"""Traces that are larger than what they hold: refused before they cost anything."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
gguf = pytest.importorskip("gguf")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

from hostile_traces import refused, write  # noqa: E402
from mixedkv.tools.trace import read_trace  # noqa: E402
from test_trace import call, record, saved  # noqa: E402


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
